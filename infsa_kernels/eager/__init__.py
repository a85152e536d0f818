"""The operators in torch operations: any device, O(N) memory, float32 sums. What runs where no kernel was built."""

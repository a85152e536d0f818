"""Triton kernels for NVIDIA and AMD GPUs. Imported when a call first needs them, never by `import infsa_kernels`."""

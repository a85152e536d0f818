"""The operators: importing this package registers `torch.ops.infsa.*`."""

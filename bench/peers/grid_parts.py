"""Parts on the grid of patches that several mechanisms share: depthwise convolutions, and a rotary embedding."""

import torch
from torch import Tensor, nn


def depthwise(channels: int, size: int, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, size, padding=size // 2, groups=channels, bias=bias)


def on_grid(module: nn.Module, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Applies a module of pictures (B, C, h, w) to tokens (B, N, C)."""
    return module(x.mT.unflatten(-1, grid)).flatten(2).mT


def on_grid_per_head(module: nn.Module, v: Tensor, grid: tuple[int, int]) -> Tensor:
    """The same for (B, H, N, d) with d channels, shared by the heads: (B, N, D)."""
    B, H, N, d = v.shape
    out = on_grid(module, v.reshape(B * H, N, d), grid)
    return out.unflatten(0, (B, H)).transpose(1, 2).flatten(2)


class Rotary(nn.Module):
    """Rotates pairs of channels by theta_j = 10000^(-j / (D/4)): of the first half by the row, of the rest by the column."""

    def __init__(self, dim: int, grid: tuple[int, int]):
        super().__init__()
        theta = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))  # (D/4,)
        row, column = torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")
        angle = torch.cat([position.flatten()[:, None] * theta for position in (row, column)], 1)  # (N, D/2)
        dtype = torch.get_default_dtype()
        self.register_buffer("cos", angle.cos().to(dtype), persistent=False)
        self.register_buffer("sin", angle.sin().to(dtype), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, D)."""
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([a * self.cos - b * self.sin, a * self.sin + b * self.cos], -1).flatten(-2)

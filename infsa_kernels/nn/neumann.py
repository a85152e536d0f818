"""Neumann accumulation: the discounted sum of what every layer's attention gave (paper eqs 9-10, 23)."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .checks import fraction, integer
from .rho import logit


class NeumannSum(nn.Module):
    """out = sum_{l=1..L} gamma_l^l O_l, with gamma = sigmoid(logit) learnable.

    If every layer multiplies by one matrix A, O_l = A^l x, and all gamma are equal, the sum tends to
    ((I - gamma A)^-1 - I) x as L grows.

    Args:
        num_layers: number of layers L.
        num_heads: number of heads H, each of which takes an equal part of the channels and has gammas of its own; None for
            one gamma per layer.
        gamma_init: every gamma at the start, between 0 and 1.

    Raises:
        ValueError: an argument out of range. TypeError: one of another type.

    Example::

        >>> NeumannSum(4)([torch.randn(1, 197, 1024) for _ in range(4)]).shape
        torch.Size([1, 197, 1024])
    """

    def __init__(
        self, num_layers: int, num_heads: int | None = None, gamma_init: float = 0.9, device=None, dtype=None
    ):  # fmt: skip
        super().__init__()
        integer("NeumannSum", "num_layers", num_layers)
        if num_heads is not None:
            integer("NeumannSum", "num_heads", num_heads)
        fraction("NeumannSum", "gamma_init", gamma_init)
        self.num_layers, self.num_heads, self.gamma_init = num_layers, num_heads, gamma_init
        shape = (num_layers,) if num_heads is None else (num_layers, num_heads)
        self.logit = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.logit.fill_(logit(self.gamma_init))

    @property
    def gamma(self) -> Tensor:
        """(L,) or (L, H)."""
        return torch.sigmoid(self.logit)

    def forward(self, outputs: Iterable[Tensor]) -> Tensor:
        """The sum over L tensors (..., D), first layer first. One at a time, if ``outputs`` makes them so."""
        total, layer = None, 0
        for layer, out in enumerate(outputs, 1):
            if layer <= self.num_layers:
                term = self.term(layer, out)
                total = term if total is None else total + term
        if layer != self.num_layers:
            raise ValueError(f"NeumannSum: outputs has {layer} tensors, expected num_layers = {self.num_layers}")
        return total

    def term(self, layer: int, out: Tensor) -> Tensor:
        """gamma^l O_l for the layer's number l, from 1."""
        weight = self.gamma[layer - 1] ** layer
        if self.num_heads is None:
            return weight * out
        return (weight[:, None] * out.unflatten(-1, (self.num_heads, -1))).flatten(-2)

    def extra_repr(self) -> str:
        return f"{self.num_layers}, num_heads={self.num_heads}"

"""What the eager operators over tokens x (B, N, D) need: blocks of them, normalised, and the normalisation's gradient."""

from collections.abc import Iterator

import torch
from torch import Tensor

from .common import acc_dtype

# Elements of one block's largest intermediate.
BLOCK_ELEMENTS = 1 << 22


class Block:
    """Tokens of x in the accumulation dtype, removed ones 0, normalised without an affine part if norm_eps is given."""

    def __init__(self, x: Tensor, norm_eps: float | None, padding_mask: Tensor | None, acc: torch.dtype):
        self.mask = None if padding_mask is None else padding_mask[..., None]
        self.rows = self._keep(x.to(acc))  # (B, T, D)
        self.inverse_deviation = None
        if norm_eps is not None:
            centered = self.rows - self.rows.mean(-1, keepdim=True)
            # A mean far above the deviation is rounded to its own digits: what that leaves is small, and taken off exactly.
            centered -= centered.mean(-1, keepdim=True)
            self.inverse_deviation = (centered.square().mean(-1, keepdim=True) + norm_eps).rsqrt()
            self.rows = self._keep(centered * self.inverse_deviation)

    def weights(self, t: Tensor) -> Tensor:
        """Numbers per token (B, T, .), 0 where the token is removed."""
        return self._keep(t)

    def input_gradient(self, drows: Tensor) -> Tensor:
        """The gradient of x from that of the rows."""
        if self.inverse_deviation is not None:
            along = (drows * self.rows).mean(-1, keepdim=True)
            drows = (drows - drows.mean(-1, keepdim=True) - along * self.rows) * self.inverse_deviation
        return self._keep(drows)

    def _keep(self, t: Tensor) -> Tensor:
        return t if self.mask is None else t.masked_fill(self.mask, 0)


def blocks(x: Tensor, width: int, norm_eps: float | None, padding_mask: Tensor | None) -> Iterator[tuple[slice, Block]]:
    """x in blocks of tokens whose intermediates are ``width`` numbers a token."""
    step = max(1, BLOCK_ELEMENTS // max(1, x.shape[0] * width))
    for begin in range(0, x.shape[1], step):
        tokens = slice(begin, begin + step)
        mask = None if padding_mask is None else padding_mask[:, tokens]
        yield tokens, Block(x[:, tokens], norm_eps, mask, acc_dtype(x))

"""What both eager operators need."""

import torch
from torch import Tensor


def scale(q: Tensor) -> float:
    return q.shape[-1] ** -0.5 if q.shape[-1] else 1.0


def rows(mask: Tensor) -> Tensor:
    """A (B, L) mask as one over the rows (B, H, L)."""
    return mask[:, None, :]


def remove(x: Tensor, mask: Tensor | None) -> Tensor:
    """Rows (B, H, L, .) that the mask ignores become 0, whatever they held."""
    return x if mask is None else x.masked_fill(rows(mask)[..., None], 0)


def effective_rho(rho: float, head_rho: Tensor | None, trailing: int) -> float | Tensor:
    return rho if head_rho is None else rho * head_rho[(..., *[None] * trailing)]


def like(grad: Tensor, x: Tensor) -> Tensor:
    """A gradient in the dtype and memory layout of the tensor it belongs to, as the op's schema promises."""
    return torch.empty_like(x).copy_(grad)

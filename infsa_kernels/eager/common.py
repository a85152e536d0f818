"""What the operators in torch operations share, and the dtype in which all backends sum."""

import torch
from torch import Tensor


def acc_dtype(q: Tensor) -> torch.dtype:
    """The dtype of sums and statistics: float32, or float64 for float64 input."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def scale(q: Tensor) -> float:
    return q.shape[-1] ** -0.5 if q.shape[-1] else 1.0


def rows(mask: Tensor) -> Tensor:
    """A (B, L) mask as one over the rows (B, H, L)."""
    return mask[:, None, :]


def remove(x: Tensor, mask: Tensor | None) -> Tensor:
    """Rows (B, H, L, .) that the mask ignores become 0, whatever they held."""
    return x if mask is None else x.masked_fill(rows(mask)[..., None], 0)


def unit(x: Tensor) -> Tensor:
    """The power of two that brings the rows (B, H, L, d) of a head to order one: (B, H, 1, 1), from 2^-60 to 2^60, so that two of
    them multiply within float32. Times it x has the same digits, and its squares and products stay in range.

    It is 1 where the largest element is from 2^-15 to 2^15: made smaller, those at the other end of the range would lose digits.
    """
    if x.numel() == 0:
        return x.new_ones(*x.shape[:2], 1, 1)
    largest = torch.linalg.vector_norm(x, torch.inf, (-2, -1), keepdim=True)
    scale = torch.nan_to_num(torch.frexp(largest).mantissa / largest, nan=1.0).clamp_(2.0**-60, 2.0**60)
    return scale.masked_fill_(torch.logical_and(scale >= 2.0**-15, scale <= 2.0**15), 1)


def direction(u: Tensor, norm: Tensor) -> Tensor:
    """u / norm, 0 where the norm is. Divided before anything is multiplied: of a row that is all but 0, 1 / norm overflows."""
    return u / torch.where(norm > 0, norm, 1)


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """x as mantissa / unit: dividing by the mantissa and multiplying by the unit later keeps what comes between in range."""
    mantissa = torch.frexp(x).mantissa
    return mantissa, torch.nan_to_num(mantissa / x, nan=1.0)


def finite(scale: Tensor) -> Tensor:
    """A scale above 0 that overflows would turn 0 into NaN."""
    return scale.clamp_max(torch.finfo(scale.dtype).max)


def effective_rho(rho: float, head_rho: Tensor | None, trailing: int) -> float | Tensor:
    return rho if head_rho is None else rho * head_rho[(..., *[None] * trailing)]

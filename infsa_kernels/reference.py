"""The two operators as the paper writes them, in plain torch: the only reference, for tests and for benchmarks.

Every function takes q (B, H, N, d), k (B, H, M, d), v (B, H, M, dv), or all three as (B*H, N, d), in any floating dtype, and
computes in that dtype: float64 is the truth, float32 and below are what plain eager code achieves. ``rho`` is a number or a
tensor that broadcasts over (B, H). A padding mask is (B, M) or (B, N), bool, True = ignore: that row counts as removed.

These functions materialise whatever the equations name (Pure: the N x M matrix), so they are no way to run large inputs.
"""

import torch
from torch import Tensor

__all__ = ["linear", "linear_scores", "pure", "pure_scores"]


def linear_scores(
    q: Tensor,
    k: Tensor,
    rho: float | Tensor = 1.0,
    eps: float = 1e-6,
    key_padding_mask: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
) -> Tensor:
    """rho a_j, the weight of every key: (..., M). Paper eqs 16-20."""
    u = _remove(q, query_padding_mask) * _scale(q)
    kappa = _remove(k, key_padding_mask) * _scale(k)
    energy = torch.linalg.vector_norm(u, dim=-1)
    weights = energy / (energy.sum(-1, keepdim=True) + eps)
    central_query = torch.einsum("...n,...nd->...d", weights, u)
    scores = torch.relu(torch.einsum("...d,...md->...m", central_query, kappa))
    if key_padding_mask is not None:
        scores = scores.masked_fill(_rows(key_padding_mask, k), 0)
    scores = scores / (scores.sum(-1, keepdim=True) + eps)
    return _per_head(rho, scores, 1) * scores


def linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rho: float | Tensor = 1.0,
    eps: float = 1e-6,
    key_padding_mask: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
) -> Tensor:
    """The pooled context z = rho sum_j a_j v_j of each head: (..., dv). Paper eq 21."""
    scores = linear_scores(q, k, rho, eps, key_padding_mask, query_padding_mask)
    return torch.einsum("...m,...md->...d", scores, _remove(v, key_padding_mask))


def pure_scores(
    q: Tensor,
    k: Tensor,
    rho: float | Tensor = 1.0,
    eps: float = 1e-6,
    key_padding_mask: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
) -> Tensor:
    """rho P / (||P||_F + eps) with P = ReLU((s q)(s k)^T): (..., N, M). Paper eqs 11-12."""
    u = _remove(q, query_padding_mask) * _scale(q)
    kappa = _remove(k, key_padding_mask) * _scale(k)
    scores = torch.relu(u @ kappa.mT)
    if key_padding_mask is not None:
        scores = scores.masked_fill(_rows(key_padding_mask, k).unsqueeze(-2), 0)
    if query_padding_mask is not None:
        scores = scores.masked_fill(_rows(query_padding_mask, q).unsqueeze(-1), 0)
    norm = torch.linalg.vector_norm(scores, dim=(-2, -1), keepdim=True)
    return _per_head(rho, scores, 2) * scores / (norm + eps)


def pure(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rho: float | Tensor = 1.0,
    eps: float = 1e-6,
    key_padding_mask: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
) -> Tensor:
    """O = rho P v / (||P||_F + eps): (..., N, dv)."""
    return pure_scores(q, k, rho, eps, key_padding_mask, query_padding_mask) @ _remove(v, key_padding_mask)


def _scale(x: Tensor) -> float:
    return x.shape[-1] ** -0.5 if x.shape[-1] else 1.0


def _rows(mask: Tensor, x: Tensor) -> Tensor:
    """A (B, L) mask as a mask over the rows (..., L) of x."""
    return mask.unsqueeze(1) if x.dim() == 4 else mask


def _remove(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x.masked_fill(_rows(mask, x).unsqueeze(-1), 0)


def _per_head(rho: float | Tensor, scores: Tensor, trailing: int) -> float | Tensor:
    return rho.to(scores.dtype)[(..., *[None] * trailing)] if isinstance(rho, Tensor) else rho

"""The two operators as the paper writes them, in plain torch: the only reference, for tests and for benchmarks.

Every function takes q (B, H, N, d), k (B, H, M, d), v (B, H, M, dv), or all three as (B*H, N, d), in any floating dtype, and
computes in that dtype: float64 is the truth, float32 and below are what plain eager code achieves. ``rho`` is a number or a
tensor that broadcasts over (B, H). A padding mask is (B, M) or (B, N), bool, True = ignore: that row counts as removed.

These functions materialise whatever the equations name (Pure: the N x M matrix), so they are no way to run large inputs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "ACTIVATIONS",
    "central_query",
    "linear",
    "linear_scores",
    "multi_hop",
    "pooled_linear",
    "pure",
    "pure_scores",
    "score_pool",
]

# phi, what becomes of the scores. The paper's is ReLU, the only one that kernels have; the others run as they stand here.
ACTIVATIONS = {"relu": torch.relu, "gelu": F.gelu, "abs": torch.abs, "softplus": F.softplus}


def linear_scores(
    q: Tensor,
    k: Tensor,
    rho: float | Tensor = 1.0,
    eps: float = 1e-6,
    key_padding_mask: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
    score_floor: float = 0.0,
    activation: str = "relu",
) -> Tensor:
    """rho a_j, the weight of every key: (..., M). Paper eqs 16-20.

    With a score_floor, every score that is not masked gains that share of the mean absolute score (docs/linear.md).
    """
    u = _remove(q, query_padding_mask) * _scale(q)
    kappa = _remove(k, key_padding_mask) * _scale(k)
    energy = torch.linalg.vector_norm(u, dim=-1)
    weights = energy / (energy.sum(-1, keepdim=True) + eps)
    central_query = torch.einsum("...n,...nd->...d", weights, u)
    products = torch.einsum("...d,...md->...m", central_query, kappa)
    ignored = None if key_padding_mask is None else _rows(key_padding_mask, k)
    weights = _weights(products, ignored, eps, score_floor, activation)
    return _per_head(rho, weights, 1) * weights


def linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rho: float | Tensor = 1.0,
    eps: float = 1e-6,
    key_padding_mask: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
    score_floor: float = 0.0,
    activation: str = "relu",
) -> Tensor:
    """The pooled context z = rho sum_j a_j v_j of each head: (..., dv). Paper eq 21."""
    scores = linear_scores(q, k, rho, eps, key_padding_mask, query_padding_mask, score_floor, activation)
    return torch.einsum("...m,...md->...d", scores, _remove(v, key_padding_mask))


def pure_scores(
    q: Tensor,
    k: Tensor,
    rho: float | Tensor = 1.0,
    eps: float = 1e-6,
    key_padding_mask: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
    activation: str = "relu",
) -> Tensor:
    """rho P / (||P||_F + eps) with P = phi((s q)(s k)^T), phi ReLU: (..., N, M). Paper eqs 11-12."""
    u = _remove(q, query_padding_mask) * _scale(q)
    kappa = _remove(k, key_padding_mask) * _scale(k)
    scores = ACTIVATIONS[activation](u @ kappa.mT)
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
    activation: str = "relu",
) -> Tensor:
    """O = rho P v / (||P||_F + eps): (..., N, dv). Rows of ignored queries are 0."""
    scores = pure_scores(q, k, rho, eps, key_padding_mask, query_padding_mask, activation)
    return _remove(scores @ _remove(v, key_padding_mask), query_padding_mask)


def multi_hop(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rho: float | Tensor = 1.0,
    eps: float = 1e-6,
    key_padding_mask: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
    hops: int | None = None,
) -> Tensor:
    """sum_{t=1..hops} (rho P / (||P||_F + eps))^t v, or with hops None of all t: (..., N, dv), for M = N. Paper eq 7."""
    scores = pure_scores(q, k, rho, eps, key_padding_mask, query_padding_mask)
    v = _remove(v, key_padding_mask)
    if hops is None:
        one = torch.eye(scores.shape[-1], dtype=scores.dtype, device=scores.device)
        return scores @ torch.linalg.solve(one - scores, v)
    out = scores @ v
    for _ in range(hops - 1):
        out = scores @ (v + out)
    return out


def _weights(
    products: Tensor, ignored: Tensor | None, eps: float, score_floor: float, activation: str = "relu"
) -> Tensor:
    """a_j = (phi(t_j) + score_floor T / M) / (sum_j |phi(t_j)| + score_floor T + eps), T = sum_j |t_j|, of products t (..., M):
    0 for the keys that are ignored, and M counts the others."""

    def kept(scores):
        return scores if ignored is None else scores.masked_fill(ignored, 0)

    scores = kept(ACTIVATIONS[activation](products))
    # Only GELU is negative anywhere: the plain code that kernels are timed beside has no pass more than it needs.
    norm = (scores.abs() if activation == "gelu" else scores).sum(-1, keepdim=True)
    if score_floor:
        count = products.shape[-1] if ignored is None else (~ignored).sum(-1, keepdim=True).clamp(min=1)
        floor = score_floor * kept(products.abs()).sum(-1, keepdim=True)
        scores, norm = kept(scores + floor / count), norm + floor
    return scores / (norm + eps)


def _scale(x: Tensor) -> float:
    return x.shape[-1] ** -0.5 if x.shape[-1] else 1.0


def _rows(mask: Tensor, x: Tensor) -> Tensor:
    """A (B, L) mask as a mask over the rows (..., L) of x."""
    return mask.unsqueeze(1) if x.dim() == 4 else mask


def _remove(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x.masked_fill(_rows(mask, x).unsqueeze(-1), 0)


def _per_head(rho: float | Tensor, scores: Tensor, trailing: int) -> float | Tensor:
    return rho.to(scores.dtype)[(..., *[None] * trailing)] if isinstance(rho, Tensor) else rho


def pooled_linear(
    x: Tensor,
    num_heads: int,
    q_weight: Tensor,
    v_weight: Tensor,
    out_weight: Tensor,
    *,
    q_bias: Tensor | None = None,
    k_weight: Tensor | None = None,
    k_bias: Tensor | None = None,
    v_bias: Tensor | None = None,
    out_bias: Tensor | None = None,
    rho: float | Tensor = 1.0,
    eps: float = 1e-6,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float | None = None,
    padding_mask: Tensor | None = None,
    score_floor: float = 0.0,
) -> Tensor:
    """Linear-InfSA self-attention as a layer, for x (B, N, D): LayerNorm, projections, :func:`linear`, output projection.

    Returns the row (B, D_out) that every token gets. ``k_weight`` None: keys are the queries. ``norm_eps`` None: no
    LayerNorm. A token that ``padding_mask`` (B, N) ignores is neither query nor key.
    """
    x = x if padding_mask is None else x.masked_fill(padding_mask[..., None], 0)
    if norm_eps is not None:
        x = torch.nn.functional.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, norm_eps)

    def heads(weight, bias):
        return torch.nn.functional.linear(x, weight, bias).unflatten(-1, (num_heads, -1)).transpose(1, 2)

    q, v = heads(q_weight, q_bias), heads(v_weight, v_bias)
    k = q if k_weight is None else heads(k_weight, k_bias)
    z = linear(q, k, v, rho, eps, padding_mask, padding_mask, score_floor)
    return torch.nn.functional.linear(z.flatten(1), out_weight, out_bias)


def central_query(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_eps: float | None = None,
    eps: float = 1e-6,
    padding_mask: Tensor | None = None,
) -> Tensor:
    """qbar of the queries W_h x_i + b_h: (B, H, d), for x (B, N, D), weight (H, d, D), bias (H, d). Paper eqs 16-18."""
    x = _normalise(x, norm_eps, padding_mask)
    q = torch.einsum("bnc,hdc->bhnd", x, weight)
    u = _remove((q if bias is None else q + bias[:, None]), padding_mask) * _scale(q)
    energy = torch.linalg.vector_norm(u, dim=-1)
    return torch.einsum("bhn,bhnd->bhd", energy / (energy.sum(-1, keepdim=True) + eps), u)


def score_pool(
    x: Tensor,
    keys: Tensor,
    key_bias: Tensor | None = None,
    norm_eps: float | None = None,
    eps: float = 1e-6,
    padding_mask: Tensor | None = None,
    score_floor: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The tokens x (B, N, D) pooled by r = ReLU(x . keys + key_bias): sum r x / (sum r + eps), (B, H, D), and the sum of
    these weights, (B, H). keys (B, H, D), key_bias (B, H). score_floor as in :func:`linear_scores`."""
    x = _normalise(x, norm_eps, padding_mask)
    scores = torch.einsum("bnc,bhc->bhn", x, keys)
    scores = scores if key_bias is None else scores + key_bias[..., None]
    weights = _weights(scores, None if padding_mask is None else padding_mask[:, None], eps, score_floor)
    return torch.einsum("bhn,bnc->bhc", weights, x), weights.sum(-1)


def _normalise(x: Tensor, norm_eps: float | None, padding_mask: Tensor | None) -> Tensor:
    """x to mean 0 and variance 1 per token, without an affine part, if norm_eps is given; ignored tokens 0."""
    x = x if padding_mask is None else x.masked_fill(padding_mask[..., None], 0)
    if norm_eps is None:
        return x
    x = (x - x.mean(-1, keepdim=True)) * (x.var(-1, correction=0, keepdim=True) + norm_eps).rsqrt()
    return x if padding_mask is None else x.masked_fill(padding_mask[..., None], 0)

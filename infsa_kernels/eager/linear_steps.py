"""Linear-InfSA's steps in torch operations (ops/linear_steps.py, docs/linear.md)."""

import torch
from torch import Tensor

from .common import acc_dtype, direction, remove, rows, scale, split, unit


def queries_fwd(q, query_padding_mask):
    u, u_unit = _in_units(q, query_padding_mask)
    energy = torch.linalg.vector_norm(u, dim=-1)  # (B, H, N)
    return _sums(energy, u) / torch.cat([(u_unit.square()).expand(*u.shape[:2], u.shape[3]), u_unit], -1)


def keys_fwd(k, v, central_query, key_padding_mask):
    kappa, k_unit = _in_units(k, key_padding_mask)
    query, query_unit = _query_in_unit(central_query)
    scores = _scores(kappa, query, key_padding_mask)
    return _sums(scores, remove(v, key_padding_mask).to(kappa.dtype)) / (query_unit * k_unit)


def keys_bwd(dcontext, k, v, context, central_query, score_sum, eps, key_padding_mask, output_mask):
    want_dk, want_dv, want_dcentral, want_dscores = output_mask
    kappa, k_unit = _in_units(k, key_padding_mask)
    query, query_unit = _query_in_unit(central_query)
    v_acc = remove(v, key_padding_mask).to(kappa.dtype)
    R, per_score = split((score_sum[..., None] + eps) * query_unit * k_unit)
    R = R.to(kappa.dtype)

    scores = _scores(kappa, query, key_padding_mask)  # (B, H, M)
    dk, dv, dcentral = k.new_empty(0), v.new_empty(0), score_sum.new_empty(0)
    if want_dv:
        weights = scores / R * _finite(per_score, kappa.dtype)
        dv = torch.empty_like(v).copy_(remove(weights[..., None] * dcontext[..., None, :], key_padding_mask))
    # dt in the units of u, kappa and R.
    dscores = ((v_acc @ dcontext[..., None]).squeeze(-1) - (dcontext * context).sum(-1, keepdim=True)) / R
    dscores = dscores.masked_fill(scores <= 0, 0)
    if want_dcentral:
        dcentral = (dscores[..., None, :] @ kappa).squeeze(-2).double() * (per_score * query_unit)
    if want_dk:
        s_k = _finite(scale(k) * per_score * k_unit, kappa.dtype)
        dk = torch.empty_like(k).copy_(remove((s_k * dscores)[..., None] * query[..., None, :], key_padding_mask))
    if not want_dscores:
        return dk, dv, dcentral, dcontext.new_empty(0), score_sum.new_empty(0)
    return dk, dv, dcentral, dscores, (per_score * query_unit * k_unit).squeeze(-1)


def queries_bwd(dcentral_query, dscores, dscores_unit, q, central_query, energy_sum, eps, query_padding_mask):
    u, u_unit = _in_units(q, query_padding_mask)
    acc, s = u.dtype, scale(q)
    query = (central_query * u_unit).to(acc)[..., None, :]
    E = ((energy_sum[..., None] + eps) * u_unit).to(acc)[..., None]
    dcentral_unit = unit(dcentral_query[..., None, :])[..., 0]
    dcentral = (dcentral_query * dcentral_unit).to(acc)[..., None, :]
    # qbar = sum_i e_i u_i / E,  e_i = ||u_i||
    energy = torch.linalg.vector_norm(u, dim=-1)[..., None]
    denergy = ((u - query) @ dcentral.mT) / E
    dq = (s / dcentral_unit).to(acc)[..., None] * (energy / E * dcentral + denergy * direction(u, energy))
    dq = remove(dq, query_padding_mask)
    if dscores is not None:
        per_score = (s * dscores_unit[..., None] * central_query).to(acc)
        dq = dq + dscores[..., None] * per_score[..., None, :]
    return torch.empty_like(q).copy_(dq)


def _in_units(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """s x in the accumulation dtype and in the unit of its head, ignored rows 0, and that unit (B, H, 1) in float64."""
    x = remove(x, mask).to(acc_dtype(x))
    x_unit = unit(x)
    return x * (scale(x) * x_unit), x_unit[..., 0].double()


def _query_in_unit(central_query: Tensor) -> tuple[Tensor, Tensor]:
    query_unit = unit(central_query[..., None, :])[..., 0]
    return central_query * query_unit, query_unit.double()


def _finite(x: Tensor, dtype: torch.dtype) -> Tensor:
    """In a dtype of less range: what is infinite there would make NaN of a head without a positive score, whose scores are 0."""
    return x.clamp(max=torch.finfo(dtype).max).to(dtype)


def _scores(kappa: Tensor, query: Tensor, key_padding_mask: Tensor | None) -> Tensor:
    scores = torch.relu(kappa @ query[..., None]).squeeze(-1)
    return scores if key_padding_mask is None else scores.masked_fill(rows(key_padding_mask), 0)


def _sums(weights: Tensor, x: Tensor) -> Tensor:
    """sum_i weights_i x_i, and of the weights: (B, H, d + 1), float64."""
    return torch.cat([(weights[..., None, :] @ x).squeeze(-2), weights.sum(-1, keepdim=True)], -1).double()

"""Linear-InfSA's steps in torch operations (ops/linear_steps.py, docs/linear.md)."""

import torch
from torch import Tensor

from .common import acc_dtype, direction, remove, rows, scale, split, unit


def queries_fwd(q, query_padding_mask):
    u, u_unit = _in_units(q, query_padding_mask)
    energy = torch.linalg.vector_norm(u, dim=-1)  # (B, H, N)
    return _sums(energy, u) / torch.cat([(u_unit.square()).expand(*u.shape[:2], u.shape[3]), u_unit], -1)


def keys_fwd(k, v, central_query, key_padding_mask):
    products, v, units = _products_and_values(k, v, central_query, key_padding_mask)
    return _sums(torch.relu(products), v) / units


def keys_floor_fwd(k, v, central_query, key_padding_mask):
    products, v, units = _products_and_values(k, v, central_query, key_padding_mask)
    values, absolute = v.sum(-2).double(), products.abs().sum(-1, keepdim=True).double() / units
    return torch.cat([_sums(torch.relu(products), v) / units, values, absolute], -1)


def keys_bwd(dcontext, k, v, context, central_query, score_sum, eps, key_padding_mask, output_mask):
    return _keys_bwd(dcontext, k, v, context, central_query, score_sum + eps, None, key_padding_mask, output_mask)


def keys_floor_bwd(
    dcontext, k, v, context, central_query, score_sum, absolute_sum, value_mean, key_count, eps, score_floor,
    key_padding_mask, output_mask,
):  # fmt: skip
    share = score_floor * absolute_sum
    norm = score_sum + share + eps
    # The floor's part of a key's weight, (B, H), and what times dcontext is R times the gradient of sum_j |t_j|.
    weight = (share / norm / key_count).to(dcontext.dtype)
    dabsolute = score_floor * (value_mean - context)
    floor = weight, dabsolute
    return _keys_bwd(dcontext, k, v, context, central_query, norm, floor, key_padding_mask, output_mask)


def _keys_bwd(dcontext, k, v, context, central_query, norm, floor, key_padding_mask, output_mask):
    """norm: the sum of the weights before they are divided by it, with eps, (B, H) float64."""
    want_dk, want_dv, want_dcentral, want_dscores = output_mask
    kappa, k_unit = _in_units(k, key_padding_mask)
    query, query_unit = _query_in_unit(central_query)
    v_acc = remove(v, key_padding_mask).to(kappa.dtype)
    R, per_score = split(norm[..., None] * query_unit * k_unit)
    R = R.to(kappa.dtype)
    dcontext_unit = unit(dcontext[..., None, :])[..., 0]
    # What takes the gradients of scores back from these units and R's.
    per_dscore = per_score / dcontext_unit

    products = _products(kappa, query, key_padding_mask)  # (B, H, M)
    dk, dv, dcentral = k.new_empty(0), v.new_empty(0), norm.new_empty(0)
    if want_dv:
        weights = torch.relu(products) / R * _finite(per_score, kappa.dtype)
        if floor is not None:
            weights = weights + floor[0][..., None]
        dv = torch.empty_like(v).copy_(remove(weights[..., None] * dcontext[..., None, :], key_padding_mask))
    # dt in the units of dcontext, whose products with values would vanish, of u, kappa and R.
    dcontext = dcontext * dcontext_unit
    dscores = ((v_acc @ dcontext[..., None]).squeeze(-1) - (dcontext * context).sum(-1, keepdim=True)) / R
    dscores = dscores.masked_fill(products <= 0, 0)
    if floor is not None:
        dscores = dscores + torch.sign(products) * ((dcontext * floor[1]).sum(-1, keepdim=True) / R)
    if want_dcentral:
        dcentral = (dscores[..., None, :] @ kappa).squeeze(-2).double() * (per_dscore * query_unit)
    if want_dk:
        s_k = _finite(scale(k) * per_dscore * k_unit, kappa.dtype)
        dk = torch.empty_like(k).copy_(remove((s_k * dscores)[..., None] * query[..., None, :], key_padding_mask))
    if not want_dscores:
        return dk, dv, dcentral, dcontext.new_empty(0), norm.new_empty(0)
    return dk, dv, dcentral, dscores, (per_dscore * query_unit * k_unit).squeeze(-1)


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


def _products_and_values(k, v, central_query, key_padding_mask) -> tuple[Tensor, Tensor, Tensor]:
    """t_j in the units of qbar and k, v, ignored rows 0, and these units, (B, H, 1)."""
    kappa, k_unit = _in_units(k, key_padding_mask)
    query, query_unit = _query_in_unit(central_query)
    products = _products(kappa, query, key_padding_mask)
    return products, remove(v, key_padding_mask).to(kappa.dtype), query_unit * k_unit


def _products(kappa: Tensor, query: Tensor, key_padding_mask: Tensor | None) -> Tensor:
    return _kept((kappa @ query[..., None]).squeeze(-1), key_padding_mask)


def _kept(x: Tensor, mask: Tensor | None) -> Tensor:
    """Of numbers (B, H, M) those of ignored rows become 0."""
    return x if mask is None else x.masked_fill(rows(mask), 0)


def _sums(weights: Tensor, x: Tensor) -> Tensor:
    """sum_i weights_i x_i, and of the weights: (B, H, d + 1), float64."""
    return torch.cat([(weights[..., None, :] @ x).squeeze(-2), weights.sum(-1, keepdim=True)], -1).double()

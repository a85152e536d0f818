"""Linear-InfSA with a floor under its scores in torch operations, after linear.py in this folder (docs/linear.md)."""

import torch
from torch import Tensor

from .common import effective_rho, finite, remove, rows, scale, split, unit
from .linear import central_query_of, inputs, query_gradient


def forward(q, k, v, eps, score_floor, rho, head_rho, key_padding_mask, query_padding_mask):
    u, kappa, u_unit, k_unit = inputs(q, k, key_padding_mask, query_padding_mask)
    v = remove(v, key_padding_mask).to(u.dtype)
    central_query, energy_sum = central_query_of(u, eps * u_unit)

    products = _products(kappa, central_query, key_padding_mask)  # (B, H, M)
    scores = torch.relu(products)
    score_sum, absolute_sum = scores.sum(-1), products.abs().sum(-1)
    # Divided first here and below: sums of values that cancel stay in range.
    value_mean = (v / _count(v, key_padding_mask)).sum(-2)  # (B, H, dv)
    floor = score_floor * absolute_sum
    norm = (score_sum + floor + eps * u_unit * k_unit)[..., None]
    pooled = ((scores / norm)[..., None, :] @ v).squeeze(-2) + floor[..., None] / norm * value_mean  # (B, H, dv)
    # Every weight is above 0: where a value is infinite so is the result, though its score be 0.
    infinite = value_mean.isinf() & ((floor > 0) & floor.isfinite())[..., None]
    context = torch.where(infinite, value_mean, pooled)
    out = (effective_rho(rho, head_rho, 1) * context).to(q.dtype)
    sums = (t / u_unit / k_unit for t in (score_sum, absolute_sum))
    return out, context, central_query / u_unit[..., None], energy_sum / u_unit, *sums, value_mean


def backward(
    dout, q, k, v, context, central_query, energy_sum, score_sum, absolute_sum, value_mean, eps, score_floor, rho, head_rho,
    key_padding_mask, query_padding_mask, gradients,
):  # fmt: skip
    u, kappa, u_unit, k_unit = inputs(q, k, key_padding_mask, query_padding_mask)
    v_acc = remove(v, key_padding_mask).to(u.dtype)
    dout = dout.to(u.dtype)  # (B, H, dv)
    central_query = central_query * u_unit[..., None]
    norm = score_sum + score_floor * absolute_sum + eps
    R, per_score = (t[..., None] for t in split(norm * u_unit * k_unit))
    dcontext = effective_rho(rho, head_rho, 1) * dout
    dcontext_unit = unit(dcontext[..., None, :])[..., 0]
    s = scale(q)
    s_u, s_k = (finite(s * per_score * x_unit[..., None] / dcontext_unit)[..., None] for x_unit in (u_unit, k_unit))
    dq, dk, dv, dhead_rho = gradients

    # z = rho sum_j a_j v_j,  a_j = (ReLU(t_j) + floor T / M) / R,  t_j = qbar . kappa_j,  T = sum_j |t_j|
    products = _products(kappa, central_query, key_padding_mask)
    if dv is not None:
        share = (score_floor * absolute_sum / norm)[..., None] / _count(v_acc, key_padding_mask)[..., 0]
        weights = torch.relu(products) / R * per_score + share
        dv.copy_(remove(weights[..., None] * dcontext[..., None, :], key_padding_mask))
    if dhead_rho is not None:
        dhead_rho.copy_(rho * (dout * context).sum(-1))
    if dq is not None or dk is not None:
        dcontext = dcontext * dcontext_unit
        dscores = ((v_acc @ dcontext[..., None]).squeeze(-1) - (dcontext * context).sum(-1, keepdim=True)) / R
        dabsolute = score_floor * (dcontext * (value_mean - context)).sum(-1, keepdim=True) / R
        dproducts = dscores.masked_fill(products <= 0, 0) + torch.sign(products) * dabsolute  # (B, H, M)
        dkappa = remove(s_k * dproducts[..., None] * central_query[..., None, :], key_padding_mask)
    if dk is not None:
        dk.copy_(dkappa)
    if dq is not None:
        dcentral = (dproducts[..., None, :] @ kappa).squeeze(-2)
        du = remove(s_u * query_gradient(dcentral, u, central_query, (energy_sum + eps) * u_unit), query_padding_mask)
        dq.copy_(du + dkappa if k is None else du)


def _products(kappa: Tensor, central_query: Tensor, key_padding_mask: Tensor | None) -> Tensor:
    products = (kappa @ central_query[..., None]).squeeze(-1)
    return products if key_padding_mask is None else products.masked_fill(rows(key_padding_mask), 0)


def _count(v: Tensor, key_padding_mask: Tensor | None) -> Tensor:
    """The keys that count, at least 1: (B or 1, 1, 1, 1)."""
    if key_padding_mask is None:
        return v.new_full((1, 1, 1, 1), max(1, v.shape[2]))
    return (~key_padding_mask).sum(-1).clamp(min=1)[:, None, None, None]

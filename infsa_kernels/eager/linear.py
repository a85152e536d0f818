"""Linear-InfSA in torch operations: forward with its statistics, and the gradients written out (docs/linear.md)."""

import torch
from torch import Tensor

from .common import acc_dtype, direction, effective_rho, finite, remove, rows, scale, split, unit


def forward(q, k, v, eps, rho, head_rho, key_padding_mask, query_padding_mask):
    u, kappa, u_unit, k_unit = inputs(q, k, key_padding_mask, query_padding_mask)
    v = remove(v, key_padding_mask).to(u.dtype)
    central_query, energy_sum = central_query_of(u, eps * u_unit)

    scores = _scores(kappa, central_query, key_padding_mask)  # (B, H, M)
    score_sum = scores.sum(-1)
    weights = scores / (score_sum + eps * u_unit * k_unit)[..., None]  # before they sum values, which may cancel
    context = (weights[..., None, :] @ v).squeeze(-2)  # (B, H, dv)
    out = (effective_rho(rho, head_rho, 1) * context).to(q.dtype)
    return out, context, central_query / u_unit[..., None], energy_sum / u_unit, score_sum / u_unit / k_unit


def backward(
    dout, q, k, v, context, central_query, energy_sum, score_sum, eps, rho, head_rho, key_padding_mask, query_padding_mask,
    gradients,
):  # fmt: skip
    u, kappa, u_unit, k_unit = inputs(q, k, key_padding_mask, query_padding_mask)
    v_acc = remove(v, key_padding_mask).to(u.dtype)
    dout = dout.to(u.dtype)  # (B, H, dv)
    central_query = central_query * u_unit[..., None]
    R, per_score = (t[..., None] for t in split((score_sum + eps) * u_unit * k_unit))
    dcontext = effective_rho(rho, head_rho, 1) * dout
    dcontext_unit = unit(dcontext[..., None, :])[..., 0]
    # What takes dq and dk back from these units and R's.
    s = scale(q)
    s_u, s_k = (finite(s * per_score * x_unit[..., None] / dcontext_unit)[..., None] for x_unit in (u_unit, k_unit))
    dq, dk, dv, dhead_rho = gradients

    # z = rho sum_j a_j v_j,  a_j = r_j / R,  r_j = ReLU(qbar . kappa_j)
    scores = _scores(kappa, central_query, key_padding_mask)
    if dv is not None:
        dv.copy_(remove((scores / R * per_score)[..., None] * dcontext[..., None, :], key_padding_mask))
    if dhead_rho is not None:
        dhead_rho.copy_(rho * (dout * context).sum(-1))
    if dq is not None or dk is not None:
        dcontext = dcontext * dcontext_unit
        dscores = ((v_acc @ dcontext[..., None]).squeeze(-1) - (dcontext * context).sum(-1, keepdim=True)) / R
        dscores = dscores.masked_fill(scores <= 0, 0)  # (B, H, M)
        dkappa = remove(s_k * dscores[..., None] * central_query[..., None, :], key_padding_mask)
    if dk is not None:
        dk.copy_(dkappa)
    if dq is not None:
        dcentral = (dscores[..., None, :] @ kappa).squeeze(-2)
        du = s_u * query_gradient(dcentral, u, central_query, (energy_sum + eps) * u_unit)
        du = remove(du, query_padding_mask)
        dq.copy_(du + dkappa if k is None else du)


def central_query_of(u: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    """qbar = sum_i e_i u_i / (sum_i e_i + eps) with e_i = ||u_i||, (B, H, d), and sum_i e_i, (B, H)."""
    energy = torch.linalg.vector_norm(u, dim=-1)  # (B, H, N)
    energy_sum = energy.sum(-1)
    weights = energy / (energy_sum + eps)[..., None]
    return (weights[..., None, :] @ u).squeeze(-2), energy_sum


def query_gradient(dcentral: Tensor, u: Tensor, central_query: Tensor, E: Tensor) -> Tensor:
    """du of qbar = sum_i e_i u_i / E, e_i = ||u_i||: (B, H, N, d)."""
    E = E[..., None]
    energy = torch.linalg.vector_norm(u, dim=-1)
    denergy = ((u - central_query[..., None, :]) @ dcentral[..., None]).squeeze(-1) / E
    return (energy / E)[..., None] * dcentral[..., None, :] + denergy[..., None] * direction(u, energy[..., None])


def inputs(q, k, key_padding_mask, query_padding_mask) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """u = s q and kappa = s k in the accumulation dtype, ignored rows 0, both in the units of their heads, (B, H), given."""
    s, acc = scale(q), acc_dtype(q)
    u = remove(q, query_padding_mask).to(acc)
    kappa = remove(q if k is None else k, key_padding_mask).to(acc)
    u_unit, k_unit = unit(u), unit(kappa)
    return u * (s * u_unit), kappa * (s * k_unit), u_unit[..., 0, 0], k_unit[..., 0, 0]


def _scores(kappa: Tensor, central_query: Tensor, key_padding_mask: Tensor | None) -> Tensor:
    scores = torch.relu(kappa @ central_query[..., None]).squeeze(-1)
    return scores if key_padding_mask is None else scores.masked_fill(rows(key_padding_mask), 0)

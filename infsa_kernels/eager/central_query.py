"""Projected queries and their central query in torch operations, a block of tokens at a time (docs/pooled_linear.md)."""

import torch
from torch import Tensor

from ..ops.check import acc_dtype
from .common import like
from .tokens import Block, blocks


def forward(x, weight, bias, norm_eps, eps, padding_mask):
    B, _, D = x.shape
    H, d, _ = weight.shape
    acc = acc_dtype(x)
    weighted, energy_sum = x.new_zeros(B, H, d, dtype=acc), x.new_zeros(B, H, dtype=acc)
    for _, block in blocks(x, max(D, H * d), norm_eps, padding_mask):
        u, energy = _queries(block, x.dtype, weight, bias)
        weighted += torch.einsum("bth,bthc->bhc", energy, u)
        energy_sum += energy.sum(1)
    return weighted / (energy_sum + eps)[..., None], energy_sum


def backward(dcentral_query, x, weight, bias, central_query, energy_sum, norm_eps, eps, padding_mask, output_mask):
    B, _, D = x.shape
    H, d, _ = weight.shape
    acc = acc_dtype(x)
    want_x, want_weight, want_bias = output_mask
    want_bias = want_bias and bias is not None
    s = d**-0.5 if d else 1.0
    scaled = dcentral_query * (s / (energy_sum + eps))[..., None]  # (B, H, d)
    offset = (scaled * central_query).sum(-1)[:, None]  # (B, 1, H)
    dx = torch.empty_like(x) if want_x else x.new_empty(0)
    dweight = x.new_zeros(H * d, D, dtype=acc)
    dbias = x.new_zeros(H, d, dtype=acc)
    for tokens, block in blocks(x, max(D, H * d), norm_eps, padding_mask) if any(output_mask) else ():
        u, energy = _queries(block, x.dtype, weight, bias)
        # qbar = sum_i e_i u_i / E,  e_i = ||u_i||
        denergy = torch.einsum("bthc,bhc->bth", u, scaled) - offset
        direction = torch.where(energy > 0, denergy / energy, 0)
        dq = energy[..., None] * scaled[:, None] + direction[..., None] * u  # (B, T, H, d)
        dq = block.weights(dq.flatten(2))
        low = dq.to(x.dtype)
        if want_x:
            dx[:, tokens] = block.input_gradient((low @ weight.flatten(0, 1)).to(acc))
        if want_weight:
            dweight += (low.flatten(0, 1).mT @ block.rows.to(x.dtype).flatten(0, 1)).to(acc)
        if want_bias:
            dbias += dq.sum((0, 1)).view(H, d)
    return (
        dx,
        like(dweight.view(H, d, D), weight) if want_weight else x.new_empty(0),
        like(dbias, bias) if want_bias else x.new_empty(0, dtype=acc),
    )


def _queries(block: Block, dtype: torch.dtype, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """u = s (x W^T + b), (B, T, H, d), and e = ||u||, (B, T, H), 0 for removed tokens. The product is in the dtype of x."""
    H, d, _ = weight.shape
    q = (block.rows.to(dtype) @ weight.flatten(0, 1).mT).to(block.rows.dtype).unflatten(-1, (H, d))
    u = (q if bias is None else q + bias) * (d**-0.5 if d else 1.0)
    return u, block.weights(torch.linalg.vector_norm(u, dim=-1))

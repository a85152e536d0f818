"""Projected queries and their central query in torch operations, a block of tokens at a time (docs/pooled_linear.md)."""

import torch
from torch import Tensor

from .common import acc_dtype, direction
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


def backward(dcentral_query, x, weight, bias, central_query, energy_sum, norm_eps, eps, padding_mask, gradients):
    B, _, D = x.shape
    H, d, _ = weight.shape
    acc = acc_dtype(x)
    dx, dweight, dbias = gradients
    s = d**-0.5 if d else 1.0
    scaled = dcentral_query * (s / (energy_sum + eps))[..., None]  # (B, H, d)
    offset = (scaled * central_query).sum(-1)[:, None]  # (B, 1, H)
    weight_sum, bias_sum = x.new_zeros(H * d, D, dtype=acc), x.new_zeros(H, d, dtype=acc)
    for tokens, block in blocks(x, max(D, H * d), norm_eps, padding_mask):
        u, energy = _queries(block, x.dtype, weight, bias)
        # qbar = sum_i e_i u_i / E,  e_i = ||u_i||
        denergy = torch.einsum("bthc,bhc->bth", u, scaled) - offset
        dq = energy[..., None] * scaled[:, None] + denergy[..., None] * direction(u, energy[..., None])  # (B, T, H, d)
        dq = block.weights(dq.flatten(2))
        low = dq.to(x.dtype)
        if dx is not None:
            dx[:, tokens] = block.input_gradient((low @ weight.flatten(0, 1)).to(acc))
        if dweight is not None:
            weight_sum += (low.flatten(0, 1).mT @ block.rows.to(x.dtype).flatten(0, 1)).to(acc)
        if dbias is not None:
            bias_sum += dq.sum((0, 1)).view(H, d)
    if dweight is not None:
        dweight.copy_(weight_sum.view(H, d, D))
    if dbias is not None:
        dbias.copy_(bias_sum)


def _queries(block: Block, dtype: torch.dtype, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """u = s (x W^T + b), (B, T, H, d), and e = ||u||, (B, T, H), 0 for removed tokens. The product is in the dtype of x."""
    H, d, _ = weight.shape
    q = (block.rows.to(dtype) @ weight.flatten(0, 1).mT).to(block.rows.dtype).unflatten(-1, (H, d))
    u = (q if bias is None else q + bias) * (d**-0.5 if d else 1.0)
    return u, block.weights(torch.linalg.vector_norm(u, dim=-1))

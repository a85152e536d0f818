"""Tokens pooled by ReLU scores with a floor, after score_pool.py in this folder (docs/pooled_linear.md)."""

import torch
from torch import Tensor

from .common import acc_dtype
from .tokens import Block, blocks


def forward(x, keys, key_bias, norm_eps, eps, score_floor, padding_mask):
    acc = acc_dtype(x)
    weighted, token_sum = keys.new_zeros(keys.shape), x.new_zeros(x.shape[0], x.shape[2], dtype=acc)
    score_sum, absolute_sum = (keys.new_zeros(keys.shape[:2], dtype=acc) for _ in range(2))
    for _, block in blocks(x, max(keys.shape[1:]), norm_eps, padding_mask):
        products = _products(block, keys, key_bias)
        scores = torch.relu(products)
        weighted += scores.mT @ block.rows
        score_sum += scores.sum(1)
        absolute_sum += products.abs().sum(1)
        token_sum += block.rows.sum(1)
    token_mean = token_sum / _count(x, padding_mask)
    floor = score_floor * absolute_sum
    norm = score_sum + floor + eps
    pooled = (weighted + floor[..., None] * token_mean[:, None]) / norm[..., None]
    return pooled, (score_sum + floor) / norm, score_sum, absolute_sum, token_mean


def backward(
    dpooled, dmass, x, keys, key_bias, pooled, score_sum, absolute_sum, token_mean, norm_eps, eps, score_floor, padding_mask,
    gradients,
):  # fmt: skip
    dx, dkeys, dkey_bias = gradients
    norm = score_sum + score_floor * absolute_sum + eps
    dpooled = dpooled / norm[..., None]  # (B, H, D)
    # p = sum_j (r_j + c) x_j / norm and mass = 1 - eps / norm: what a score's gradient owes to the norm, and to c.
    of_mass = dmass * eps / norm.square()
    offset = ((dpooled * pooled).sum(-1) - of_mass)[:, None]  # (B, 1, H)
    dabsolute = score_floor * ((dpooled * (token_mean[:, None] - pooled)).sum(-1) + of_mass)[:, None]
    floor = (score_floor * absolute_sum / _count(x, padding_mask))[:, None]
    keys_sum, bias_sum = keys.new_zeros(keys.shape), keys.new_zeros(keys.shape[:2])
    for tokens, block in blocks(x, max(keys.shape[1:]), norm_eps, padding_mask):
        products = _products(block, keys, key_bias)  # (B, T, H)
        dproducts = (block.rows @ dpooled.mT - offset).masked_fill(products <= 0, 0) + torch.sign(products) * dabsolute
        dproducts = block.weights(dproducts)
        if dx is not None:
            weights = block.weights(torch.relu(products) + floor)
            dx[:, tokens] = block.input_gradient(weights @ dpooled + dproducts @ keys)
        if dkeys is not None:
            keys_sum += dproducts.mT @ block.rows
        if dkey_bias is not None:
            bias_sum += dproducts.sum(1)
    if dkeys is not None:
        dkeys.copy_(keys_sum)
    if dkey_bias is not None:
        dkey_bias.copy_(bias_sum)


def _products(block: Block, keys: Tensor, key_bias: Tensor | None) -> Tensor:
    """t = x . keys + key_bias, (B, T, H), 0 for removed tokens."""
    products = block.rows @ keys.mT
    return block.weights(products if key_bias is None else products + key_bias[:, None])


def _count(x: Tensor, padding_mask: Tensor | None) -> Tensor | int:
    """The tokens that count, at least 1: a number, or (B, 1)."""
    if padding_mask is None:
        return max(1, x.shape[1])
    return (~padding_mask).sum(-1, keepdim=True).clamp(min=1)

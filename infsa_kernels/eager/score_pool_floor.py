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
    return results(weighted, score_sum, absolute_sum, token_sum, eps, score_floor, token_count(x, padding_mask))


def backward(
    dpooled, dmass, x, keys, key_bias, pooled, score_sum, absolute_sum, token_mean, norm_eps, eps, score_floor, padding_mask,
    gradients,
):  # fmt: skip
    dx, dkeys, dkey_bias = gradients
    dpooled, offset, floor, dabsolute = gradient_of_sums(
        dpooled, dmass, pooled, score_sum, absolute_sum, token_mean, eps, score_floor, token_count(x, padding_mask)
    )
    keys_sum, bias_sum = keys.new_zeros(keys.shape), keys.new_zeros(keys.shape[:2])
    for tokens, block in blocks(x, max(keys.shape[1:]), norm_eps, padding_mask):
        products = _products(block, keys, key_bias)  # (B, T, H)
        dproducts = (block.rows @ dpooled.mT - offset[:, None]).masked_fill(products <= 0, 0)
        dproducts = block.weights(dproducts + torch.sign(products) * dabsolute[:, None])
        if dx is not None:
            weights = block.weights(torch.relu(products) + floor[:, None])
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


def results(weighted, score_sum, absolute_sum, token_sum, eps, score_floor, count) -> tuple[Tensor, ...]:
    """What forward returns, of sums over tokens."""
    token_mean = token_sum / count
    floor = score_floor * absolute_sum
    norm = score_sum + floor + eps
    pooled = (weighted + floor[..., None] * token_mean[:, None]) / norm[..., None]
    return pooled, (score_sum + floor) / norm, score_sum, absolute_sum, token_mean


def gradient_of_sums(
    dpooled, dmass, pooled, score_sum, absolute_sum, token_mean, eps, score_floor, count
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradient of sum_j (r_j + c) x_j (B, H, D), what that of every score owes to the norm, c, and the gradient of |t_j|:
    (B, H) each."""
    # p = sum_j (r_j + c) x_j / norm and mass = 1 - eps / norm
    norm = score_sum + score_floor * absolute_sum + eps
    dpooled = dpooled / norm[..., None]
    of_mass = dmass * eps / norm.square()
    offset = (dpooled * pooled).sum(-1) - of_mass
    dabsolute = score_floor * ((dpooled * (token_mean[:, None] - pooled)).sum(-1) + of_mass)
    return dpooled, offset, score_floor * absolute_sum / count, dabsolute


def token_count(x: Tensor, padding_mask: Tensor | None) -> Tensor | int:
    """The tokens that count, at least 1: a number, or (B, 1)."""
    if padding_mask is None:
        return max(1, x.shape[1])
    return (~padding_mask).sum(-1, keepdim=True).clamp(min=1)

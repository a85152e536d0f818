"""ReLU scores against keys of width D and the tokens pooled by them, a block of tokens at a time (docs/pooled_linear.md)."""

import torch
from torch import Tensor

from .common import acc_dtype
from .tokens import Block, blocks


def forward(x, keys, key_bias, norm_eps, eps, padding_mask):
    acc = acc_dtype(x)
    weighted, score_sum = keys.new_zeros(keys.shape), keys.new_zeros(keys.shape[:2], dtype=acc)
    for _, block in blocks(x, max(keys.shape[1:]), norm_eps, padding_mask):
        scores = _scores(block, keys, key_bias)
        weighted += scores.mT @ block.rows
        score_sum += scores.sum(1)
    R = score_sum + eps
    return weighted / R[..., None], score_sum / R, score_sum


def backward(dpooled, dmass, x, keys, key_bias, pooled, score_sum, norm_eps, eps, padding_mask, gradients):
    dx, dkeys, dkey_bias = gradients
    dpooled, offset = gradient_of_sums(dpooled, dmass, pooled, score_sum, eps)
    keys_sum, bias_sum = keys.new_zeros(keys.shape), keys.new_zeros(keys.shape[:2])
    for tokens, block in blocks(x, max(keys.shape[1:]), norm_eps, padding_mask):
        scores = _scores(block, keys, key_bias)  # (B, T, H)
        dscores = (block.rows @ dpooled.mT - offset[:, None]).masked_fill(scores <= 0, 0)
        if dx is not None:
            dx[:, tokens] = block.input_gradient(scores @ dpooled + dscores @ keys)
        if dkeys is not None:
            keys_sum += dscores.mT @ block.rows
        if dkey_bias is not None:
            bias_sum += dscores.sum(1)
    if dkeys is not None:
        dkeys.copy_(keys_sum)
    if dkey_bias is not None:
        dkey_bias.copy_(bias_sum)


def gradient_of_sums(dpooled, dmass, pooled, score_sum, eps) -> tuple[Tensor, Tensor]:
    """The gradient of sum_j r_j x_j (B, H, D), and what that of every score owes to R (B, H)."""
    # p = sum_j r_j x_j / R and mass = 1 - eps / R
    R = score_sum + eps
    dpooled = dpooled / R[..., None]
    return dpooled, (dpooled * pooled).sum(-1) - dmass * eps / R.square()


def _scores(block: Block, keys: Tensor, key_bias: Tensor | None) -> Tensor:
    """r = ReLU(x . keys + key_bias), (B, T, H), 0 for removed tokens."""
    scores = block.rows @ keys.mT
    return block.weights(torch.relu(scores if key_bias is None else scores + key_bias[:, None]))

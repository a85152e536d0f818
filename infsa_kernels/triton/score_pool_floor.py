"""`score_pool_floor` in Triton: the kernels of score_pool.py, with what the floor adds (docs/pooled_linear.md)."""

from ..eager import score_pool_floor as eager
from . import score_pool


def forward(x, keys, key_bias, norm_eps, eps, score_floor, padding_mask):
    if 0 in (*x.shape, *keys.shape):
        return eager.forward(x, keys, key_bias, norm_eps, eps, score_floor, padding_mask)
    sums = score_pool.sums(x, keys, key_bias, norm_eps, padding_mask, True)
    return eager.results(*sums, eps, score_floor, eager.token_count(x, padding_mask))


def backward(
    dpooled, dmass, x, keys, key_bias, pooled, score_sum, absolute_sum, token_mean, norm_eps, eps, score_floor, padding_mask,
    gradients,
):  # fmt: skip
    saved = pooled, score_sum, absolute_sum, token_mean
    if 0 in (*x.shape, *keys.shape):
        return eager.backward(
            dpooled, dmass, x, keys, key_bias, *saved, norm_eps, eps, score_floor, padding_mask, gradients
        )
    of_sums = eager.gradient_of_sums(dpooled, dmass, *saved, eps, score_floor, eager.token_count(x, padding_mask))
    score_pool.fill(gradients, *of_sums, x, keys, key_bias, norm_eps, padding_mask)

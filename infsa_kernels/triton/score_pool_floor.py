"""`score_pool_floor` in Triton: the kernels of score_pool.py, with what the floor adds (docs/pooled_linear.md)."""

from ..eager import score_pool_floor as eager
from . import score_pool
from .launch import planned


@planned
def forward(x, keys, key_bias, norm_eps, eps, score_floor, padding_mask):
    if 0 in (*x.shape, *keys.shape):
        return eager.forward
    sums = score_pool.plan_sums(x, keys, key_bias, norm_eps, padding_mask, True)

    def run(x, keys, key_bias, norm_eps, eps, score_floor, padding_mask):
        found = sums(x, keys, key_bias, padding_mask)
        return eager.results(*found, eps, score_floor, eager.token_count(x, padding_mask))

    return run


@planned
def backward(
    dpooled, dmass, x, keys, key_bias, pooled, score_sum, absolute_sum, token_mean, norm_eps, eps, score_floor, padding_mask,
    gradients,
):  # fmt: skip
    if 0 in (*x.shape, *keys.shape):
        return eager.backward
    fill = score_pool.plan_gradients(gradients, x, keys, norm_eps, padding_mask)

    def run(dpooled, dmass, x, keys, key_bias, *saved_and_numbers):
        *saved, _, eps, score_floor, padding_mask, gradients = saved_and_numbers
        count = eager.token_count(x, padding_mask)
        of_sums = eager.gradient_of_sums(dpooled, dmass, *saved, eps, score_floor, count)
        fill(gradients, *of_sums, x, keys, key_bias, padding_mask)

    return run

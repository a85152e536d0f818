"""`infsa::score_pool_fwd`: ReLU scores of tokens against one key of width D per head, and the tokens pooled by them.

    r_j = ReLU(x^_j . key_h + key_bias_h),  R = sum_j r_j,  pooled_h = sum_j r_j x^_j / (R + eps),  mass_h = R / (R + eps)

with x^ the tokens (B, N, D), or these normalised to mean 0 and variance 1, without an affine part, where norm_eps is given.
Half of the pooled layer (pooled_linear.py); the gradients, what is saved and why: docs/pooled_linear.md.
"""

import torch

from .. import reference
from ..eager import score_pool as eager
from . import check
from .autograd import RawOps
from .check_tokens import score_pool_arguments

OP = "infsa::score_pool"


def _fake_forward(x, keys, key_bias, norm_eps, eps, padding_mask):
    score_pool_arguments(OP, x, keys, key_bias, norm_eps, eps, padding_mask)
    pooled = torch.empty_like(keys, memory_format=torch.contiguous_format)
    return pooled, keys.new_empty(keys.shape[:2]), keys.new_empty(keys.shape[:2])


def _check_backward(dpooled, dmass, x, keys, key_bias, pooled, score_sum, norm_eps, eps, padding_mask):
    score_pool_arguments(OP, x, keys, key_bias, norm_eps, eps, padding_mask)
    for name, t in (("dpooled", dpooled), ("pooled", pooled)):
        check.statistic(OP, name, t, x, keys.shape, "(B, H, D)", "x")
    for name, t in (("dmass", dmass), ("score_sum", score_sum)):
        check.statistic(OP, name, t, x, keys.shape[:2], "(B, H)", "x")


def _fake_backward(*args):
    _check_backward(*args[:-1])
    _, _, x, keys, key_bias, *_, output_mask = args
    return (
        torch.empty_like(x) if output_mask[0] else x.new_empty(0),
        torch.empty_like(keys) if output_mask[1] else keys.new_empty(0),
        torch.empty_like(key_bias) if output_mask[2] and key_bias is not None else keys.new_empty(0),
    )


def _formula(x, keys, key_bias, norm_eps, eps, padding_mask):
    return reference.score_pool(x.to(check.acc_dtype(x)), keys, key_bias, norm_eps, eps, padding_mask)


def _flops(products):
    return lambda x, keys, key_bias: 2 * products * x[0] * x[1] * keys[1] * keys[2]


def _eager_forward(*args):
    score_pool_arguments(OP, *args)
    return eager.forward(*args)


def _eager_backward(*args):
    _check_backward(*args[:-1])
    return eager.backward(*args)


raw = RawOps(
    "score_pool",
    tensors="Tensor x, Tensor keys, Tensor? key_bias",
    rest="float? norm_eps, float eps, Tensor? padding_mask",
    dims={
        "x": "BND", "keys": "BHD", "key_bias": "BH", "padding_mask": "BN", "pooled": "BHD", "mass": "BH", "score_sum": "BH"
    },
    wrt=["x", "keys", "key_bias"],
    outputs=["pooled", "mass", "score_sum"],
    differentiable=2,
    saved=["pooled", "score_sum"],
    formula=_formula,
    fake_forward=_fake_forward,
    fake_backward=_fake_backward,
    flops_forward=_flops(2),
    flops_backward=_flops(5),
)  # fmt: skip
raw.implement("eager", "CompositeExplicitAutograd", _eager_forward, _eager_backward)

"""`infsa::score_pool_fwd`: ReLU scores of tokens against one key of width D per head, and the tokens pooled by them.

    r_j = ReLU(x^_j . key_h + key_bias_h),  R = sum_j r_j,  pooled_h = sum_j r_j x^_j / (R + eps),  mass_h = R / (R + eps)

with x^ the tokens (B, N, D), or these normalised to mean 0 and variance 1, without an affine part, where norm_eps is given.
Half of the pooled layer (pooled_linear.py); the gradients, what is saved and why: docs/pooled_linear.md.
"""

from .. import reference
from ..eager import score_pool as eager
from ..eager.common import acc_dtype
from . import backends
from .register import RawOps


def _formula(x, keys, key_bias, norm_eps, eps, padding_mask):
    return reference.score_pool(x.to(acc_dtype(x)), keys, key_bias, norm_eps, eps, padding_mask)


raw = RawOps(
    forward="score_pool_fwd(Tensor x, Tensor keys, Tensor? key_bias, float? norm_eps, float eps, Tensor? padding_mask) -> "
    "(Tensor pooled, Tensor mass, Tensor score_sum)",
    backward="score_pool_bwd(Tensor dpooled, Tensor dmass, Tensor x, Tensor keys, Tensor? key_bias, Tensor pooled, "
    "Tensor score_sum, float? norm_eps, float eps, Tensor? padding_mask, bool[3] output_mask) -> "
    "(Tensor dx, Tensor dkeys, Tensor dkey_bias)",
    tensors={
        "x": "(B, N, D)",
        "keys": "(B, H, D) acc",
        "key_bias": "(B, H) acc",
        "padding_mask": "(B, N) bool",
        "pooled": "(B, H, D) acc",
        "mass": "(B, H) acc",
        "score_sum": "(B, H) acc",
    },
    kernels={"cpu": "csrc/cpu/score_pool.cpp", "triton": ".triton.score_pool", "eager": eager},
    formula=_formula,
    flops_forward=lambda B, N, D, H: 4 * B * N * D * H,
    flops_backward=lambda B, N, D, H: 10 * B * N * D * H,
)
backends.OPERATORS[raw.name] = frozenset(raw.kernels)

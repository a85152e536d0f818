"""`infsa::score_pool_floor_fwd`: score_pool.py with a floor under the scores, what `infsa::pooled_linear` runs where score_floor
is above 0.

    t_j = x^_j . key_h + key_bias_h,  R = sum_j ReLU(t_j),  T = sum_j |t_j|,  c = score_floor T / N,  D = R + score_floor T + eps
    pooled_h = sum_j (ReLU(t_j) + c) x^_j / D,  mass_h = (R + score_floor T) / D

over the N tokens that the mask leaves. Beside score_pool's statistics it returns T and the mean token, one for all heads.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .. import reference
from ..eager import score_pool_floor as eager
from ..eager.common import acc_dtype
from . import backends, linear_steps
from .register import RawOps


def _formula(x, keys, key_bias, norm_eps, eps, score_floor, padding_mask):
    return reference.score_pool(x.to(acc_dtype(x)), keys, key_bias, norm_eps, eps, padding_mask, score_floor)


raw = RawOps(
    forward="score_pool_floor_fwd(Tensor x, Tensor keys, Tensor? key_bias, float? norm_eps, float eps, float score_floor, "
    "Tensor? padding_mask) -> "
    "(Tensor pooled, Tensor mass, Tensor score_sum, Tensor absolute_sum, Tensor token_mean)",
    backward="score_pool_floor_bwd(Tensor dpooled, Tensor dmass, Tensor x, Tensor keys, Tensor? key_bias, Tensor pooled, "
    "Tensor score_sum, Tensor absolute_sum, Tensor token_mean, float? norm_eps, float eps, float score_floor, "
    "Tensor? padding_mask, bool[3] output_mask) -> (Tensor dx, Tensor dkeys, Tensor dkey_bias)",
    tensors={
        "x": "(B, N, D)",
        "keys": "(B, H, D) acc",
        "key_bias": "(B, H) acc",
        "padding_mask": "(B, N) bool",
        "pooled": "(B, H, D) acc",
        "mass": "(B, H) acc",
        "score_sum": "(B, H) acc",
        "absolute_sum": "(B, H) acc",
        "token_mean": "(B, D) acc",
    },
    kernels={"cpu": "csrc/cpu/score_pool.cpp", "triton": ".triton.score_pool_floor", "eager": eager},
    formula=_formula,
    flops_forward=lambda B, N, D, H: 4 * B * N * D * H + B * N * D,
    flops_backward=lambda B, N, D, H: 10 * B * N * D * H,
)
backends.OPERATORS[raw.name] = frozenset(raw.kernels)


def sums_of_part(
    forward: Callable, x: Tensor, keys: Tensor, key_bias: Tensor | None, norm_eps: float | None, eps: float,
    padding_mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Where x has a part of the tokens: what it gives to the sums that linear_steps.floored_mean takes, (B, H, 2 D + 3) float64.

    ``forward`` is that of a backend. The floor is made of what all parts sum, so it gets none.
    """
    pooled, _, scores, absolute, token_mean = forward(x, keys, key_bias, norm_eps, eps, 0.0, padding_mask)
    count = linear_steps.key_count(x[:, None].expand(-1, keys.shape[1], -1, -1), padding_mask)
    weighted = pooled * (scores[..., None].double() + eps)
    return torch.cat([weighted, scores[..., None], token_mean[:, None] * count, absolute[..., None], count], -1)

"""Linear-InfSA's steps (ops/linear_steps.py) by the kernels of linear.py: each launch is one step already.

Where a kernel finishes what another has begun, it is given the whole as the one part of it.
"""

import torch
import triton

from ..eager import linear_steps as eager
from ..eager.common import scale
from . import configs, first_use
from .launch import Launch, countable, padded, strides
from .linear import linear_fwd_keys_kernel, linear_fwd_queries_kernel
from .linear_backward import linear_bwd_keys_kernel, linear_bwd_queries_kernel
from .tokens import key_counts

# Steps are not packed: this stands for offsets, and for how many sequences there are.
NOT_PACKED = None


def queries_fwd(q, query_padding_mask):
    if not _trusted("forward", q, q, query_padding_mask):
        return eager.queries_fwd(q, query_padding_mask)
    (B, H, N, d), grid = q.shape, _Grid(q, q, "forward")
    splits, split_tokens = grid.splits
    central, energy = (q.new_empty(B, H, splits, size, dtype=torch.float32) for size in (d, 1))
    sum_queries = Launch(
        linear_fwd_queries_kernel, grid.groups * splits, q.device,
        q.stride(), strides(query_padding_mask, 2), H, N, splits, split_tokens, NOT_PACKED, **grid.sizes,
    )  # fmt: skip
    sum_queries(q, query_padding_mask, NOT_PACKED, central, energy, grid.tickets())
    s = scale(q)
    return torch.cat([central.sum(2, dtype=torch.float64) * s * s, energy.sum(2, dtype=torch.float64) * s], -1)


def keys_fwd(k, v, central_query, key_padding_mask):
    if not _trusted("forward", k, v, key_padding_mask):
        return eager.keys_fwd(k, v, central_query, key_padding_mask)
    return _keys_fwd(k, v, central_query, key_padding_mask, False)


def keys_floor_fwd(k, v, central_query, key_padding_mask):
    if not _trusted("forward", k, v, key_padding_mask, floored=True):
        return eager.keys_floor_fwd(k, v, central_query, key_padding_mask)
    return _keys_fwd(k, v, central_query, key_padding_mask, True)


def _keys_fwd(k, v, central_query, key_padding_mask, floored):
    (B, H, M, d), dv, grid = k.shape, v.shape[3], _Grid(k, v, "forward", floored)
    splits, split_tokens = grid.splits
    eps, s = 1e-6, scale(k)
    # The kernel makes qbar s^2 / (s sum e + eps) of sums: these give qbar.
    energy = k.new_full((B, H, 1), (1 - eps) / s, dtype=torch.float32)
    central = central_query.contiguous() / (s * s)
    out, context, central_out, energy_out, score_sum, context_parts, score_parts = (
        k.new_empty(B, H, size, dtype=torch.float32) for size in (dv, dv, d, 1, 1, splits * dv, splits)
    )
    # What is made of the sums, with these numbers too, goes unread: nobody knows all keys here.
    floor, counts = (0.0, key_counts(0.0, key_padding_mask)) if floored else (None, None)
    of_floor = [
        k.new_empty(B, H, size, dtype=torch.float32) if floored else None for size in (1, dv, splits, splits * dv)
    ]
    sum_keys = Launch(
        linear_fwd_keys_kernel, grid.groups * splits, k.device,
        k.stride(), k.stride(), v.stride(), strides(None, 2), strides(key_padding_mask, 2), strides(None, 2),
        H, 0, M, splits, split_tokens, NOT_PACKED, s, eps, 1.0, floor, dv=dv, DV=padded(dv), WHOLE=False, **grid.sizes,
    )  # fmt: skip
    sum_keys(
        k, k, v, None, key_padding_mask, None, NOT_PACKED, NOT_PACKED, out, context, central_out, energy_out, score_sum,
        central, energy, 1, context_parts, score_parts, grid.tickets(zero=True), *of_floor, counts,
    )  # fmt: skip
    context, scores, absolute, values = (
        None if t is None else t.view(B, H, splits, -1).sum(2, dtype=torch.float64)
        for t in (context_parts, score_parts, *of_floor[2:])
    )
    return torch.cat([context * s, scores * s, *([values, absolute * s] if floored else [])], -1)


def keys_bwd(dcontext, k, v, context, central_query, score_sum, eps, key_padding_mask, output_mask):
    if not _trusted("backward", k, v, key_padding_mask, output_mask[3]):
        return eager.keys_bwd(
            dcontext, k, v, context, central_query, score_sum, eps, key_padding_mask, output_mask
        )  # fmt: skip
    floor = None, None, None, None
    return _keys_bwd(dcontext, k, v, context, central_query, score_sum, *floor, eps, key_padding_mask, output_mask)


def keys_floor_bwd(
    dcontext, k, v, context, central_query, score_sum, absolute_sum, value_mean, key_count, eps, score_floor,
    key_padding_mask, output_mask,
):  # fmt: skip
    if not _trusted("backward", k, v, key_padding_mask, output_mask[3], floored=True):
        return eager.keys_floor_bwd(
            dcontext, k, v, context, central_query, score_sum, absolute_sum, value_mean, key_count, eps, score_floor,
            key_padding_mask, output_mask,
        )  # fmt: skip
    floor = score_floor, absolute_sum.float().contiguous(), value_mean.contiguous(), key_count[:, 0].float()
    return _keys_bwd(dcontext, k, v, context, central_query, score_sum, *floor, eps, key_padding_mask, output_mask)


def _keys_bwd(
    dcontext, k, v, context, central_query, score_sum, score_floor, absolute_sum, value_mean, key_count, eps, key_padding_mask,
    output_mask,
):  # fmt: skip
    (B, H, M, d), dv_size, grid = k.shape, v.shape[3], _Grid(k, v, "backward", score_floor is not None)
    splits, split_tokens = grid.splits
    want_dk, want_dv, want_dcentral, want_dscores = output_mask
    dk = torch.empty_like(k) if want_dk else None
    dv = torch.empty_like(v) if want_dv else None
    # WANT_Q makes both, TIED says whether scores are stored.
    want_q = want_dcentral or want_dscores
    parts = k.new_empty(B, H, splits, d, dtype=torch.float32) if want_q else None
    dscores = k.new_empty(B, H, M, dtype=torch.float32) if want_dscores else None
    dcontext, context, central_query = (t.contiguous() for t in (dcontext, context, central_query))
    pull_back = Launch(
        linear_bwd_keys_kernel, grid.groups * splits, k.device,
        dcontext.stride(), k.stride(), v.stride(), strides(dk, 4), strides(dv, 4), strides(key_padding_mask, 2), strides(None, 2),
        H, M, splits, split_tokens, NOT_PACKED, scale(k), eps, 1.0, score_floor, dv=dv_size, DV=padded(dv_size),
        TIED=want_dscores, WANT_Q=want_q, WANT_K=want_dk, WANT_V=want_dv, WANT_RHO=False, **grid.sizes,
    )  # fmt: skip
    pull_back(
        dcontext, k, v, key_padding_mask, None, NOT_PACKED, context, central_query, score_sum.float().contiguous(),
        absolute_sum, value_mean, key_count, dk, dv, None, dscores, parts,
    )  # fmt: skip
    return (
        k.new_empty(0) if dk is None else dk,
        v.new_empty(0) if dv is None else dv,
        parts.sum(2, dtype=torch.float64) if want_dcentral else score_sum.new_empty(0),
        dcontext.new_empty(0) if dscores is None else dscores,
        torch.ones_like(score_sum) if want_dscores else score_sum.new_empty(0),
    )


def queries_bwd(dcentral_query, dscores, dscores_unit, q, central_query, energy_sum, eps, query_padding_mask):
    if not _trusted("backward", q, q, query_padding_mask, dscores is not None):
        return eager.queries_bwd(
            dcentral_query, dscores, dscores_unit, q, central_query, energy_sum, eps, query_padding_mask
        )
    (_, H, N, _), grid = q.shape, _Grid(q, q, "backward")
    splits, split_tokens = grid.splits
    dq = torch.empty_like(q)
    pull_back = Launch(
        linear_bwd_queries_kernel, grid.groups * splits, q.device,
        q.stride(), dq.stride(), strides(query_padding_mask, 2), strides(None, 2),
        H, N, 0, splits, split_tokens, NOT_PACKED, scale(q), eps,
        TIED=dscores is not None, **grid.sizes,
    )  # fmt: skip
    pull_back(
        q, query_padding_mask, None, NOT_PACKED, NOT_PACKED, dq, central_query.contiguous(), energy_sum.float().contiguous(),
        None if dscores is None else dscores.contiguous(), dcentral_query.float().contiguous(), 1,
    )  # fmt: skip
    return dq


class _Grid:
    """How a step's tokens, (B, H, N, d), are divided over programs."""

    def __init__(self, x, v, direction, floored=False):
        B, H, N, d = x.shape
        config = configs.linear(x, v, N, direction, floored)
        self.groups, self._like = B * triton.cdiv(H, config.heads), x
        self.splits = config.splits(N, self.groups)
        self.sizes = config.sizes(d)

    def tickets(self, zero: bool = False) -> torch.Tensor:
        new = self._like.new_zeros if zero else self._like.new_empty
        return new(self.groups, dtype=torch.int32)


def _trusted(direction, x, v, mask, tied=False, floored=False) -> bool:
    """Whether the kernels run a step over these tokens: there are some, and on this machine they passed their check."""
    if 0 in (*x.shape, *v.shape):
        return False
    countable("infsa::linear", x, v)
    acc, heads = torch.float32, x.shape[:2]
    op, floor = ("linear_floor", [0.1]) if floored else ("linear", [])
    forward = x, None if tied else x, v, 1e-6, *floor, 1.0, None, mask, mask
    if direction == "forward":
        return not first_use.failure(op, "forward", forward)
    of_floor = ([], [v.shape[3]]) if floored else ()
    statistics = [x.new_empty(*heads, *more, dtype=acc) for more in ([v.shape[3]], [x.shape[3]], [], [], *of_floor)]
    dout = x.new_empty(*heads, v.shape[3])
    return not first_use.failure(op, "backward", (dout, *forward[:3], *statistics, *forward[3:]))

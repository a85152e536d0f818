"""Linear-InfSA in four steps, where no call has all tokens: they lie on several processes, or come from a disk bit by bit.

    queries_fwd   (sum_i e_i u_i, sum_i e_i)      of a part's queries;  added up over the parts, `mean` makes qbar of them
    keys_fwd      (sum_j r_j v_j, sum_j r_j)      of a part's keys;     added up, `mean` makes z / rho
    keys_bwd      dk, dv, dt, sum_j dt_j kappa_j  of a part's keys;     the last, added up, is dqbar
    queries_bwd   dq                              of a part's queries

With a floor keys_floor_fwd gives sum_j v_j and sum_j |t_j| too, of which, once they are added up, `floored_mean` makes z / rho.

What is added up has O(d) numbers per head, in float64, so that the order of the parts does not show and float32 tokens of any
size stay in range. Between the steps stands nothing but the sum: whoever has the parts adds. Equations: docs/linear.md.

    steps = choose_steps(q)
    sums = sum(steps.queries_fwd(q_part, None) for q_part in parts)
    central_query, energy_sum = mean(sums, eps, acc_dtype(q))
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..eager import linear_steps as eager
from ..torch_private import OpOverload
from . import backends
from .steps import Step, define


class Steps(NamedTuple):
    """The steps on one backend."""

    queries_fwd: OpOverload  # (q, query_padding_mask) -> sums (B, H, d + 1)
    keys_fwd: OpOverload  # (k, v, central_query, key_padding_mask) -> sums (B, H, dv + 1)
    keys_floor_fwd: OpOverload  # the same -> sums (B, H, 2 dv + 2), the second half of v and |t|
    # (dcontext, k, v, context, central_query, score_sum, eps, key_padding_mask, output_mask) -> (dk, dv, dqbar of the part, dt,
    # the unit of dt in each head), (0,) for what is not wanted: output_mask has dk, dv, dqbar and dt. Where k is q, dt (B, H, M)
    # goes to queries_bwd, which writes the gradient of both.
    keys_bwd: OpOverload
    # The same with absolute_sum, value_mean and key_count behind score_sum, and score_floor behind eps.
    keys_floor_bwd: OpOverload
    # (dcentral_query, dscores, dscores_unit, q, central_query, energy_sum, eps, query_padding_mask) -> dq
    queries_bwd: OpOverload


def choose_steps(q: Tensor, backend: str = "") -> Steps:
    """The steps on the backend that runs them for q (B, H, N, d)."""
    forced = backend or backends.backend_of_backward()
    return _ON[backends.choose_backend("linear_steps", q.device, q.dtype, q.shape, forced)]


def mean(sums: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Sums over all parts, (B, H, d + 1), as the weighted mean (B, H, d) in ``dtype`` and the sum of the weights (B, H)."""
    weights = sums[..., -1]
    return (sums[..., :-1] / (weights + eps)[..., None]).to(dtype), weights


def key_count(v: Tensor, key_padding_mask: Tensor | None) -> Tensor:
    """The keys of a part that no mask ignores, (B, H, 1) float64: what keys_floor_fwd gives has these behind it."""
    if key_padding_mask is None:
        return v.new_full((*v.shape[:2], 1), v.shape[2], dtype=torch.float64)
    return (~key_padding_mask).sum(-1, dtype=torch.float64)[:, None, None].expand(*v.shape[:2], 1)


def floored_mean(
    sums: Tensor, score_floor: float, eps: float, dtype: torch.dtype
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Sums over all parts of keys_floor_fwd's and of key counts, (B, H, 2 dv + 3), as z / rho (B, H, dv) in ``dtype`` and what
    keys_floor_bwd takes: score_sum and absolute_sum (B, H), value_mean (B, H, dv) and key_count (B, H), at least 1."""
    weighted, values, count = sums.tensor_split((sums.shape[-1] // 2, sums.shape[-1] - 1), -1)
    count = count.clamp(min=1)
    absolute_sum, value_mean = values[..., -1], values[..., :-1] / count
    ones = torch.ones_like(absolute_sum)[..., None]
    # sum_j (r_j + c) v_j and sum_j (r_j + c), of which it is the mean.
    floor = (score_floor * absolute_sum)[..., None] * torch.cat([value_mean, ones], -1)
    context, _ = mean(weighted + floor, eps, dtype)
    return context, (weighted[..., -1], absolute_sum, value_mean.to(dtype), count.squeeze(-1))


_QUERIES = {
    "q": "(B, H, N, d)",
    "query_padding_mask": "(B, N) bool",
    "dcentral_query": "(B, H, d) float64",
    "dscores": "(B, H, N) acc",
    "dscores_unit": "(B, H) float64",
    "central_query": "(B, H, d) acc",
    "energy_sum": "(B, H) float64",
}
_KEYS = {
    "k": "(B, H, M, d)",
    "v": "(B, H, M, dv)",
    "key_padding_mask": "(B, M) bool",
    "dcontext": "(B, H, dv) acc",
    "context": "(B, H, dv) acc",
    "central_query": "(B, H, d) acc",
    "score_sum": "(B, H) float64",
    "absolute_sum": "(B, H) float64",
    "value_mean": "(B, H, dv) acc",
    "key_count": "(B, H) float64",
}


def _fake_queries_fwd(suffix, q, query_padding_mask):
    return q.new_empty(*q.shape[:2], q.shape[3] + 1, dtype=torch.float64)


def _fake_keys_fwd(suffix, k, v, central_query, key_padding_mask):
    return v.new_empty(*v.shape[:2], v.shape[3] + 1, dtype=torch.float64)


def _fake_keys_floor_fwd(suffix, k, v, central_query, key_padding_mask):
    return v.new_empty(*v.shape[:2], 2 * v.shape[3] + 2, dtype=torch.float64)


def _fake_keys_bwd(suffix, dcontext, k, v, *more):
    want_dk, want_dv, want_dcentral, want_dscores = more[-1]
    B, H, M, d = k.shape
    dscores = dcontext.new_empty(0)
    if want_dscores and not suffix and H > 1 and all(t.stride(1) < t.stride(2) for t in (k, v)):
        # The C++ kernels lay it out as they go over the tokens.
        dscores = dcontext.new_empty(B, M, H).transpose(1, 2)
    elif want_dscores:
        dscores = dcontext.new_empty(B, H, M)
    return (
        torch.empty_like(k) if want_dk else k.new_empty(0),
        torch.empty_like(v) if want_dv else v.new_empty(0),
        k.new_empty((B, H, d) if want_dcentral else 0, dtype=torch.float64),
        dscores,
        k.new_empty((B, H) if want_dscores else 0, dtype=torch.float64),
    )


def _fake_queries_bwd(suffix, dcentral_query, dscores, dscores_unit, q, *more):
    return torch.empty_like(q)


def _both_or_neither(op, given):
    absent = given["dscores"] is None
    if absent != (given["dscores_unit"] is None):
        got, expected = ("a Tensor", "None") if absent else ("None", "a Tensor")
        raise ValueError(f"{op}: dscores_unit is {got}, expected {expected}: keys_bwd returns it beside dscores")


def _flops(per_token, *at):
    """FLOPs per token and head from the last dimensions of the tensors at these places; the first has all the tokens."""

    def formula(*shapes, out_shape=None, **kwargs):
        B, H, N, _ = shapes[at[0]]
        return B * H * N * per_token(*(shapes[i][3] for i in at))

    return formula


kernels = {"cpu": "csrc/cpu/linear_steps.cpp", "triton": ".triton.linear_steps", "eager": eager}
_ON = define(
    "linear_steps",
    Steps,
    Steps(
        Step(
            "(Tensor q, Tensor? query_padding_mask) -> Tensor sums",
            _QUERIES,
            _fake_queries_fwd,
            _flops(lambda d: 4 * d, 0),
        ),
        Step(
            "(Tensor k, Tensor v, Tensor central_query, Tensor? key_padding_mask) -> Tensor sums",
            _KEYS,
            _fake_keys_fwd,
            _flops(lambda d, dv: 2 * d + 2 * dv, 0, 1),
        ),
        Step(
            "(Tensor k, Tensor v, Tensor central_query, Tensor? key_padding_mask) -> Tensor sums",
            _KEYS,
            _fake_keys_floor_fwd,
            _flops(lambda d, dv: 2 * d + 3 * dv, 0, 1),
        ),
        Step(
            "(Tensor dcontext, Tensor k, Tensor v, Tensor context, Tensor central_query, Tensor score_sum, float eps, "
            "Tensor? key_padding_mask, bool[4] output_mask) -> "
            "(Tensor dk, Tensor dv, Tensor dcentral_query, Tensor dscores, Tensor dscores_unit)",
            _KEYS,
            _fake_keys_bwd,
            _flops(lambda d, dv: 5 * d + 3 * dv, 1, 2),
        ),
        Step(
            "(Tensor dcontext, Tensor k, Tensor v, Tensor context, Tensor central_query, Tensor score_sum, "
            "Tensor absolute_sum, Tensor value_mean, Tensor key_count, float eps, float score_floor, "
            "Tensor? key_padding_mask, bool[4] output_mask) -> "
            "(Tensor dk, Tensor dv, Tensor dcentral_query, Tensor dscores, Tensor dscores_unit)",
            _KEYS,
            _fake_keys_bwd,
            _flops(lambda d, dv: 5 * d + 3 * dv, 1, 2),
        ),
        Step(
            "(Tensor dcentral_query, Tensor? dscores, Tensor? dscores_unit, Tensor q, Tensor central_query, Tensor energy_sum, "
            "float eps, Tensor? query_padding_mask) -> Tensor dq",
            _QUERIES,
            _fake_queries_bwd,
            _flops(lambda d: 8 * d, 3),
            more=_both_or_neither,
        ),
    ),
    kernels,
    "infsa_kernels.distributed.linear_infsa has one",
)

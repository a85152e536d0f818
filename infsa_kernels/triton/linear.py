"""Linear-InfSA in Triton.

    e_i = ||q_i||,  qbar = s^2 sum_i e_i q_i / (s sum_i e_i + eps)                       launch 1: sums over the queries
    r_j = s ReLU(qbar . k_j),  z = rho sum_j r_j v_j / (sum_j r_j + eps)                  launch 2: sums over the keys

A program walks over a run of tokens ("split") of G heads, [BT, G, D] of them at a time, and keeps its sums in registers of that
shape: nothing crosses a thread inside the loop but the dot products over D, and the reduction over tokens happens once.
Splits leave partial sums in scratch; whoever needs the total adds them up in their order, so the bits never depend on timing.
Where all programs would read many of them, a launch between (linear_fold.py) leaves them the total as the one part of it.
The total over the keys is taken by the program of a head group that arrives last, which an integer ticket tells it: the one
atomic here, it touches no number. Short sequences take one program per head group and one launch.

A floor under the scores (linear_floor.py) has the same kernels, which are given its statistics: None where there is no floor.

Accesses are [BT, G, D] with D innermost: in a [B, N, H, d] view G heads make a whole 128-byte line.
All offsets are int64. d or dv that is no power of two is padded under a mask.
"""

import torch
import triton
import triton.language as tl

from ..eager import linear as eager
from ..eager.common import scale
from . import configs
from .launch import SIZES, Launch, countable, in_elements, maker, padded, planned, relu, strides
from .linear_backward import backward, split
from .linear_fold import Fold
from .packed import Packing, span_of, tiles_of_sequence
from .tokens import (
    effective_rho,
    key_counts,
    keys_of,
    load_tokens,
    rows_at,
    store_part,
    sum_of_splits,
    where_am_i,
)

__all__ = ["backward", "forward"]


@triton.jit
def sum_queries(
    q, q_strides, mask, mask_strides, b, heads, H, start, stop,
    d: tl.constexpr, D: tl.constexpr, G: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """sum_i e_i q_i [G, D] and sum_i e_i [G, 1] with e_i = ||q_i||."""
    central = tl.zeros([BT, G, D], tl.float32)
    energy = tl.zeros([BT, G, 1], tl.float32)
    tokens = start + tl.arange(0, BT)
    ahead = load_tokens(q, q_strides, b, heads, tokens, start, stop, H, mask, mask_strides, d, D)
    for _ in range(start, stop, BT):
        b_q = ahead.to(tl.float32)
        tokens += BT
        ahead = load_tokens(q, q_strides, b, heads, tokens, start, stop, H, mask, mask_strides, d, D)
        e = tl.sqrt(tl.sum(b_q * b_q, 2, keep_dims=True))
        energy += e
        central += e * b_q
    return tl.sum(central, 0), tl.sum(energy, 0)


@triton.jit(do_not_specialize=SIZES)
def linear_fwd_queries_kernel(
    q, query_mask, cu_seqlens_q,  # (B, H, N, d), (B, N), (S + 1)
    central_parts, energy_parts, tickets,  # (B, H, splits, d), (B, H, splits), (B, head groups)
    q_strides, query_mask_strides, H, N, splits, split_tokens, sequences,
    d: tl.constexpr, D: tl.constexpr, G: tl.constexpr, BT: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    q_strides = in_elements(q_strides, UNIT)
    b, heads, split, s, group, own, start, stop = where_am_i(splits, split_tokens, H, G, cu_seqlens_q, sequences, N)
    if cu_seqlens_q is not None and (own > 0) & (start >= stop):
        return
    central, energy = sum_queries(q, q_strides, query_mask, query_mask_strides, b, heads, H, start, stop, d, D, G, BT)
    store_part(central_parts, central, b, heads, H, split, splits, d, D)
    store_part(energy_parts, energy, b, heads, H, split, splits, 1, 1)
    if own == 0:
        tl.store(tickets + group, 0)


@triton.jit
def store_result(
    pooled, score, values, absolute, rho, s, heads, H, keys, scale, eps, score_floor,
    out, context, score_sum, absolute_sum, value_mean, dv: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    score = score * scale
    if score_floor is None:
        z = pooled * scale / (score + eps)
    else:
        absolute = absolute * scale
        mean = values / keys
        share = score_floor * absolute
        # Every weight is above 0: where a value is infinite so is the result, though its score be 0.
        infinite = (tl.abs(mean) == float("inf")) & (share > 0.0) & (share < float("inf"))
        z = tl.where(infinite, mean, pooled * scale + share * mean) / (score + share + eps)
        store_part(absolute_sum, absolute, s, heads, H, 0, 1, 1, 1)
        store_part(value_mean, mean, s, heads, H, 0, 1, dv, DV)
    store_part(context, z, s, heads, H, 0, 1, dv, DV)
    store_part(out, (rho * z).to(out.dtype.element_ty), s, heads, H, 0, 1, dv, DV)
    store_part(score_sum, score, s, heads, H, 0, 1, 1, 1)


@triton.jit(do_not_specialize=SIZES)
def linear_fwd_keys_kernel(
    q, k, v, query_mask, key_mask, head_rho,  # (B, H, N, d), (B, H, M, d), (B, H, M, dv), (B, N), (B, M), (B, H)
    cu_seqlens_q, cu_seqlens_k,  # of packed sequences (S + 1), and what is (B, H) here is (S, H) there
    out, context, central_query, energy_sum, score_sum,  # (B, H, dv), (B, H, dv), (B, H, d), (B, H), (B, H)
    central_parts, energy_parts, query_splits,  # of the first launch
    context_parts, score_parts, tickets,  # (B, H, splits, dv), (B, H, splits), (B, head groups)
    absolute_sum, value_mean, absolute_parts, value_parts, key_counts,  # the same four of a floor, and (B,) if masked
    q_strides, k_strides, v_strides, query_mask_strides, key_mask_strides, head_rho_strides,
    H, N, M, splits, split_tokens, sequences, scale, eps, rho, score_floor,
    d: tl.constexpr, dv: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, G: tl.constexpr, BT: tl.constexpr,
    WHOLE: tl.constexpr,  # one program per head group: it sums the queries too, and its sums are the totals
    UNIT: tl.constexpr,
):  # fmt: skip
    q_strides, k_strides = in_elements(q_strides, UNIT), in_elements(k_strides, UNIT)
    v_strides = in_elements(v_strides, UNIT)
    b, heads, split, s, group, own, start, stop = where_am_i(splits, split_tokens, H, G, cu_seqlens_k, sequences, M)
    if cu_seqlens_k is not None and (own > 0) & (start >= stop):
        return
    steps = tl.cdiv(stop - start, BT)
    # Backwards: where K is Q, what the first launch read last is still in the L2 cache. The first tiles are on their way while
    # the central query is made.
    tokens = start + (steps - 1) * BT + tl.arange(0, BT)
    k_ahead = load_tokens(k, k_strides, b, heads, tokens, start, stop, H, key_mask, key_mask_strides, d, D)
    v_ahead = load_tokens(v, v_strides, b, heads, tokens, start, stop, H, key_mask, key_mask_strides, dv, DV)
    if WHOLE:
        begin, end = span_of(cu_seqlens_q, s, N)
        central, energy = sum_queries(
            q, q_strides, query_mask, query_mask_strides, b, heads, H, begin, end, d, D, G, BT
        )
    else:
        first, count = tiles_of_sequence(cu_seqlens_q, s, N, split_tokens, query_splits)
        central = sum_of_splits(central_parts, b, heads, H, first, count, query_splits, d, D, G, BT)
        energy = sum_of_splits(energy_parts, b, heads, H, first, count, query_splits, 1, 1, G, BT)
    energy = energy * scale
    central = central * (scale * scale) / (energy + eps)
    if own == 0:
        store_part(central_query, central, s, heads, H, 0, 1, d, D)
        store_part(energy_sum, energy, s, heads, H, 0, 1, 1, 1)

    pooled = tl.zeros([BT, G, DV], tl.float32)
    score = tl.zeros([BT, G, 1], tl.float32)
    if score_floor is not None:
        values = tl.zeros([BT, G, DV], tl.float32)
        absolute = tl.zeros([BT, G, 1], tl.float32)
    for _ in range(steps):
        b_k, b_v = k_ahead.to(tl.float32), v_ahead.to(tl.float32)
        rows = rows_at(b, heads, tokens, start, stop, H, key_mask, key_mask_strides)
        tokens -= BT
        k_ahead = load_tokens(k, k_strides, b, heads, tokens, start, stop, H, key_mask, key_mask_strides, d, D)
        v_ahead = load_tokens(v, v_strides, b, heads, tokens, start, stop, H, key_mask, key_mask_strides, dv, DV)
        t = tl.sum(b_k * central[None, :, :], 2, keep_dims=True)
        r = relu(t)
        r = tl.where(rows, r, 0.0)
        score += r
        pooled += r * b_v
        if score_floor is not None:
            absolute += tl.where(rows, tl.abs(t), 0.0)
            values += b_v
    pooled = tl.sum(pooled, 0)
    score = tl.sum(score, 0)
    if score_floor is None:
        values, absolute, keys = None, None, None
    else:
        values, absolute = tl.sum(values, 0), tl.sum(absolute, 0)
        keys = keys_of(key_counts, b, cu_seqlens_k, s, M)

    rho = effective_rho(rho, head_rho, head_rho_strides, s, heads, H)
    if WHOLE:
        store_result(
            pooled, score, values, absolute, rho, s, heads, H, keys, scale, eps, score_floor,
            out, context, score_sum, absolute_sum, value_mean, dv, DV,
        )  # fmt: skip
    else:
        store_part(context_parts, pooled, b, heads, H, split, splits, dv, DV)
        store_part(score_parts, score, b, heads, H, split, splits, 1, 1)
        if score_floor is not None:
            store_part(value_parts, values, b, heads, H, split, splits, dv, DV)
            store_part(absolute_parts, absolute, b, heads, H, split, splits, 1, 1)
        # All threads have stored before one of them draws the ticket, which releases the stores and acquires the others'.
        tl.debug_barrier()
        first, count = tiles_of_sequence(cu_seqlens_k, s, M, split_tokens, splits)
        if tl.atomic_add(tickets + group, 1, sem="acq_rel") == count - 1:
            pooled = sum_of_splits(context_parts, b, heads, H, first, count, splits, dv, DV, G, BT)
            score = sum_of_splits(score_parts, b, heads, H, first, count, splits, 1, 1, G, BT)
            if score_floor is not None:
                values = sum_of_splits(value_parts, b, heads, H, first, count, splits, dv, DV, G, BT)
                absolute = sum_of_splits(absolute_parts, b, heads, H, first, count, splits, 1, 1, G, BT)
            store_result(
                pooled, score, values, absolute, rho, s, heads, H, keys, scale, eps, score_floor,
                out, context, score_sum, absolute_sum, value_mean, dv, DV,
            )  # fmt: skip


@planned
def forward(q, k, v, eps, rho, head_rho, key_padding_mask, query_padding_mask):
    if 0 in (*q.shape, *v.shape):
        return eager.forward
    run = plan_forward(q, k, v, eps, None, rho, head_rho, key_padding_mask, query_padding_mask)
    return lambda q, k, v, eps, rho, *more: run(q, k, v, *more)


def plan_forward(
    q, k, v, eps, score_floor, rho, head_rho, key_padding_mask=None, query_padding_mask=None, packing: Packing | None = None
):  # fmt: skip
    """(q, k, v, head_rho, masks, offsets) -> what linear_fwd returns, or with a floor linear_floor_fwd.

    Where sequences are packed, of all of them: q, k and v are a batch of one, and there are both offsets.
    """
    B, H, N, d = q.shape
    M, dv = v.shape[2:]
    countable("infsa::linear" if packing is None else packing.op, q, v)
    k = q if k is None else k
    samples = B if packing is None else packing.sequences
    longest = max(N, M) if packing is None else packing.longest
    config = configs.linear(q, v, longest, "forward", score_floor is not None, None if packing is None else samples)
    head_groups = triton.cdiv(H, config.heads)
    (splits, split_tokens), (key_splits, key_split_tokens) = split(config, B * head_groups, N, M, packing)
    whole = splits == key_splits == 1 if packing is None else packing.longest <= configs.WHOLE
    sequences = None if packing is None else samples
    sizes = config.sizes(d)
    folds = packing is None and config.folds(splits, d, B * head_groups * key_splits)
    fold = Fold(B, H, splits, d, q.device) if folds else None
    parts = splits if fold is None else 1
    sum_queries_of_splits = Launch(
        linear_fwd_queries_kernel, B * head_groups * splits, q.device,
        q.stride(), strides(query_padding_mask, 2), H, N, splits, split_tokens, sequences, **sizes,
    )  # fmt: skip
    sum_keys = Launch(
        linear_fwd_keys_kernel, B * head_groups * key_splits, q.device,
        q.stride(), k.stride(), v.stride(), strides(query_padding_mask, 2), strides(key_padding_mask, 2), strides(head_rho, 2),
        H, N, M, key_splits, key_split_tokens, sequences, scale(q), eps, rho, score_floor, dv=dv, DV=padded(dv), WHOLE=whole,
        **sizes,
    )  # fmt: skip

    def sums(rows: int, *widths: int | None) -> list:
        return [maker(q.device, torch.float32, rows, H, *(() if width is None else (width,))) for width in widths]

    new_out, results = maker(q.device, q.dtype, samples, H, dv), sums(samples, dv, d, None, None)
    scratch = [] if whole else sums(B, splits * d, splits, key_splits * dv, key_splits)
    new_tickets = maker(q.device, torch.int32, samples * head_groups)
    if score_floor is not None:
        floor_results, floor_scratch = sums(samples, None, dv), [] if whole else sums(B, key_splits, key_splits * dv)

    def run(q, k, v, head_rho, key_padding_mask=None, query_padding_mask=None, cu_seqlens_q=None, cu_seqlens_k=None):
        k = q if k is None else k
        out = new_out()
        context, central_query, energy_sum, score_sum = found = [new() for new in results]
        central_parts = energy_parts = context_parts = score_parts = tickets = None
        absolute_sum = value_mean = absolute_parts = value_parts = None
        if not whole:
            central_parts, energy_parts, context_parts, score_parts = [new() for new in scratch]
            tickets = new_tickets()
            sum_queries_of_splits(q, query_padding_mask, cu_seqlens_q, central_parts, energy_parts, tickets)
            if fold is not None:
                central_parts, energy_parts = fold(central_parts, energy_parts)
        if score_floor is not None:
            absolute_sum, value_mean = of_floor = [new() for new in floor_results]
            found += of_floor
            if not whole:
                absolute_parts, value_parts = [new() for new in floor_scratch]
        sum_keys(
            q, k, v, query_padding_mask, key_padding_mask, head_rho, cu_seqlens_q, cu_seqlens_k,
            out, context, central_query, energy_sum, score_sum,
            central_parts, energy_parts, parts, context_parts, score_parts, tickets,
            absolute_sum, value_mean, absolute_parts, value_parts, key_counts(score_floor, key_padding_mask),
        )  # fmt: skip
        return out, *found

    return run

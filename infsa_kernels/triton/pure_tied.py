"""The gradients of Pure InfSA where K is Q, in one pass; the equations stand in pure.py."""

import torch
import triton
import triton.language as tl

from . import configs
from .launch import COUNTS, Launch, in_elements, maker, relu, strides
from .packed import tiles_of_all, tiles_of_sequence
from .tiles import (
    describable,
    dot,
    end_if_any,
    fold,
    head_numbers,
    head_rho_at,
    live_rows,
    load_rows,
    loops_over,
    store_rows,
    tiles_of,
    where_am_i,
    without_padding,
)


@triton.jit
def bwd_tied_tiles(
    dq, dv_acc, drho, b_q, b_do, b_v, row_asks, row_answers, q, dout, v, q_strides, dout_strides, v_strides,
    query_mask, key_mask, query_mask_strides, key_mask_strides, b, h, start, stop, N, c, t_scale, p_scale,
    d: tl.constexpr, dv: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
    HALF: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
    WANT_Q: tl.constexpr, WANT_V: tl.constexpr, WANT_RHO: tl.constexpr,
):  # fmt: skip
    for first in range(start, stop, BLOCK_N):
        asks = live_rows(first, N, b, query_mask, query_mask_strides, BLOCK_N)
        answers = live_rows(first, N, b, key_mask, key_mask_strides, BLOCK_N)
        b_k = load_rows(q, q_strides, b, h, first, asks | answers, d, D, BLOCK_N, MASKED, DESCRIPTORS)
        b_doj = load_rows(dout, dout_strides, b, h, first, asks, dv, DV, BLOCK_N, MASKED, DESCRIPTORS)
        x = dot(b_q, tl.trans(b_k), None, PRECISION)
        if WANT_V:
            p = relu(x)
            if MASKED:
                p = tl.where(asks[None, :], p, 0.0)
            if HALF:
                p = p * p_scale
            dv_acc = dot(p.to(b_doj.dtype), b_doj, dv_acc, PRECISION)
        if WANT_Q or WANT_RHO:
            b_vj = load_rows(v, v_strides, b, h, first, answers, dv, DV, BLOCK_N, MASKED, DESCRIPTORS)
            g = dot(b_do, tl.trans(b_vj), None, PRECISION)
            g = dot(b_v, tl.trans(b_doj), g, PRECISION)
            if MASKED:
                # A pair counts once for each direction in which neither side is ignored.
                there = row_asks[:, None] & answers[None, :]
                back = row_answers[:, None] & asks[None, :]
                x = tl.where(there | back, x, 0.0)
                t = g - c * (there.to(tl.float32) + back.to(tl.float32)) * x
            else:
                t = g - 2.0 * c * x
            if WANT_RHO:
                drho += tl.sum(tl.where(x <= 0.0, 0.0, x * g), 1)
            t = tl.where(x <= 0.0, 0.0, t)
            if HALF:
                t = t * t_scale
            if WANT_Q:
                dq = dot(t.to(b_k.dtype), b_k, dq, PRECISION)
    return dq, dv_acc, drho


@triton.jit(do_not_specialize=COUNTS)
def pure_bwd_tied_kernel(
    dout, q, v, q_tiles, dout_tiles, v_tiles,  # (B, H, N, .), and the same again as the loop reads them
    query_mask, key_mask, head_rho, cu_seqlens_q, norm, parts, dq, dv_out, drho_parts,
    dout_strides, q_strides, v_strides, dq_strides, dv_strides, query_mask_strides, key_mask_strides, head_rho_strides,
    H, N, blocks, sequences, part_blocks, part_rows, heads, scale, eps, rho,
    d: tl.constexpr, dv: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    FULL: tl.constexpr, TAIL: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
    WANT_Q: tl.constexpr, WANT_V: tl.constexpr, WANT_RHO: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    dout_strides, q_strides = in_elements(dout_strides, UNIT), in_elements(q_strides, UNIT)
    v_strides, dq_strides = in_elements(v_strides, UNIT), in_elements(dq_strides, UNIT)
    dv_strides = in_elements(dv_strides, UNIT)
    b, h, row_head, part, s, head, begin, row, end = where_am_i(blocks, H, cu_seqlens_q, sequences, N, BLOCK_M)
    if cu_seqlens_q is not None and (row > begin) & (row >= end):
        return
    head_gain = head_rho_at(rho, head_rho, head_rho_strides, s, h)
    gain, c, t_scale, p_scale = head_numbers(
        parts, part_blocks, part_rows, heads, norm, row_head, head, head_gain, cu_seqlens_q, s, N, scale, eps, d, dv, HALF,
    )  # fmt: skip
    asks = live_rows(row, end, b, query_mask, query_mask_strides, BLOCK_M)
    answers = live_rows(row, end, b, key_mask, key_mask_strides, BLOCK_M)
    b_q = load_rows(q, q_strides, b, h, row, asks | answers, d, D, BLOCK_M, True, False)
    b_do = load_rows(dout, dout_strides, b, h, row, asks, dv, DV, BLOCK_M, True, False)
    b_v = load_rows(v, v_strides, b, h, row, answers, dv, DV, BLOCK_M, True, False)
    b_dq = tl.zeros([BLOCK_M, D], tl.float32)
    b_dv = tl.zeros([BLOCK_M, DV], tl.float32)
    drho = tl.zeros([BLOCK_M], tl.float32)
    first, last = begin, end
    if query_mask is not None and key_mask is not None:
        first, last = without_padding(
            first, last, b, query_mask, query_mask_strides, key_mask, key_mask_strides, BLOCK_N
        )
        last = end_if_any(asks | answers, first, last)
    full = first
    if FULL:
        full = first + (last - first) // BLOCK_N * BLOCK_N
        b_dq, b_dv, drho = bwd_tied_tiles(
            b_dq, b_dv, drho, b_q, b_do, b_v, asks, answers, q_tiles, dout_tiles, v_tiles, q_strides, dout_strides, v_strides,
            None, None, query_mask_strides, key_mask_strides, b, h, first, full, last, c, t_scale, p_scale,
            d, dv, D, DV, BLOCK_N, False, HALF, PRECISION, DESCRIPTORS, WANT_Q, WANT_V, WANT_RHO,
        )  # fmt: skip
    if TAIL:
        b_dq, b_dv, drho = bwd_tied_tiles(
            b_dq, b_dv, drho, b_q, b_do, b_v, asks, answers, q_tiles, dout_tiles, v_tiles, q_strides, dout_strides, v_strides,
            query_mask, key_mask, query_mask_strides, key_mask_strides, b, h, full, last, last, c, t_scale, p_scale,
            d, dv, D, DV, BLOCK_N, True, HALF, PRECISION, DESCRIPTORS, WANT_Q, WANT_V, WANT_RHO,
        )  # fmt: skip
    if WANT_RHO:
        # Every pair came twice.
        drho = tl.sum(tl.where(asks | answers, drho, 0.0)) * 0.5 * scale / (tl.load(norm + head) + eps)
        tl.store(drho_parts + part, rho * drho)
    if WANT_Q:
        b_dq = tl.where((asks | answers)[:, None], b_dq * (gain / t_scale), 0.0)
        store_rows(dq, dq_strides, b_dq, b, h, row, end, d, D, BLOCK_M)
    if WANT_V:
        b_dv = tl.where(answers[:, None], b_dv * (gain / p_scale), 0.0)
        store_rows(dv_out, dv_strides, b_dv, b, h, row, end, dv, DV, BLOCK_M)


@triton.jit(do_not_specialize=COUNTS)
def pure_bwd_rho_kernel(
    drho_parts, cu_seqlens_q, dhead_rho,  # (1, H, blocks), (S + 1), (S, H)
    H, N, blocks, part_rows,
):  # fmt: skip
    """The total over the blocks of a packed sequence."""
    s, h = tl.program_id(0) // H, tl.program_id(0) % H
    first, count = tiles_of_sequence(cu_seqlens_q, s, N, part_rows, blocks)
    tl.store(dhead_rho + tl.program_id(0), fold(drho_parts + h.to(tl.int64) * blocks + first, count, False))


def sum_of_blocks(packing, N, H, blocks, rows, device):
    """(parts (B, H, blocks), offsets, where their totals go)."""
    if packing is None:
        return lambda parts, cu_seqlens_q, total: torch.sum(parts, -1, out=total)
    return Launch(pure_bwd_rho_kernel, packing.sequences * H, device, H, N, blocks, rows, num_warps=4)


def plan_tied(dout, q, k, v, masks, head_rho, gradients, counts, sizes, packing):
    dq, _, dv, dhead_rho = gradients
    B, H, N, _ = q.shape
    described = describable(masks, packing, q, dout, v)
    config = configs.pure(q, v, "bwd_tied", described, packing is not None)
    blocks = tiles_of_all(N, config.block_m, packing)
    want_rho = dhead_rho is not None
    launch = Launch(
        pure_bwd_tied_kernel, B * H * blocks, q.device,
        dout.stride(), q.stride(), v.stride(), strides(dq, 4), strides(dv, 4),
        *(strides(t, 2) for t in (*masks, head_rho)), H, N, blocks, *counts,
        DESCRIPTORS=described, **loops_over(q, N, config.block_n, masks != (None, None), packing),
        WANT_Q=dq is not None, WANT_V=dv is not None, WANT_RHO=want_rho, **sizes, **config.options(q),
    )  # fmt: skip
    new_drho_parts = maker(q.device, torch.float32, B, H, blocks)
    sum_up = sum_of_blocks(packing, N, H, blocks, config.block_m, q.device)
    q_tiles, dout_tiles, v_tiles = (tiles_of(t, config.block_n, described) for t in (q, dout, v))

    def run(dout, q, k, v, masks, head_rho, packed, norm, parts, gradients):
        dq, _, dv, dhead_rho = gradients
        drho_parts = new_drho_parts() if want_rho else None
        launch(
            dout, q, v, q_tiles(q), dout_tiles(dout), v_tiles(v), *masks, head_rho, packed[0], norm, parts, dq, dv, drho_parts
        )  # fmt: skip
        if want_rho:
            sum_up(drho_parts, packed[0], dhead_rho)

    return run

"""The gradients of Pure InfSA; the equations stand in pure.py."""

import torch
import triton
import triton.language as tl

from ..eager import pure as eager
from ..eager.common import scale
from . import configs
from .launch import COUNTS, Launch, countable, in_elements, maker, padded, planned, relu, strides
from .packed import Packing, span_of, tiles_of_all
from .pure_tied import plan_tied, sum_of_blocks
from .tiles import (
    addressable,
    describable,
    dot,
    end_if_any,
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

# Keys at a time where the preparation meets them, and scores up to which it does.
FEW_KEYS = tl.constexpr(16)
FEW_SCORES = tl.constexpr(eager.FEW_SCORES)


@triton.jit(do_not_specialize=COUNTS)
def pure_bwd_prepare_kernel(
    dout, out, q, k, v, query_mask, key_mask, norm,  # (B, H, N, dv), like dout, (B, H, N, d), ..., (B, N), (B, M), (B, H)
    head_rho, cu_seqlens_q, cu_seqlens_k, parts,  # (B, H), (S + 1) both, (3, B, H, blocks)
    dout_strides, out_strides, q_strides, k_strides, v_strides, query_mask_strides, key_mask_strides, head_rho_strides,
    H, N, M, blocks, sequences, heads, scale, eps, rho,
    d: tl.constexpr, dv: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr,
    PRECISION: tl.constexpr, FEW: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Per block of rows: <dO, O>, and in float16 the longest row of dO and of q, which bound every product.

    FEW: <dO, O> = rho s^2 <ReLU(X), G> / (F + eps), whose O no dtype has rounded. Of packed sequences, those with few scores.
    """
    dout_strides, out_strides = in_elements(dout_strides, UNIT), in_elements(out_strides, UNIT)
    q_strides, k_strides = in_elements(q_strides, UNIT), in_elements(k_strides, UNIT)
    v_strides = in_elements(v_strides, UNIT)
    b, h, row_head, part, s, head, begin, row, end = where_am_i(blocks, H, cu_seqlens_q, sequences, N, ROWS)
    if cu_seqlens_q is not None and (row > begin) & (row >= end):
        return
    live = live_rows(row, end, b, query_mask, query_mask_strides, ROWS)
    b_do = load_rows(dout, dout_strides, b, h, row, live, dv, DV, ROWS, True, False)
    if FEW or HALF:
        b_q = load_rows(q, q_strides, b, h, row, live, d, D, ROWS, True, False)
    if HALF:
        size = tl.cast(heads, tl.int64) * blocks
        do, query = b_do.to(tl.float32), b_q.to(tl.float32)
        tl.store(parts + part + size, tl.sqrt(tl.max(tl.sum(do * do, 1))))
        tl.store(parts + part + 2 * size, tl.sqrt(tl.max(tl.sum(query * query, 1))))
    if not FEW or cu_seqlens_k is not None:
        b_out = load_rows(out, out_strides, b, h, row, live, dv, DV, ROWS, True, False).to(tl.float32)
        dout_out = tl.sum(b_do.to(tl.float32) * b_out)
    if FEW:
        first_key, last_key = span_of(cu_seqlens_k, s, M)
        if cu_seqlens_k is not None:
            many = (end - begin).to(tl.int64) * (last_key - first_key) > FEW_SCORES
            last_key = tl.where(many, first_key, last_key)
        products = tl.zeros([ROWS], tl.float32)
        for first in range(first_key, last_key, FEW_KEYS):
            keys = live_rows(first, last_key, b, key_mask, key_mask_strides, FEW_KEYS)
            b_k = load_rows(k, k_strides, b, h, first, keys, d, D, FEW_KEYS, True, False)
            b_v = load_rows(v, v_strides, b, h, first, keys, dv, DV, FEW_KEYS, True, False)
            x = dot(b_q, tl.trans(b_k), None, PRECISION)
            products += tl.sum(tl.where(x <= 0.0, 0.0, x * dot(b_do, tl.trans(b_v), None, PRECISION)), 1)
        gain = head_rho_at(rho, head_rho, head_rho_strides, s, h) * scale / (tl.load(norm + head) + eps)
        of_scores = tl.sum(products) * gain
        dout_out = of_scores if cu_seqlens_k is None else tl.where(many, dout_out, of_scores)
    tl.store(parts + part, dout_out)


@triton.jit
def bwd_query_tiles(
    dq, drho, b_q, b_do, k, v, k_strides, v_strides, key_mask, key_mask_strides, b, h, start, stop, M, c, t_scale,
    d: tl.constexpr, dv: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
    HALF: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr, WANT_Q: tl.constexpr, WANT_RHO: tl.constexpr,
):  # fmt: skip
    for first in range(start, stop, BLOCK_N):
        live = live_rows(first, M, b, key_mask, key_mask_strides, BLOCK_N)
        b_k = load_rows(k, k_strides, b, h, first, live, d, D, BLOCK_N, MASKED, DESCRIPTORS)
        b_v = load_rows(v, v_strides, b, h, first, live, dv, DV, BLOCK_N, MASKED, DESCRIPTORS)
        x = dot(b_q, tl.trans(b_k), None, PRECISION)
        g = dot(b_do, tl.trans(b_v), None, PRECISION)
        if MASKED:
            x = tl.where(live[None, :], x, 0.0)
        if WANT_RHO:
            drho += tl.sum(tl.where(x <= 0.0, 0.0, x * g), 1)
        if WANT_Q:
            # NaN scores pass the gradient on, as torch's ReLU does.
            t = tl.where(x <= 0.0, 0.0, g - c * x)
            if HALF:
                t = t * t_scale
            dq = dot(t.to(b_k.dtype), b_k, dq, PRECISION)
    return dq, drho


@triton.jit(do_not_specialize=COUNTS)
def pure_bwd_queries_kernel(
    dout, q, k, v, query_mask, key_mask, head_rho, cu_seqlens_q, cu_seqlens_k,  # as in the forward pass
    norm, parts,  # (B, H), (3, B, H, part_blocks)
    dq, drho_parts,  # like q, (B, H, blocks)
    dout_strides, q_strides, k_strides, v_strides, dq_strides, query_mask_strides, key_mask_strides,
    head_rho_strides, H, N, M, blocks, sequences, part_blocks, part_rows, heads, scale, eps, rho,
    d: tl.constexpr, dv: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    FULL: tl.constexpr, TAIL: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
    WANT_Q: tl.constexpr, WANT_RHO: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    dout_strides, q_strides = in_elements(dout_strides, UNIT), in_elements(q_strides, UNIT)
    k_strides, v_strides = in_elements(k_strides, UNIT), in_elements(v_strides, UNIT)
    dq_strides = in_elements(dq_strides, UNIT)
    b, h, row_head, part, s, head, begin, row, end = where_am_i(blocks, H, cu_seqlens_q, sequences, N, BLOCK_M)
    if cu_seqlens_q is not None and (row > begin) & (row >= end):
        return
    head_gain = head_rho_at(rho, head_rho, head_rho_strides, s, h)
    gain, c, t_scale, p_scale = head_numbers(
        parts, part_blocks, part_rows, heads, norm, row_head, head, head_gain, cu_seqlens_q, s, N, scale, eps, d, dv, HALF,
    )  # fmt: skip
    live = live_rows(row, end, b, query_mask, query_mask_strides, BLOCK_M)
    b_q = load_rows(q, q_strides, b, h, row, live, d, D, BLOCK_M, True, DESCRIPTORS)
    b_do = load_rows(dout, dout_strides, b, h, row, live, dv, DV, BLOCK_M, True, DESCRIPTORS)
    b_dq = tl.zeros([BLOCK_M, D], tl.float32)
    drho = tl.zeros([BLOCK_M], tl.float32)
    first_key, last_key = span_of(cu_seqlens_k, s, M)
    if key_mask is not None:
        first_key, last_key = without_padding(first_key, last_key, b, key_mask, key_mask_strides, None, None, BLOCK_N)
    if query_mask is not None:
        last_key = end_if_any(live, first_key, last_key)
    full = first_key
    if FULL:
        full = first_key + (last_key - first_key) // BLOCK_N * BLOCK_N
        b_dq, drho = bwd_query_tiles(
            b_dq, drho, b_q, b_do, k, v, k_strides, v_strides, None, key_mask_strides, b, h, first_key, full, last_key,
            c, t_scale,
            d, dv, D, DV, BLOCK_N, False, HALF, PRECISION, DESCRIPTORS, WANT_Q, WANT_RHO,
        )  # fmt: skip
    if TAIL:
        b_dq, drho = bwd_query_tiles(
            b_dq, drho, b_q, b_do, k, v, k_strides, v_strides, key_mask, key_mask_strides, b, h, full, last_key, last_key,
            c, t_scale,
            d, dv, D, DV, BLOCK_N, True, HALF, PRECISION, DESCRIPTORS, WANT_Q, WANT_RHO,
        )  # fmt: skip
    if WANT_RHO:
        drho = tl.sum(tl.where(live, drho, 0.0)) * scale / (tl.load(norm + head) + eps)
        tl.store(drho_parts + part, rho * drho)
    if WANT_Q:
        b_dq = tl.where(live[:, None], b_dq * (gain / t_scale), 0.0)
        store_rows(dq, dq_strides, b_dq, b, h, row, end, d, D, BLOCK_M)


@triton.jit
def bwd_key_tiles(
    dk, dv_acc, b_k, b_v, q, dout, q_strides, dout_strides, query_mask, query_mask_strides, b, h, start, stop, N,
    c, t_scale, p_scale,
    d: tl.constexpr, dv: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, MASKED: tl.constexpr,
    HALF: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr, WANT_K: tl.constexpr, WANT_V: tl.constexpr,
):  # fmt: skip
    for first in range(start, stop, BLOCK_M):
        live = live_rows(first, N, b, query_mask, query_mask_strides, BLOCK_M)
        b_q = load_rows(q, q_strides, b, h, first, live, d, D, BLOCK_M, MASKED, DESCRIPTORS)
        b_do = load_rows(dout, dout_strides, b, h, first, live, dv, DV, BLOCK_M, MASKED, DESCRIPTORS)
        # [BLOCK_N, BLOCK_M], X transposed
        x = dot(b_k, tl.trans(b_q), None, PRECISION)
        if MASKED:
            x = tl.where(live[None, :], x, 0.0)
        if WANT_V:
            p = relu(x)
            if HALF:
                p = p * p_scale
            dv_acc = dot(p.to(b_do.dtype), b_do, dv_acc, PRECISION)
        if WANT_K:
            g = dot(b_v, tl.trans(b_do), None, PRECISION)
            t = tl.where(x <= 0.0, 0.0, g - c * x)
            if HALF:
                t = t * t_scale
            dk = dot(t.to(b_q.dtype), b_q, dk, PRECISION)
    return dk, dv_acc


@triton.jit(do_not_specialize=COUNTS)
def pure_bwd_keys_kernel(
    dout, q, k, v, query_mask, key_mask, head_rho, cu_seqlens_q, cu_seqlens_k, norm, parts,  # as above
    dk, dv_out,  # like k, like v
    dout_strides, q_strides, k_strides, v_strides, dk_strides, dv_strides, query_mask_strides, key_mask_strides,
    head_rho_strides, H, N, M, blocks, sequences, part_blocks, part_rows, heads, scale, eps, rho,
    d: tl.constexpr, dv: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    FULL: tl.constexpr, TAIL: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
    WANT_K: tl.constexpr, WANT_V: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    dout_strides, q_strides = in_elements(dout_strides, UNIT), in_elements(q_strides, UNIT)
    k_strides, v_strides = in_elements(k_strides, UNIT), in_elements(v_strides, UNIT)
    dk_strides, dv_strides = in_elements(dk_strides, UNIT), in_elements(dv_strides, UNIT)
    b, h, row_head, part, s, head, begin, col, end = where_am_i(blocks, H, cu_seqlens_k, sequences, M, BLOCK_N)
    if cu_seqlens_k is not None and col >= end:
        return
    head_gain = head_rho_at(rho, head_rho, head_rho_strides, s, h)
    gain, c, t_scale, p_scale = head_numbers(
        parts, part_blocks, part_rows, heads, norm, row_head, head, head_gain, cu_seqlens_q, s, N, scale, eps, d, dv, HALF,
    )  # fmt: skip
    live = live_rows(col, end, b, key_mask, key_mask_strides, BLOCK_N)
    b_k = load_rows(k, k_strides, b, h, col, live, d, D, BLOCK_N, True, DESCRIPTORS)
    b_v = load_rows(v, v_strides, b, h, col, live, dv, DV, BLOCK_N, True, DESCRIPTORS)
    b_dk = tl.zeros([BLOCK_N, D], tl.float32)
    b_dv = tl.zeros([BLOCK_N, DV], tl.float32)
    first_row, last_row = span_of(cu_seqlens_q, s, N)
    if query_mask is not None:
        first_row, last_row = without_padding(
            first_row, last_row, b, query_mask, query_mask_strides, None, None, BLOCK_M
        )
    if key_mask is not None:
        last_row = end_if_any(live, first_row, last_row)
    full = first_row
    if FULL:
        full = first_row + (last_row - first_row) // BLOCK_M * BLOCK_M
        b_dk, b_dv = bwd_key_tiles(
            b_dk, b_dv, b_k, b_v, q, dout, q_strides, dout_strides, None, query_mask_strides, b, h, first_row, full, last_row,
            c, t_scale, p_scale, d, dv, D, DV, BLOCK_M, False, HALF, PRECISION, DESCRIPTORS, WANT_K, WANT_V,
        )  # fmt: skip
    if TAIL:
        b_dk, b_dv = bwd_key_tiles(
            b_dk, b_dv, b_k, b_v, q, dout, q_strides, dout_strides, query_mask, query_mask_strides, b, h,
            full, last_row, last_row,
            c, t_scale, p_scale, d, dv, D, DV, BLOCK_M, True, HALF, PRECISION, DESCRIPTORS, WANT_K, WANT_V,
        )  # fmt: skip
    if WANT_K:
        b_dk = tl.where(live[:, None], b_dk * (gain / t_scale), 0.0)
        store_rows(dk, dk_strides, b_dk, b, h, col, end, d, D, BLOCK_N)
    if WANT_V:
        b_dv = tl.where(live[:, None], b_dv * (gain / p_scale), 0.0)
        store_rows(dv_out, dv_strides, b_dv, b, h, col, end, dv, DV, BLOCK_N)


@planned
def backward(
    dout, q, k, v, out, norm, eps, rho, head_rho, key_padding_mask, query_padding_mask, gradients, dout_out=None
):  # fmt: skip
    """dout_out: as in eager/pure.py."""
    if 0 in (*q.shape, *v.shape):
        return eager.backward
    few = dout_out is None and q.shape[2] * v.shape[2] <= eager.FEW_SCORES
    run = plan_backward(dout, q, k, v, out, eps, rho, head_rho, gradients, few, key_padding_mask, query_padding_mask)

    def run_all(
        dout, q, k, v, out, norm, eps, rho, head_rho, key_padding_mask, query_padding_mask, gradients, dout_out=None
    ):  # fmt: skip
        run(dout, q, k, v, out, norm, head_rho, gradients, key_padding_mask, query_padding_mask, dout_out=dout_out)

    return run_all


def plan_backward(
    dout, q, k, v, out, eps, rho, head_rho, gradients, few, key_padding_mask=None, query_padding_mask=None,
    packing: Packing | None = None,
):  # fmt: skip
    """(dout, q, k, v, out, norm, head_rho, gradients, masks, offsets, dout_out), which fills the gradients.

    few: whether there may be so few scores that <dO, O> is made from them. Packed sequences as in the forward pass.
    """
    countable("infsa::pure" if packing is None else packing.op, q, v)
    dout, q, k, v, out = (addressable(t) for t in (dout, q, k, v, out))
    B, H, N, d = q.shape
    M, dv = v.shape[2:]
    rows = configs.stream_rows(q, v)
    blocks = tiles_of_all(N, rows, packing)
    half = q.dtype == torch.float16
    sizes = {"d": d, "dv": dv, "D": padded(d, 16), "DV": padded(dv, 16), "HALF": half}
    masks = query_padding_mask, key_padding_mask
    sequences = None if packing is None else packing.sequences
    counts = sequences, blocks, rows, B * H, scale(q) ** 2, eps, rho
    seen = _seen(few, q, k, v, masks, None, head_rho)
    prepare = Launch(
        pure_bwd_prepare_kernel, B * H * blocks, q.device,
        dout.stride(), out.stride(), q.stride(), *(strides(t, 4) for t in seen[:2]), *(strides(t, 2) for t in seen[2:4]),
        strides(seen[5], 2), H, N, M, blocks, sequences, *counts[3:], ROWS=rows, PRECISION=configs.precision(q), FEW=few,
        **configs.prepare(q, few), **sizes,
    )  # fmt: skip
    # In float32 the tied kernel's three resident tiles would not fit into registers.
    one_pass = k is None and q.element_size() == 2
    twice = k is None and not one_pass
    plan = plan_tied if one_pass else _untied
    passes = plan(
        dout, q, q if twice else k, v, masks, head_rho, _both(gradients) if twice else gradients, counts, sizes, packing
    )

    new_parts = maker(q.device, torch.float32, 3 if half else 1, B, H, blocks)

    def run(
        dout, q, k, v, out, norm, head_rho, gradients, key_padding_mask=None, query_padding_mask=None,
        cu_seqlens_q=None, cu_seqlens_k=None, dout_out=None,
    ):  # fmt: skip
        dout, q, k, v, out = (addressable(t) for t in (dout, q, k, v, out))
        masks = query_padding_mask, key_padding_mask
        packed = cu_seqlens_q, cu_seqlens_k
        norm = norm.contiguous()
        parts = new_parts()
        prepare(dout, out, q, *_seen(few, q, k, v, masks, norm, head_rho), *packed, parts)
        if dout_out is not None:
            # It takes the place of the parts that these queries have of it.
            parts[0].zero_()[..., 0] = dout_out
        wanted = _both(gradients) if twice else gradients
        passes(dout, q, q if twice else k, v, masks, head_rho, packed, norm, parts, wanted)
        if twice and gradients[0] is not None:
            gradients[0].add_(wanted[1])

    return run


def _seen(few, q, k, v, masks, norm, head_rho) -> tuple:
    """What the preparation reads beside dout, out and q."""
    return (q if k is None else k, v, *masks, norm, head_rho) if few else (None, None, masks[0], None, None, None)


def _both(gradients) -> tuple:
    """The gradients of a tied call, with one for q as a key of its own."""
    dq, _, dv, dhead_rho = gradients
    return dq, None if dq is None else torch.empty_like(dq), dv, dhead_rho


def _untied(dout, q, k, v, masks, head_rho, gradients, counts, sizes, packing):
    dq, dk, dv, dhead_rho = gradients
    B, H, N, _ = q.shape
    M = v.shape[2]
    described = describable(masks, packing, q, dout, k, v)
    want_rho = dhead_rho is not None
    want_queries, want_keys = dq is not None or want_rho, dk is not None or dv is not None
    by_query, by_key = (
        configs.pure(q, v, kernel, described, packing is not None) for kernel in ("bwd_queries", "bwd_keys")
    )
    blocks, key_blocks = tiles_of_all(N, by_query.block_m, packing), tiles_of_all(M, by_key.block_n, packing)
    strides_of = dout.stride(), q.stride(), k.stride(), v.stride()
    mask_strides = tuple(strides(t, 2) for t in (*masks, head_rho))
    if want_queries:
        queries = Launch(
            pure_bwd_queries_kernel, B * H * blocks, q.device, *strides_of, strides(dq, 4), *mask_strides,
            H, N, M, blocks, *counts,
            DESCRIPTORS=described, WANT_Q=dq is not None, WANT_RHO=want_rho, **sizes, **by_query.options(q),
            **loops_over(q, M, by_query.block_n, masks[1] is not None, packing),
        )  # fmt: skip
    if want_keys:
        keys = Launch(
            pure_bwd_keys_kernel, B * H * key_blocks, q.device, *strides_of, strides(dk, 4), strides(dv, 4), *mask_strides,
            H, N, M, key_blocks, *counts,
            DESCRIPTORS=described, WANT_K=dk is not None, WANT_V=dv is not None, **sizes, **by_key.options(q),
            **loops_over(q, N, by_key.block_m, masks[0] is not None, packing),
        )  # fmt: skip
    new_drho_parts = maker(q.device, torch.float32, B, H, blocks)
    sum_up = sum_of_blocks(packing, N, H, blocks, by_query.block_m, q.device)
    of_query, of_key = (
        [tiles_of(t, c.block_m, described) for t in (dout, q)] + [tiles_of(t, c.block_n, described) for t in (k, v)]
        for c in (by_query, by_key)
    )

    def run(dout, q, k, v, masks, head_rho, packed, norm, parts, gradients):
        dq, dk, dv, dhead_rho = gradients
        read, rest = (dout, q, k, v), (*masks, head_rho, *packed, norm, parts)
        if want_queries:
            drho_parts = new_drho_parts() if want_rho else None
            queries(*(tiles(t) for tiles, t in zip(of_query, read)), *rest, dq, drho_parts)
            if want_rho:
                sum_up(drho_parts, packed[0], dhead_rho)
        if want_keys:
            keys(*(tiles(t) for tiles, t in zip(of_key, read)), *rest, dk, dv)

    return run

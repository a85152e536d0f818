"""The gradients of Pure InfSA; the equations stand in pure.py."""

import torch
import triton
import triton.language as tl

from ..eager import pure as eager
from ..eager.common import scale
from . import configs
from .launch import COUNTS, Launch, countable, padded, planned, relu, strides
from .tiles import (
    addressable,
    describable,
    dot,
    fold,
    head_rho_at,
    live_rows,
    load_rows,
    store_rows,
    tiles_of,
    where_am_i,
)

# Keys at a time where the preparation meets them.
FEW_KEYS = tl.constexpr(16)


@triton.jit(do_not_specialize=COUNTS)
def pure_bwd_prepare_kernel(
    dout, out, q, k, v, query_mask, key_mask, norm,  # (B, H, N, dv), like dout, (B, H, N, d), ..., (B, N), (B, M), (B, H)
    head_rho, parts,  # (B, H), (3, B, H, blocks)
    dout_strides, out_strides, q_strides, k_strides, v_strides, query_mask_strides, key_mask_strides, head_rho_strides,
    H, N, M, blocks, heads, scale, eps, rho,
    d: tl.constexpr, dv: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr,
    PRECISION: tl.constexpr, FEW: tl.constexpr,
):  # fmt: skip
    """Per block of rows: <dO, O>, and in float16 the longest row of dO and of q, which bound every product.

    FEW: <dO, O> = rho s^2 <ReLU(X), G> / (F + eps), whose O no dtype has rounded.
    """
    b, h, block, head = where_am_i(blocks, H)
    row = block * ROWS
    live = live_rows(row, N, b, query_mask, query_mask_strides, ROWS)
    b_do = load_rows(dout, dout_strides, b, h, row, live, dv, DV, ROWS, True, False)
    at = parts + head * blocks + block
    if FEW or HALF:
        b_q = load_rows(q, q_strides, b, h, row, live, d, D, ROWS, True, False)
    if FEW:
        products = tl.zeros([ROWS], tl.float32)
        for first in range(0, M, FEW_KEYS):
            keys = live_rows(first, M, b, key_mask, key_mask_strides, FEW_KEYS)
            b_k = load_rows(k, k_strides, b, h, first, keys, d, D, FEW_KEYS, True, False)
            b_v = load_rows(v, v_strides, b, h, first, keys, dv, DV, FEW_KEYS, True, False)
            x = dot(b_q, tl.trans(b_k), None, PRECISION)
            products += tl.sum(tl.where(x <= 0.0, 0.0, x * dot(b_do, tl.trans(b_v), None, PRECISION)), 1)
        gain = head_rho_at(rho, head_rho, head_rho_strides, b, h) * scale / (tl.load(norm + head) + eps)
        tl.store(at, tl.sum(products) * gain)
    b_do = b_do.to(tl.float32)
    if not FEW:
        b_out = load_rows(out, out_strides, b, h, row, live, dv, DV, ROWS, True, False).to(tl.float32)
        tl.store(at, tl.sum(b_do * b_out))
    if HALF:
        b_q = b_q.to(tl.float32)
        size = tl.cast(heads, tl.int64) * blocks
        tl.store(at + size, tl.sqrt(tl.max(tl.sum(b_do * b_do, 1))))
        tl.store(at + 2 * size, tl.sqrt(tl.max(tl.sum(b_q * b_q, 1))))


@triton.jit
def head_numbers(
    parts, part_blocks, heads, norm, head, rho, scale, eps, d: tl.constexpr, dv: tl.constexpr, HALF: tl.constexpr
):  # fmt: skip
    """s^2 g and c of the head, and the factors that bring T and ReLU(X) into float16's range (1 elsewhere)."""
    F = tl.load(norm + head)
    dout_out = fold(parts + head * part_blocks, part_blocks, False)
    c = tl.where((F > 0.0) & (rho != 0.0), dout_out * scale / (F * rho), 0.0)
    t_scale = 1.0
    p_scale = 1.0
    if HALF:
        # |G_ij| <= ||dO_i|| ||v_j|| <= dO_max sqrt(dv) 65504, |X_ij| <= q_max sqrt(d) 65504, and T may hold two of each.
        size = tl.cast(heads, tl.int64) * part_blocks
        dout_max = fold(parts + size + head * part_blocks, part_blocks, True)
        q_max = fold(parts + 2 * size + head * part_blocks, part_blocks, True)
        tiny = 1e-30
        p_scale = 1.0 / (q_max * tl.sqrt(d * 1.0) + tiny)
        t_scale = 0.5 / (dout_max * tl.sqrt(dv * 1.0) + tl.abs(c) * q_max * tl.sqrt(d * 1.0) + tiny)
    return rho * scale / (F + eps), c, t_scale, p_scale


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
    dout, q, k, v, query_mask, key_mask, head_rho, norm, parts,  # as in the forward pass; (3, B, H, part_blocks)
    dq, drho_parts,  # like q, (B, H, blocks)
    dout_strides, q_strides, k_strides, v_strides, dq_strides, query_mask_strides, key_mask_strides,
    head_rho_strides, H, N, M, blocks, part_blocks, heads, scale, eps, rho,
    d: tl.constexpr, dv: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
    WANT_Q: tl.constexpr, WANT_RHO: tl.constexpr,
):  # fmt: skip
    b, h, block, head = where_am_i(blocks, H)
    head_gain = head_rho_at(rho, head_rho, head_rho_strides, b, h)
    gain, c, t_scale, p_scale = head_numbers(parts, part_blocks, heads, norm, head, head_gain, scale, eps, d, dv, HALF)
    row = block * BLOCK_M
    live = live_rows(row, N, b, query_mask, query_mask_strides, BLOCK_M)
    b_q = load_rows(q, q_strides, b, h, row, live, d, D, BLOCK_M, True, DESCRIPTORS)
    b_do = load_rows(dout, dout_strides, b, h, row, live, dv, DV, BLOCK_M, True, DESCRIPTORS)
    b_dq = tl.zeros([BLOCK_M, D], tl.float32)
    drho = tl.zeros([BLOCK_M], tl.float32)
    full = 0
    if key_mask is None:
        full = M // BLOCK_N * BLOCK_N
        b_dq, drho = bwd_query_tiles(
            b_dq, drho, b_q, b_do, k, v, k_strides, v_strides, None, key_mask_strides, b, h, 0, full, M, c, t_scale,
            d, dv, D, DV, BLOCK_N, False, HALF, PRECISION, DESCRIPTORS, WANT_Q, WANT_RHO,
        )  # fmt: skip
    if TAIL:
        b_dq, drho = bwd_query_tiles(
            b_dq, drho, b_q, b_do, k, v, k_strides, v_strides, key_mask, key_mask_strides, b, h, full, M, M, c, t_scale,
            d, dv, D, DV, BLOCK_N, True, HALF, PRECISION, DESCRIPTORS, WANT_Q, WANT_RHO,
        )  # fmt: skip
    if WANT_RHO:
        drho = tl.sum(tl.where(live, drho, 0.0)) * scale / (tl.load(norm + head) + eps)
        tl.store(drho_parts + head * blocks + block, rho * drho)
    if WANT_Q:
        b_dq = tl.where(live[:, None], b_dq * (gain / t_scale), 0.0)
        store_rows(dq, dq_strides, b_dq, b, h, row, N, d, D, BLOCK_M)


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
    dout, q, k, v, query_mask, key_mask, head_rho, norm, parts,  # as above
    dk, dv_out,  # like k, like v
    dout_strides, q_strides, k_strides, v_strides, dk_strides, dv_strides, query_mask_strides, key_mask_strides,
    head_rho_strides, H, N, M, blocks, part_blocks, heads, scale, eps, rho,
    d: tl.constexpr, dv: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
    WANT_K: tl.constexpr, WANT_V: tl.constexpr,
):  # fmt: skip
    b, h, block, head = where_am_i(blocks, H)
    head_gain = head_rho_at(rho, head_rho, head_rho_strides, b, h)
    gain, c, t_scale, p_scale = head_numbers(parts, part_blocks, heads, norm, head, head_gain, scale, eps, d, dv, HALF)
    col = block * BLOCK_N
    live = live_rows(col, M, b, key_mask, key_mask_strides, BLOCK_N)
    b_k = load_rows(k, k_strides, b, h, col, live, d, D, BLOCK_N, True, DESCRIPTORS)
    b_v = load_rows(v, v_strides, b, h, col, live, dv, DV, BLOCK_N, True, DESCRIPTORS)
    b_dk = tl.zeros([BLOCK_N, D], tl.float32)
    b_dv = tl.zeros([BLOCK_N, DV], tl.float32)
    full = 0
    if query_mask is None:
        full = N // BLOCK_M * BLOCK_M
        b_dk, b_dv = bwd_key_tiles(
            b_dk, b_dv, b_k, b_v, q, dout, q_strides, dout_strides, None, query_mask_strides, b, h, 0, full, N,
            c, t_scale, p_scale, d, dv, D, DV, BLOCK_M, False, HALF, PRECISION, DESCRIPTORS, WANT_K, WANT_V,
        )  # fmt: skip
    if TAIL:
        b_dk, b_dv = bwd_key_tiles(
            b_dk, b_dv, b_k, b_v, q, dout, q_strides, dout_strides, query_mask, query_mask_strides, b, h, full, N, N,
            c, t_scale, p_scale, d, dv, D, DV, BLOCK_M, True, HALF, PRECISION, DESCRIPTORS, WANT_K, WANT_V,
        )  # fmt: skip
    if WANT_K:
        b_dk = tl.where(live[:, None], b_dk * (gain / t_scale), 0.0)
        store_rows(dk, dk_strides, b_dk, b, h, col, M, d, D, BLOCK_N)
    if WANT_V:
        b_dv = tl.where(live[:, None], b_dv * (gain / p_scale), 0.0)
        store_rows(dv_out, dv_strides, b_dv, b, h, col, M, dv, DV, BLOCK_N)


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
    query_mask, key_mask, head_rho, norm, parts, dq, dv_out, drho_parts,
    dout_strides, q_strides, v_strides, dq_strides, dv_strides, query_mask_strides, key_mask_strides, head_rho_strides,
    H, N, blocks, part_blocks, heads, scale, eps, rho,
    d: tl.constexpr, dv: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
    WANT_Q: tl.constexpr, WANT_V: tl.constexpr, WANT_RHO: tl.constexpr,
):  # fmt: skip
    b, h, block, head = where_am_i(blocks, H)
    head_gain = head_rho_at(rho, head_rho, head_rho_strides, b, h)
    gain, c, t_scale, p_scale = head_numbers(parts, part_blocks, heads, norm, head, head_gain, scale, eps, d, dv, HALF)
    row = block * BLOCK_M
    asks = live_rows(row, N, b, query_mask, query_mask_strides, BLOCK_M)
    answers = live_rows(row, N, b, key_mask, key_mask_strides, BLOCK_M)
    b_q = load_rows(q, q_strides, b, h, row, asks | answers, d, D, BLOCK_M, True, False)
    b_do = load_rows(dout, dout_strides, b, h, row, asks, dv, DV, BLOCK_M, True, False)
    b_v = load_rows(v, v_strides, b, h, row, answers, dv, DV, BLOCK_M, True, False)
    b_dq = tl.zeros([BLOCK_M, D], tl.float32)
    b_dv = tl.zeros([BLOCK_M, DV], tl.float32)
    drho = tl.zeros([BLOCK_M], tl.float32)
    full = 0
    if query_mask is None and key_mask is None:
        full = N // BLOCK_N * BLOCK_N
        b_dq, b_dv, drho = bwd_tied_tiles(
            b_dq, b_dv, drho, b_q, b_do, b_v, asks, answers, q_tiles, dout_tiles, v_tiles, q_strides, dout_strides, v_strides,
            None, None, query_mask_strides, key_mask_strides, b, h, 0, full, N, c, t_scale, p_scale,
            d, dv, D, DV, BLOCK_N, False, HALF, PRECISION, DESCRIPTORS, WANT_Q, WANT_V, WANT_RHO,
        )  # fmt: skip
    if TAIL:
        b_dq, b_dv, drho = bwd_tied_tiles(
            b_dq, b_dv, drho, b_q, b_do, b_v, asks, answers, q_tiles, dout_tiles, v_tiles, q_strides, dout_strides, v_strides,
            query_mask, key_mask, query_mask_strides, key_mask_strides, b, h, full, N, N, c, t_scale, p_scale,
            d, dv, D, DV, BLOCK_N, True, HALF, PRECISION, DESCRIPTORS, WANT_Q, WANT_V, WANT_RHO,
        )  # fmt: skip
    if WANT_RHO:
        # Every pair came twice.
        drho = tl.sum(tl.where(asks | answers, drho, 0.0)) * 0.5 * scale / (tl.load(norm + head) + eps)
        tl.store(drho_parts + head * blocks + block, rho * drho)
    if WANT_Q:
        b_dq = tl.where((asks | answers)[:, None], b_dq * (gain / t_scale), 0.0)
        store_rows(dq, dq_strides, b_dq, b, h, row, N, d, D, BLOCK_M)
    if WANT_V:
        b_dv = tl.where(answers[:, None], b_dv * (gain / p_scale), 0.0)
        store_rows(dv_out, dv_strides, b_dv, b, h, row, N, dv, DV, BLOCK_M)


@planned
def backward(
    dout, q, k, v, out, norm, eps, rho, head_rho, key_padding_mask, query_padding_mask, gradients, dout_out=None
):  # fmt: skip
    """dout_out: as in eager/pure.py."""
    if 0 in (*q.shape, *v.shape):
        return eager.backward
    countable("infsa::pure", q, v)
    dout, q, k, v, out = (addressable(t) for t in (dout, q, k, v, out))
    B, H, N, d = q.shape
    M, dv = v.shape[2:]
    rows = configs.stream_rows(q, v)
    blocks = triton.cdiv(N, rows)
    half = q.dtype == torch.float16
    sizes = {"d": d, "dv": dv, "D": padded(d, 16), "DV": padded(dv, 16), "HALF": half}
    masks = query_padding_mask, key_padding_mask
    per_head = H, blocks, B * H, scale(q) ** 2, eps, rho
    few = dout_out is None and N * M <= eager.FEW_SCORES
    seen = _seen(few, q, k, v, masks, None, head_rho)
    prepare = Launch(
        pure_bwd_prepare_kernel, B * H * blocks, q.device,
        dout.stride(), out.stride(), q.stride(), *(strides(t, 4) for t in seen[:2]), *(strides(t, 2) for t in seen[2:4]),
        strides(seen[5], 2), H, N, M, blocks, *per_head[2:], ROWS=rows, PRECISION=configs.precision(q), FEW=few,
        num_warps=4, **sizes,
    )  # fmt: skip
    # In float32 the tied kernel's three resident tiles would not fit into registers.
    one_pass = k is None and q.element_size() == 2
    split = k is None and not one_pass
    plan = _tied if one_pass else _untied
    passes = plan(
        dout, q, q if split else k, v, masks, head_rho, _both(gradients) if split else gradients, per_head, sizes
    )

    def run(
        dout, q, k, v, out, norm, eps, rho, head_rho, key_padding_mask, query_padding_mask, gradients, dout_out=None
    ):  # fmt: skip
        dout, q, k, v, out = (addressable(t) for t in (dout, q, k, v, out))
        masks = query_padding_mask, key_padding_mask
        norm = norm.contiguous()
        parts = q.new_empty((3 if half else 1, B, H, blocks), dtype=torch.float32)
        prepare(dout, out, q, *_seen(few, q, k, v, masks, norm, head_rho), parts)
        if dout_out is not None:
            # It takes the place of the parts that these queries have of it.
            parts[0].zero_()[..., 0] = dout_out
        wanted = _both(gradients) if split else gradients
        passes(dout, q, q if split else k, v, masks, head_rho, norm, parts, wanted)
        if split and gradients[0] is not None:
            gradients[0].add_(wanted[1])

    return run


def _seen(few, q, k, v, masks, norm, head_rho) -> tuple:
    """What the preparation reads beside dout, out and q."""
    return (q if k is None else k, v, *masks, norm, head_rho) if few else (None, None, masks[0], None, None, None)


def _both(gradients) -> tuple:
    """The gradients of a tied call, with one for q as a key of its own."""
    dq, _, dv, dhead_rho = gradients
    return dq, None if dq is None else torch.empty_like(dq), dv, dhead_rho


def _tied(dout, q, k, v, masks, head_rho, gradients, per_head, sizes):
    dq, _, dv, dhead_rho = gradients
    B, H, N, _ = q.shape
    described = describable(masks, q, dout, v)
    config = configs.pure(q, v, "bwd_tied", described)
    blocks = triton.cdiv(N, config.block_m)
    want_rho = dhead_rho is not None
    H, part_blocks, heads, *numbers = per_head
    launch = Launch(
        pure_bwd_tied_kernel, B * H * blocks, q.device,
        dout.stride(), q.stride(), v.stride(), strides(dq, 4), strides(dv, 4),
        *(strides(t, 2) for t in (*masks, head_rho)), H, N, blocks, part_blocks, heads, *numbers,
        TAIL=masks != (None, None) or N % config.block_n != 0, DESCRIPTORS=described,
        WANT_Q=dq is not None, WANT_V=dv is not None, WANT_RHO=want_rho, **sizes, **config.options(q),
    )  # fmt: skip
    q_tiles, dout_tiles, v_tiles = (tiles_of(t, config.block_n, described) for t in (q, dout, v))

    def run(dout, q, k, v, masks, head_rho, norm, parts, gradients):
        dq, _, dv, dhead_rho = gradients
        drho_parts = q.new_empty((B, H, blocks), dtype=torch.float32) if want_rho else None
        launch(dout, q, v, q_tiles(q), dout_tiles(dout), v_tiles(v), *masks, head_rho, norm, parts, dq, dv, drho_parts)
        if want_rho:
            torch.sum(drho_parts, -1, out=dhead_rho)

    return run


def _untied(dout, q, k, v, masks, head_rho, gradients, per_head, sizes):
    dq, dk, dv, dhead_rho = gradients
    B, H, N, _ = q.shape
    M = v.shape[2]
    H, part_blocks, heads, *numbers = per_head
    described = describable(masks, q, dout, k, v)
    want_rho = dhead_rho is not None
    want_queries, want_keys = dq is not None or want_rho, dk is not None or dv is not None
    by_query, by_key = (configs.pure(q, v, kernel, described) for kernel in ("bwd_queries", "bwd_keys"))
    blocks, key_blocks = triton.cdiv(N, by_query.block_m), triton.cdiv(M, by_key.block_n)
    strides_of = dout.stride(), q.stride(), k.stride(), v.stride()
    mask_strides = tuple(strides(t, 2) for t in (*masks, head_rho))
    if want_queries:
        queries = Launch(
            pure_bwd_queries_kernel, B * H * blocks, q.device, *strides_of, strides(dq, 4), *mask_strides,
            H, N, M, blocks, part_blocks, heads, *numbers,
            TAIL=masks[1] is not None or M % by_query.block_n != 0, DESCRIPTORS=described,
            WANT_Q=dq is not None, WANT_RHO=want_rho, **sizes, **by_query.options(q),
        )  # fmt: skip
    if want_keys:
        keys = Launch(
            pure_bwd_keys_kernel, B * H * key_blocks, q.device, *strides_of, strides(dk, 4), strides(dv, 4), *mask_strides,
            H, N, M, key_blocks, part_blocks, heads, *numbers,
            TAIL=masks[0] is not None or N % by_key.block_m != 0, DESCRIPTORS=described,
            WANT_K=dk is not None, WANT_V=dv is not None, **sizes, **by_key.options(q),
        )  # fmt: skip
    of_query, of_key = (
        [tiles_of(t, c.block_m, described) for t in (dout, q)] + [tiles_of(t, c.block_n, described) for t in (k, v)]
        for c in (by_query, by_key)
    )

    def run(dout, q, k, v, masks, head_rho, norm, parts, gradients):
        dq, dk, dv, dhead_rho = gradients
        read, rest = (dout, q, k, v), (*masks, head_rho, norm, parts)
        if want_queries:
            drho_parts = q.new_empty((B, H, blocks), dtype=torch.float32) if want_rho else None
            queries(*(tiles(t) for tiles, t in zip(of_query, read)), *rest, dq, drho_parts)
            if want_rho:
                torch.sum(drho_parts, -1, out=dhead_rho)
        if want_keys:
            keys(*(tiles(t) for tiles, t in zip(of_key, read)), *rest, dk, dv)

    return run

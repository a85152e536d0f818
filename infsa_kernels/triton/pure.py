"""Pure InfSA in Triton.

    X = q k^T,  P = s^2 ReLU(X),  F = ||P||_F,  O = rho P v / (F + eps)                  X is (N, M) and never held

A program owns BLOCK_M rows of the output and walks over the other side in tiles: two products per tile forward, no exponential,
no running maximum, nothing rescaled; s^2 and 1/(F + eps) are applied once at the end. F is known only when every program is done,
so the forward pass stores O unnormalised with partial sums of squares, and a second, cheap kernel multiplies.
Backward needs two numbers per head, g = rho / (F + eps) and c = s^2 <dO, O> / (F rho) (docs/pure.md):

    G = dO v^T,  T = [X > 0] (G - c X),  dq = s^2 g T k,  dk = s^2 g T^T q,  dv = s^2 g ReLU(X)^T dO

Untied: one kernel whose programs own rows of dq, one whose programs own rows of dk and dv. Tied, X is symmetric: one kernel,
    dq_i = s^2 g sum_j [X_ij > 0] (G_ij + G_ji - 2 c X_ij) q_j,   dv_i = s^2 g sum_j ReLU(X_ij) dO_j,
five products instead of seven. No kernel transposes the result of a product, which Triton 3.4 to 3.7.0 miscompile on Hopper.

float16 cannot hold every X, G or O that float16 inputs make. There (HALF) ReLU(X) and T are scaled by powers of two or by
per-head bounds before they are rounded, and O is stored with a power of two per row.
"""

import torch
import triton
import triton.language as tl

from ..eager import pure as eager
from ..eager.common import scale
from . import configs
from .launch import SIZES, Launch, countable, in_elements, maker, padded, planned, relu, strides
from .packed import Packing, span_of, tiles_of_all, tiles_of_sequence
from .pure_backward import backward
from .tiles import (
    addressable,
    describable,
    dot,
    end_if_any,
    fold,
    head_rho_at,
    live_rows,
    load_rows,
    loops_over,
    power_of_two_below_inverse,
    store_rows,
    tiles_of,
    where_am_i,
    without_padding,
)  # fmt: skip

__all__ = ["backward", "forward"]


@triton.jit
def half_scale(b_q, D: tl.constexpr):
    """c_i, a power of two with ||c_i q_i|| sqrt(d) < 1, so that |c_i X_ij| is below the largest element of k."""
    x = b_q.to(tl.float32)
    return power_of_two_below_inverse(tl.sqrt(tl.sum(x * x, 1) * D))


@triton.jit
def fwd_tiles(
    acc, squares, b_q, row_scale, k, v, k_strides, v_strides, key_mask, key_mask_strides, b, h, start, stop, M,
    d: tl.constexpr, dv: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    for first in range(start, stop, BLOCK_N):
        live = live_rows(first, M, b, key_mask, key_mask_strides, BLOCK_N)
        b_k = load_rows(k, k_strides, b, h, first, live, d, D, BLOCK_N, MASKED, DESCRIPTORS)
        b_v = load_rows(v, v_strides, b, h, first, live, dv, DV, BLOCK_N, MASKED, DESCRIPTORS)
        p = relu(dot(b_q, tl.trans(b_k), None, PRECISION))
        if HALF:
            p = p * row_scale[:, None]
        if MASKED:
            p = tl.where(live[None, :], p, 0.0)
        squares += tl.sum(p * p, 1)
        acc = dot(p.to(b_v.dtype), b_v, acc, PRECISION)
    return acc, squares


@triton.jit(do_not_specialize=SIZES)
def pure_fwd_kernel(
    q, k, v, query_mask, key_mask,  # (B, H, N, d), (B, H, M, d), (B, H, M, dv), (B, N), (B, M)
    cu_seqlens_q, cu_seqlens_k,  # of packed sequences (S + 1), and a norm is (S, H) there
    out, square_parts, row_scales,  # (B, H, N, dv) unnormalised, (B, H, blocks), (B, H, N)
    q_strides, k_strides, v_strides, out_strides, query_mask_strides, key_mask_strides, H, N, M, blocks, sequences,
    d: tl.constexpr, dv: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    FULL: tl.constexpr, TAIL: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    q_strides, k_strides = in_elements(q_strides, UNIT), in_elements(k_strides, UNIT)
    v_strides, out_strides = in_elements(v_strides, UNIT), in_elements(out_strides, UNIT)
    b, h, row_head, part, s, head, begin, row, end = where_am_i(blocks, H, cu_seqlens_q, sequences, N, BLOCK_M)
    if cu_seqlens_q is not None and (row > begin) & (row >= end):
        return
    live = live_rows(row, end, b, query_mask, query_mask_strides, BLOCK_M)
    b_q = load_rows(q, q_strides, b, h, row, live, d, D, BLOCK_M, True, DESCRIPTORS)
    # It scales P and not q: products whose q is made in registers would wait for one another on Hopper.
    row_scale = half_scale(b_q, D) if HALF else tl.full([BLOCK_M], 1.0, tl.float32)
    acc = tl.zeros([BLOCK_M, DV], tl.float32)
    squares = tl.zeros([BLOCK_M], tl.float32)
    first_key, last_key = span_of(cu_seqlens_k, s, M)
    if key_mask is not None:
        first_key, last_key = without_padding(first_key, last_key, b, key_mask, key_mask_strides, None, None, BLOCK_N)
    if query_mask is not None:
        last_key = end_if_any(live, first_key, last_key)
    full = first_key
    if FULL:
        full = first_key + (last_key - first_key) // BLOCK_N * BLOCK_N
        acc, squares = fwd_tiles(
            acc, squares, b_q, row_scale, k, v, k_strides, v_strides, None, key_mask_strides, b, h, first_key, full, last_key,
            d, dv, D, DV, BLOCK_N, False, PRECISION, DESCRIPTORS, HALF,
        )  # fmt: skip
    if TAIL:
        acc, squares = fwd_tiles(
            acc, squares, b_q, row_scale, k, v, k_strides, v_strides, key_mask, key_mask_strides, b, h, full, last_key, last_key,
            d, dv, D, DV, BLOCK_N, True, PRECISION, DESCRIPTORS, HALF,
        )  # fmt: skip
    if HALF:
        t = power_of_two_below_inverse(tl.max(tl.abs(acc), 1))
        acc = acc * t[:, None]
        squares = squares / (row_scale * row_scale)
        rows = row + tl.arange(0, BLOCK_M)
        tl.store(row_scales + row_head * N + rows, 1.0 / (row_scale * t), mask=rows < end)
    tl.store(square_parts + part, tl.sum(tl.where(live, squares, 0.0)))
    store_rows(out, out_strides, acc, b, h, row, end, dv, DV, BLOCK_M)


@triton.jit(do_not_specialize=SIZES)
def pure_rescale_kernel(
    out, square_parts, row_scales, query_mask, head_rho, cu_seqlens_q, norm,  # as above; (B, H)
    out_strides, query_mask_strides, head_rho_strides, H, N, blocks, sequences, square_blocks, part_rows, scale, eps, rho,
    dv: tl.constexpr, DV: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    out_strides = in_elements(out_strides, UNIT)
    b, h, row_head, part, s, head, begin, row, end = where_am_i(blocks, H, cu_seqlens_q, sequences, N, ROWS)
    if cu_seqlens_q is not None and (row > begin) & (row >= end):
        return
    first, count = tiles_of_sequence(cu_seqlens_q, s, N, part_rows, square_blocks)
    F = tl.sqrt(fold(square_parts + row_head * square_blocks + first, count, False)) * scale
    if row == begin:
        tl.store(norm + head, F)
    gain = head_rho_at(rho, head_rho, head_rho_strides, s, h) * scale / (F + eps)
    live = live_rows(row, end, b, query_mask, query_mask_strides, ROWS)
    b_out = load_rows(out, out_strides, b, h, row, live, dv, DV, ROWS, True, False).to(tl.float32) * gain
    if HALF:
        rows = row + tl.arange(0, ROWS)
        b_out = b_out * tl.load(row_scales + row_head * N + rows, mask=live, other=0.0)[:, None]
    store_rows(out, out_strides, tl.where(live[:, None], b_out, 0.0), b, h, row, end, dv, DV, ROWS)


@planned
def forward(q, k, v, eps, rho, head_rho, key_padding_mask, query_padding_mask, dtype=None):
    """dtype: of the output, if not that of q."""
    if 0 in (*q.shape, *v.shape):
        return _forward_of_nothing
    like = eager.output_like(q, v, dtype)
    new_out = maker(like.device, like.dtype, *like.shape, steps=like.stride())
    multiply = plan_forward(q, k, v, like, eps, rho, head_rho, key_padding_mask, query_padding_mask)

    def run(q, k, v, eps, rho, head_rho, key_padding_mask, query_padding_mask, dtype=None):
        out = new_out()
        return out, multiply(q, k, v, out, head_rho, key_padding_mask, query_padding_mask)

    return run


def plan_forward(
    q, k, v, out, eps, rho, head_rho, key_padding_mask=None, query_padding_mask=None, packing: Packing | None = None
):  # fmt: skip
    """(q, k, v, out, head_rho, masks, offsets) -> the norm; fills out.

    Where sequences are packed, of all of them: q, k, v and out are a batch of one, and there are both offsets.
    """
    op = "infsa::pure" if packing is None else packing.op
    countable(op, q, v)
    B, H, N, d = q.shape
    M, dv = v.shape[2:]
    rows = configs.stream_rows(q, v)
    if rows * out.stride(2) >= 1 << 31:
        raise ValueError(
            f"{op}: the output, laid out as q, has {out.stride(2)} elements from token to token, the Triton kernels take "
            f"fewer than {(1 << 31) // rows}; pass q.contiguous()"
        )
    masks = strides(query_padding_mask, 2), strides(key_padding_mask, 2)
    k = q if k is None else k
    q, k, v = addressable(q), addressable(k), addressable(v)
    described = describable((query_padding_mask, key_padding_mask), packing, q, k, v)
    config = configs.pure(q, v, "fwd", described, packing is not None)
    blocks, rescale_blocks = tiles_of_all(N, config.block_m, packing), tiles_of_all(N, rows, packing)
    samples, sequences = (B, None) if packing is None else (packing.sequences, packing.sequences)
    half = q.dtype == torch.float16
    sizes = {"dv": dv, "DV": padded(dv, 16), "HALF": half}
    loops = loops_over(q, M, config.block_n, key_padding_mask is not None, packing)
    multiply = Launch(
        pure_fwd_kernel, B * H * blocks, q.device, q.stride(), k.stride(), v.stride(), out.stride(), *masks,
        H, N, M, blocks, sequences, d=d, D=padded(d, 16), **loops, DESCRIPTORS=described, **sizes, **config.options(q),
    )  # fmt: skip
    rescale = Launch(
        pure_rescale_kernel, B * H * rescale_blocks, q.device, out.stride(), masks[0], strides(head_rho, 2),
        H, N, rescale_blocks, sequences, blocks, config.block_m, scale(q) ** 2, eps, rho, ROWS=rows, num_warps=4, **sizes,
    )  # fmt: skip
    q_tiles, k_tiles, v_tiles = (
        tiles_of(t, size, described) for t, size in ((q, config.block_m), (k, config.block_n), (v, config.block_n))
    )

    new_norm, new_square_parts, new_row_scales = (
        maker(q.device, torch.float32, *shape) for shape in ((samples, H), (B, H, blocks), (B, H, N))
    )

    def run(
        q, k, v, out, head_rho, key_padding_mask=None, query_padding_mask=None, cu_seqlens_q=None, cu_seqlens_k=None
    ):
        k = q if k is None else k
        q, k, v = addressable(q), addressable(k), addressable(v)
        norm, square_parts, row_scales = new_norm(), new_square_parts(), new_row_scales() if half else None
        multiply(
            q_tiles(q), k_tiles(k), v_tiles(v), query_padding_mask, key_padding_mask, cu_seqlens_q, cu_seqlens_k,
            out, square_parts, row_scales,
        )  # fmt: skip
        rescale(out, square_parts, row_scales, query_padding_mask, head_rho, cu_seqlens_q, norm)
        return norm

    return run


def _forward_of_nothing(*arguments, dtype=None):
    out, norm = eager.forward(*arguments)
    return out.to(dtype or out.dtype), norm

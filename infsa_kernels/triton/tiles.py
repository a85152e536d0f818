"""Tiles of rows for Pure InfSA: loading, storing, products, and the per-head totals that every program needs."""

from collections.abc import Callable

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import configs
from .launch import INTERPRETED, padded
from .packed import Packing, sequence_of_tile, span_of, tiles_of_sequence

# Rows of the largest tile in configs.py.
LARGEST_TILE = 256

# The interpreter multiplies the raw bits of bfloat16 (Triton 3.6 to 3.9).
UPCAST = tl.constexpr(INTERPRETED)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def load_rows(
    x, x_strides, b, h, first, live, d: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, MASKED: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Rows first .. first + ROWS of head h: [ROWS, D]. MASKED: rows that are not live become 0 and are not read."""
    if DESCRIPTORS:
        tile = x.load([b, h, first, 0]).reshape(ROWS, D)
    else:
        stride_b, stride_h, stride_n, stride_d = x_strides
        dims = tl.arange(0, D)
        p_x = x + b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h + tl.cast(first, tl.int64) * stride_n
        p_x = p_x + (tl.arange(0, ROWS)[:, None] * stride_n + dims[None, :] * stride_d)
        if MASKED:
            tile = tl.load(p_x, mask=live[:, None] & (dims < d)[None, :], other=0.0)
        elif d == D:
            tile = tl.load(p_x)
        else:
            tile = tl.load(p_x, mask=(dims < d)[None, :], other=0.0)
    return tile


@triton.jit
def store_rows(x, x_strides, value, b, h, first, size, d: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr):
    stride_b, stride_h, stride_n, stride_d = x_strides
    rows, dims = tl.arange(0, ROWS), tl.arange(0, D)
    p_x = x + b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h + tl.cast(first, tl.int64) * stride_n
    p_x = p_x + rows.to(tl.int64)[:, None] * stride_n + dims.to(tl.int64)[None, :] * stride_d
    tl.store(p_x, value.to(x.dtype.element_ty), mask=(first + rows < size)[:, None] & (dims < d)[None, :])


@triton.jit
def live_rows(first, size, b, mask, mask_strides, ROWS: tl.constexpr):
    """Which of ROWS rows exist and are not ignored."""
    rows = first + tl.arange(0, ROWS)
    live = rows < size
    if mask is not None:
        stride_b, stride_n = mask_strides
        live = live & (
            tl.load(mask + b.to(tl.int64) * stride_b + rows.to(tl.int64) * stride_n, mask=live, other=1) == 0
        )
    return live


# Rows of a mask that are looked at together.
SCANNED = tl.constexpr(2048)


@triton.jit
def without_padding(first, last, b, mask, mask_strides, also, also_strides, TILE: tl.constexpr):
    """first .. last without the tiles before the first and behind the last row that counts: what `mask` ignores, and `also` where
    there is one. Nothing is left of it where no row counts."""
    begin, end = last, first
    for at in range(first, last, SCANNED):
        rows = at + tl.arange(0, SCANNED)
        live = live_rows(at, last, b, mask, mask_strides, SCANNED)
        if also is not None:
            live = live | live_rows(at, last, b, also, also_strides, SCANNED)
        begin = tl.minimum(begin, tl.min(tl.where(live, rows, last)))
        end = tl.maximum(end, tl.max(tl.where(live, rows + 1, first)))
    return first + (begin - first) // TILE * TILE, end


@triton.jit
def end_if_any(live, first, last):
    """last, or first where none of these rows is live: a loop over the other side then has nothing to do."""
    return tl.where(tl.max(live.to(tl.int32)) > 0, last, first)


@triton.jit
def power_of_two_below_inverse(x):
    """The largest power of two c with c x < 1, for normal float32 x >= 0."""
    exponent = (x.to(tl.int32, bitcast=True) >> 23) & 0xFF
    return ((253 - tl.minimum(exponent, 252)) << 23).to(tl.float32, bitcast=True)


@triton.jit
def where_am_i(blocks, H, cu_seqlens, sequences, size, ROWS: tl.constexpr):
    """Of this program: batch, head, the number of the head in (B, H), that of its block among all; the sample or sequence s, the
    number of its head, and of its rows the first of s, the first of this block, and where s ends."""
    pid = tl.program_id(0)
    row_head = pid // blocks
    b, h = row_head // H, row_head % H
    s, block = sequence_of_tile(cu_seqlens, sequences, pid % blocks, size, ROWS, b)
    begin, end = span_of(cu_seqlens, s, size)
    return b, h, row_head.to(tl.int64), pid.to(tl.int64), s, s.to(tl.int64) * H + h, begin, begin + block * ROWS, end


@triton.jit
def fold(parts, count, MAXIMUM: tl.constexpr):
    """The sum or the maximum of `count` partial results, always in the same order."""
    total = tl.zeros([1024], tl.float32)
    for first in range(0, count, 1024):
        at = first + tl.arange(0, 1024)
        part = tl.load(parts + at, mask=at < count, other=0.0)
        if MAXIMUM:
            total = tl.maximum(total, part, propagate_nan=tl.PropagateNan.ALL)
        else:
            total += part
    if MAXIMUM:
        result = tl.max(total)
    else:
        result = tl.sum(total)
    return result


@triton.jit
def head_rho_at(rho, head_rho, head_rho_strides, b, h):
    if head_rho is not None:
        stride_b, stride_h = head_rho_strides
        rho = rho * tl.load(head_rho + b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h)
    return rho


@triton.jit
def head_numbers(
    parts, part_blocks, part_rows, heads, norm, row_head, head, rho, cu_seqlens_q, s, N, scale, eps,
    d: tl.constexpr, dv: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """s^2 g and c of the head, and the factors that bring T and ReLU(X) into float16's range (1 elsewhere)."""
    F = tl.load(norm + head)
    first, count = tiles_of_sequence(cu_seqlens_q, s, N, part_rows, part_blocks)
    parts += row_head * part_blocks + first
    dout_out = fold(parts, count, False)
    c = tl.where((F > 0.0) & (rho != 0.0), dout_out * scale / (F * rho), 0.0)
    t_scale = 1.0
    p_scale = 1.0
    if HALF:
        # |G_ij| <= ||dO_i|| ||v_j|| <= dO_max sqrt(dv) 65504, |X_ij| <= q_max sqrt(d) 65504, and T may hold two of each.
        size = tl.cast(heads, tl.int64) * part_blocks
        dout_max = fold(parts + size, count, True)
        q_max = fold(parts + 2 * size, count, True)
        tiny = 1e-30
        p_scale = 1.0 / (q_max * tl.sqrt(d * 1.0) + tiny)
        t_scale = 0.5 / (dout_max * tl.sqrt(dv * 1.0) + tl.abs(c) * q_max * tl.sqrt(d * 1.0) + tiny)
    return rho * scale / (F + eps), c, t_scale, p_scale


def loops_over(q: Tensor, rows: int, tile: int, masked: bool, packing: Packing | None) -> dict[str, bool]:
    """Whether a kernel loops over whole tiles, asking for no mask, and over the tail, which is all there is if rows are masked.

    Packed sequences may each have a tail. With these, float32 has no register to spare for both loops, and hardly notices a mask.
    """
    full = not masked and (packing is None or q.element_size() == 2)
    return {"FULL": full, "TAIL": not full or packing is not None or rows % tile != 0}


def describable(masks: tuple[Tensor | None, ...], packing: Packing | None, *tensors: Tensor) -> bool:
    """Whether the copy engine of this GPU can fetch their tiles: no row left out, contiguous rows, steps of 16 bytes.

    It would fetch those of a sequence's neighbour too.
    """
    return (
        packing is None
        and configs.arch_of(tensors[0].device) in configs.DESCRIBED
        and all(mask is None for mask in masks)
        and all(
            t.element_size() == 2
            and t.stride(3) == 1
            and t.data_ptr() % 16 == 0
            and all(
                n == 1 or (step > 0 and step * t.element_size() % 16 == 0) for n, step in zip(t.shape[:3], t.stride())
            )
            for t in tensors
        )
    )


def tiles_of(t: Tensor, rows: int, described: bool) -> Callable[[Tensor], Tensor | TensorDescriptor]:
    """How a kernel is given tensors like t (B, H, N, d) to read tiles of ``rows`` rows: as they are, or as descriptors."""
    if not described:
        return itself
    # The step of a dimension of size 1 is never taken, but has to be valid.
    steps = [
        step if n > 1 else t.shape[3] * t.element_size() // 16 * 16 or 16 for n, step in zip(t.shape[:3], t.stride())
    ]
    checked = TensorDescriptor(t, list(t.shape), [*steps, 1], [1, 1, rows, padded(t.shape[3], 16)])
    settled = vars(checked) | {"base": None}

    def describe(t):
        # As it is made, but for what is checked then, which takes as long as a launch.
        descriptor = object.__new__(TensorDescriptor)
        vars(descriptor).update(settled, base=t)
        return descriptor

    return describe


def itself(t: Tensor) -> Tensor:
    return t


def addressable(t: Tensor | None) -> Tensor | None:
    """t, or a copy where its strides take a tile beyond the 32-bit offsets that loops use inside a tile."""
    if t is None or LARGEST_TILE * t.stride(2) + t.shape[3] * t.stride(3) < 1 << 31:
        return t
    return t.contiguous()

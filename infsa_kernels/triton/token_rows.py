"""LayerNorm without an affine part of tokens (B, N, D), for kernels that read tokens: statistics, rows, and its gradient."""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, ceil_div, maker, padded, strides

# Tokens of a program, and channels at a time: 16 elements a thread.
ROWS, CHANNELS, WARPS = 8, 256, 4


@triton.jit
def load_row(x, x_strides, padding_mask, mask_strides, b, rows, N, k, D: tl.constexpr, BK: tl.constexpr):
    """BK channels of tokens in float32, 0 where a token is removed, and which of them exist in x, and which are kept."""
    exist = rows < N
    live = exist
    if padding_mask is not None:
        stride_b, stride_n = mask_strides
        live = live & (tl.load(padding_mask + b * stride_b + rows * stride_n, mask=exist, other=1) == 0)
    c = k + tl.arange(0, BK)
    stride_b, stride_n, stride_c = x_strides
    at = (b * stride_b + rows * stride_n)[:, None] + c[None, :].to(tl.int64) * stride_c
    kept = live[:, None] & (c < D)[None, :]
    return tl.load(x + at, mask=kept, other=0.0).to(tl.float32), exist[:, None] & (c < D)[None, :], kept, at


@triton.jit(do_not_specialize=["N", "blocks"])
def statistics_kernel(
    x, padding_mask, statistics, normalised,  # (B, N, D), (B, N), (B, N, 3), (B, N, D) contiguous or None
    x_strides, mask_strides, N, blocks, norm_eps, D: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    b = (pid // blocks).to(tl.int64)
    rows = (pid % blocks * BM + tl.arange(0, BM)).to(tl.int64)
    total = tl.zeros([BM, BK], tl.float32)
    for k in range(0, D, BK):
        b_x, _, _, _ = load_row(x, x_strides, padding_mask, mask_strides, b, rows, N, k, D, BK)
        total += b_x
    mean = tl.sum(total, 1) / D
    # A mean far above the deviation is rounded to its own digits: what that leaves is small, and taken off exactly.
    total = tl.zeros([BM, BK], tl.float32)
    for k in range(0, D, BK):
        b_x, _, kept, _ = load_row(x, x_strides, padding_mask, mask_strides, b, rows, N, k, D, BK)
        total += tl.where(kept, b_x - mean[:, None], 0.0)
    correction = tl.sum(total, 1) / D
    total = tl.zeros([BM, BK], tl.float32)
    for k in range(0, D, BK):
        b_x, _, kept, _ = load_row(x, x_strides, padding_mask, mask_strides, b, rows, N, k, D, BK)
        centered = tl.where(kept, b_x - mean[:, None] - correction[:, None], 0.0)
        total += centered * centered
    inverse = 1.0 / tl.sqrt(tl.sum(total, 1) / D + norm_eps)
    at = statistics + (b * N + rows) * 3
    tl.store(at, mean, mask=rows < N)
    tl.store(at + 1, correction, mask=rows < N)
    tl.store(at + 2, inverse, mask=rows < N)
    if normalised is not None:
        for k in range(0, D, BK):
            b_x, exist, kept, _ = load_row(x, x_strides, padding_mask, mask_strides, b, rows, N, k, D, BK)
            b_x = tl.where(kept, (b_x - mean[:, None] - correction[:, None]) * inverse[:, None], 0.0)
            out = normalised + ((b * N + rows) * D)[:, None] + (k + tl.arange(0, BK))[None, :]
            tl.store(out, b_x.to(normalised.dtype.element_ty), mask=exist)


@triton.jit(do_not_specialize=["N", "blocks"])
def input_gradient_kernel(
    drows, x, statistics, padding_mask, dx,  # (B, N, D) contiguous, (B, N, D), (B, N, 3), (B, N), like x
    x_strides, dx_strides, mask_strides, N, blocks, D: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    b = (pid // blocks).to(tl.int64)
    rows = (pid % blocks * BM + tl.arange(0, BM)).to(tl.int64)
    at = statistics + (b * N + rows) * 3
    mean = tl.load(at, mask=rows < N, other=0.0)[:, None]
    correction = tl.load(at + 1, mask=rows < N, other=0.0)[:, None]
    inverse = tl.load(at + 2, mask=rows < N, other=0.0)[:, None]
    drows_strides = (N.to(tl.int64) * D, D, 1)
    total = tl.zeros([BM, BK], tl.float32)
    along = tl.zeros([BM, BK], tl.float32)
    for k in range(0, D, BK):
        b_x, _, kept, _ = load_row(x, x_strides, padding_mask, mask_strides, b, rows, N, k, D, BK)
        g, _, _, _ = load_row(drows, drows_strides, padding_mask, mask_strides, b, rows, N, k, D, BK)
        total += g
        along += g * tl.where(kept, (b_x - mean - correction) * inverse, 0.0)
    mean_of_g = (tl.sum(total, 1) / D)[:, None]
    mean_along = (tl.sum(along, 1) / D)[:, None]
    for k in range(0, D, BK):
        b_x, exist, kept, _ = load_row(x, x_strides, padding_mask, mask_strides, b, rows, N, k, D, BK)
        g, _, _, _ = load_row(drows, drows_strides, padding_mask, mask_strides, b, rows, N, k, D, BK)
        b_dx = (g - mean_of_g - mean_along * (b_x - mean - correction) * inverse) * inverse
        stride_b, stride_n, stride_c = dx_strides
        c = (k + tl.arange(0, BK)).to(tl.int64)
        out = dx + (b * stride_b + rows * stride_n)[:, None] + c[None, :] * stride_c
        tl.store(out, tl.where(kept, b_dx, 0.0).to(dx.dtype.element_ty), mask=exist)


def _launch(kernel, x: Tensor, strided: tuple, *settled) -> Launch:
    B, N, D = x.shape
    blocks = ceil_div(N, ROWS)
    sizes = {"D": D, "BM": ROWS, "BK": min(CHANNELS, padded(D)), "num_warps": WARPS}
    return Launch(kernel, B * blocks, x.device, *strided, N, blocks, *settled, **sizes)


def plan_statistics(x: Tensor, norm_eps: float, padding_mask: Tensor | None) -> Callable[..., Tensor]:
    """(x, padding_mask, normalised) -> mean, what its rounding left and 1 / deviation of every token, (B, N, 3); fills
    ``normalised``, which is given always or never."""
    launch = _launch(statistics_kernel, x, (x.stride(), strides(padding_mask, 2)), norm_eps)
    new_statistics = maker(x.device, torch.float32, *x.shape[:2], 3)

    def statistics_of(x, padding_mask, normalised=None):
        statistics = new_statistics()
        launch(x, padding_mask, statistics, normalised)
        return statistics

    return statistics_of


def plan_rows(
    x: Tensor, norm_eps: float | None, padding_mask: Tensor | None
) -> Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]:
    """(x, padding_mask) -> tokens as products take them, removed ones 0 and normalised if there is norm_eps, and statistics."""
    if norm_eps is not None:
        statistics_of, new_rows = plan_statistics(x, norm_eps, padding_mask), maker(x.device, x.dtype, *x.shape)

        def normalise(x, padding_mask):
            rows = new_rows()
            return rows, statistics_of(x, padding_mask, rows)

        return normalise
    if padding_mask is None:
        return lambda x, padding_mask: (x, None)
    return lambda x, padding_mask: (x.masked_fill(padding_mask[..., None], 0).contiguous(), None)


def plan_input_gradient(
    x: Tensor, norm_eps: float | None, padding_mask: Tensor | None, dx: Tensor
) -> Callable[..., None]:
    """(drows, x, statistics, padding_mask, dx): fills the gradient of x from that of the rows, which are contiguous."""
    if norm_eps is not None:
        return _launch(input_gradient_kernel, x, (x.stride(), dx.stride(), strides(padding_mask, 2)))

    def copy(drows, x, statistics, padding_mask, dx):
        dx.copy_(drows if padding_mask is None else drows.masked_fill(padding_mask[..., None], 0))

    return copy

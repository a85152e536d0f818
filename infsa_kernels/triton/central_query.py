"""`central_query` in Triton: projected queries and their central query, of which only sums are written to memory.

    u_i = s (W_h x^_i + b_h),  e_i = ||u_i||,  qbar_h = sum_i e_i u_i / (sum_i e_i + eps)        s = 1/sqrt(d)

A program takes G heads and a run of tokens ("split"), a tile of BM tokens at a time: it forms u by a matrix product over D and
keeps sum e u and sum e. Splits leave partial sums, which are added up in their order: the bits never depend on timing.

LayerNorm is applied to a tile before the product, not to its result: a mean far above the deviation would take the digits.
Backward forms u once more and writes the gradient of W x^ + b, rounded to the dtype of x, for two products by torch: those that
give the gradients of W and x.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch
import triton
import triton.language as tl

from ..eager import central_query as eager
from . import configs
from .launch import Launch, all_countable, ceil_div, maker, padded, planned, strides
from .tiles import dot
from .token_rows import plan_input_gradient, plan_rows, plan_statistics

# Tokens of backward's intermediates, in all samples together.
BLOCK_TOKENS = 1 << 14


def block_tokens(B):
    """Of each sample."""
    return max(1, BLOCK_TOKENS // max(1, B))


SIZES = ["H", "N", "splits", "split_tokens"]


@triton.jit
def queries(
    x, weight, bias, statistics, padding_mask, x_strides, weight_strides, mask_strides, b, group, rows, stop, H, N, s,
    D: tl.constexpr, d: tl.constexpr, DP: tl.constexpr, G: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """u [BM, G, DP] of a tile of tokens, 0 where a token is removed or there is none, and which tokens there are."""
    live = rows < stop
    if padding_mask is not None:
        stride_b, stride_n = mask_strides
        live = live & (tl.load(padding_mask + b * stride_b + rows * stride_n, mask=live, other=1) == 0)
    column = tl.arange(0, G * DP)
    head, channel = group * G + column // DP, column % DP
    kept = (head < H) & (channel < d)
    stride_b, stride_n, stride_c = x_strides
    row_at = b * stride_b + rows * stride_n
    stride_h, stride_d, stride_w = weight_strides
    column_at = head.to(tl.int64) * stride_h + channel * stride_d
    if statistics is not None:
        # (B, N, 3)
        at = (b * N + rows) * 3
        mean = tl.load(statistics + at, mask=live, other=0.0)
        correction = tl.load(statistics + at + 1, mask=live, other=0.0)
        inverse = tl.load(statistics + at + 2, mask=live, other=0.0)
    acc = tl.zeros([BM, G * DP], tl.float32)
    for k in range(0, D, BK):
        c = k + tl.arange(0, BK)
        inside = live[:, None] & (c < D)[None, :]
        b_x = tl.load(x + row_at[:, None] + c[None, :].to(tl.int64) * stride_c, mask=inside, other=0.0)
        if statistics is not None:
            centered = b_x.to(tl.float32) - mean[:, None] - correction[:, None]
            b_x = tl.where(inside, centered * inverse[:, None], 0.0).to(x.dtype.element_ty)
        b_w = tl.load(
            weight + column_at[None, :] + c[:, None].to(tl.int64) * stride_w,
            mask=kept[None, :] & (c < D)[:, None],
            other=0.0,
        )
        acc = dot(b_x, b_w, acc, PRECISION)
    if bias is not None:
        acc += tl.load(bias + head * d + channel, mask=kept, other=0.0)[None, :]
    u = tl.where(live[:, None] & kept[None, :], acc * s, 0.0)
    return tl.reshape(u, [BM, G, DP]), live


@triton.jit
def where_am_i(splits, split_tokens, H, N, G: tl.constexpr):
    """Heads are innermost: programs that run together read the same tokens."""
    pid = tl.program_id(0)
    groups = tl.cdiv(H, G)
    split = pid // groups % splits
    start = split * split_tokens
    return (pid // (groups * splits)).to(tl.int64), pid % groups, split, start, tl.minimum(start + split_tokens, N)


@triton.jit
def at_heads(group, H, d: tl.constexpr, DP: tl.constexpr, G: tl.constexpr):
    """Where G heads lie in (H, d), and which of these numbers exist: [G, DP]."""
    head, channel = group * G + tl.arange(0, G), tl.arange(0, DP)
    return head[:, None] * d + channel[None, :], (head < H)[:, None] & (channel < d)[None, :]


@triton.jit(do_not_specialize=SIZES)
def central_query_fwd_kernel(
    x, weight, bias, statistics, padding_mask,  # (B, N, D), (H, d, D), (H, d), (B, N, 3), (B, N)
    central_parts, energy_parts,  # (B, splits, H, d), (B, splits, H)
    x_strides, weight_strides, mask_strides, H, N, splits, split_tokens, s,
    D: tl.constexpr, d: tl.constexpr, DP: tl.constexpr, G: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    b, group, split, start, stop = where_am_i(splits, split_tokens, H, N, G)
    central = tl.zeros([G, DP], tl.float32)
    energy = tl.zeros([G], tl.float32)
    for first in range(start, stop, BM):
        rows = (first + tl.arange(0, BM)).to(tl.int64)
        u, _ = queries(
            x, weight, bias, statistics, padding_mask, x_strides, weight_strides, mask_strides, b, group, rows, stop, H, N, s,
            D, d, DP, G, BM, BK, PRECISION,
        )  # fmt: skip
        e = tl.sqrt(tl.sum(u * u, 2))
        energy += tl.sum(e, 0)
        central += tl.sum(u * e[:, :, None], 0)
    part = b * splits + split
    at, exist = at_heads(group, H, d, DP, G)
    tl.store(central_parts + part * H * d + at, central, mask=exist)
    head = group * G + tl.arange(0, G)
    tl.store(energy_parts + part * H + head, energy, mask=head < H)


@triton.jit(do_not_specialize=SIZES)
def central_query_bwd_kernel(
    x, weight, bias, scaled, offset, padding_mask,  # scaled (B, H, d) = s dqbar / (E + eps), offset (B, H) = <scaled, qbar>
    dq, dbias_parts,  # (B, N, H, d) in the dtype of x, (B, splits, H, d) or None
    x_strides, weight_strides, mask_strides, H, N, splits, split_tokens, s,
    D: tl.constexpr, d: tl.constexpr, DP: tl.constexpr, G: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    b, group, split, start, stop = where_am_i(splits, split_tokens, H, N, G)
    at, exist = at_heads(group, H, d, DP, G)
    b_scaled = tl.load(scaled + b * H * d + at, mask=exist, other=0.0)
    head = group * G + tl.arange(0, G)
    b_offset = tl.load(offset + b * H + head, mask=head < H, other=0.0)
    dbias = tl.zeros([G, DP], tl.float32)
    for first in range(start, stop, BM):
        rows = (first + tl.arange(0, BM)).to(tl.int64)
        u, live = queries(
            x, weight, bias, None, padding_mask, x_strides, weight_strides, mask_strides, b, group, rows, stop, H, N, s,
            D, d, DP, G, BM, BK, PRECISION,
        )  # fmt: skip
        # qbar = sum_i e_i u_i / E,  e_i = ||u_i||
        e = tl.sqrt(tl.sum(u * u, 2))
        de = tl.sum(u * b_scaled[None, :, :], 2) - b_offset[None, :]
        direction = u / tl.where(e > 0.0, e, 1.0)[:, :, None]
        b_dq = e[:, :, None] * b_scaled[None, :, :] + de[:, :, None] * direction
        b_dq = tl.where(live[:, None, None], b_dq, 0.0)
        if dbias_parts is not None:
            dbias += tl.sum(b_dq, 0)
        tl.store(
            dq + ((b * N + rows) * H * d)[:, None, None] + at[None, :, :],
            b_dq.to(dq.dtype.element_ty),
            mask=(rows < stop)[:, None, None] & exist[None, :, :],
        )
    if dbias_parts is not None:
        tl.store(dbias_parts + (b * splits + split) * H * d + at, dbias, mask=exist)


# Tokens of the tiles of a GPU that they fill, and of the others.
LARGE, SMALL = 128, 64
# Where a kernel with large tiles spills in no variant for heads of 16 to 128.
LARGE_ON = {"forward": tuple(configs.MULTIPROCESSORS), "backward": ("sm_80", "sm_90", "gfx942")}
# Which of the two, for the check before first use, whose calls are small; otherwise their tokens decide.
_chosen: ContextVar[bool | None] = ContextVar("large", default=None)


@contextlib.contextmanager
def tiles(large: bool) -> Iterator[None]:
    """In this block, and this thread, tiles are large wherever a call can have them, or nowhere."""
    before = _chosen.set(large)
    try:
        yield
    finally:
        _chosen.reset(before)


class Tiling:
    """How the products are cut: chosen by bytes of shared memory and registers of the sums, measured on no GPU.

    In 16 bits tiles are large where they leave no multiprocessor without one: W comes from the L2 cache once per tile of tokens,
    and x once per 128 channels. Tiles of 256 channels spill; so do those of 128 x 128 that take more than 32 of D at a time.
    One tiling serves every block of a backward pass.
    """

    def __init__(self, x, weight, direction):
        (B, N, _), (H, d, D) = x.shape, weight.shape
        DP, wide = padded(d), x.element_size() == 4
        columns = max(32 if wide else 128, DP)
        G = max(min(padded(H), columns // DP), 16 // DP)
        self.groups = ceil_div(H, G)
        programs = B * (min(N, block_tokens(B)) // LARGE) * self.groups
        large = programs >= configs.multiprocessors(x.device) if _chosen.get() is None else _chosen.get()
        # Of narrower heads backward spills on sm_90.
        self.large = large and not wide and 16 <= DP <= 128 and configs.arch_of(x.device) in LARGE_ON[direction]
        if wide:
            self.rows, BK, stages = *((16, 16) if G * DP > 128 else (32, 32)), 1
        elif G * DP > 128:
            self.rows, BK, stages = 32, 64, 2
        else:
            self.rows, BK, stages = (LARGE, 32, 3) if self.large else (SMALL, 64, 3)
        self.options = {"D": D, "d": d, "DP": DP, "G": G, "BM": self.rows, "BK": BK, "PRECISION": configs.precision(x)}
        self.options |= {"num_warps": 8, "num_stages": stages} | configs.all_registers(x)

    def splits(self, B, N, device):
        """How many runs of how many tokens: two waves of programs."""
        tiles = ceil_div(N, self.rows)
        most = max(1, 2 * configs.multiprocessors(device) // (B * self.groups))
        tokens = ceil_div(tiles, min(most, tiles)) * self.rows
        return ceil_div(N, tokens), tokens


def _runs(x, weight):
    """Whether there is anything to do, and no more of it than kernels count."""
    B, N, D = x.shape
    H, d, _ = weight.shape
    all_countable("infsa::central_query", {"N": N, "D": D, "B * H": B * H, "H * d": H * d})
    return 0 not in (*x.shape, *weight.shape)


@planned
def forward(x, weight, bias, norm_eps, eps, padding_mask):
    if not _runs(x, weight):
        return eager.forward
    B, N, _ = x.shape
    H, d, _ = weight.shape
    tiling = Tiling(x, weight, "forward")
    splits, split_tokens = tiling.splits(B, N, x.device)
    statistics_of = None if norm_eps is None else plan_statistics(x, norm_eps, padding_mask)
    new_central_parts, new_energy_parts = (maker(x.device, torch.float32, B, splits, H, *more) for more in ((d,), ()))
    sum_up = Launch(
        central_query_fwd_kernel, B * splits * tiling.groups, x.device,
        x.stride(), weight.stride(), strides(padding_mask, 2), H, N, splits, split_tokens, d**-0.5,
        **tiling.options,
    )  # fmt: skip

    def run(x, weight, bias, norm_eps, eps, padding_mask):
        statistics = None if statistics_of is None else statistics_of(x, padding_mask)
        central_parts, energy_parts = new_central_parts(), new_energy_parts()
        bias = None if bias is None else bias.contiguous()
        sum_up(x, weight, bias, statistics, padding_mask, central_parts, energy_parts)
        energy_sum = energy_parts.sum(1)
        return central_parts.sum(1) / (energy_sum + eps)[..., None], energy_sum

    return run


@planned
def backward(dcentral_query, x, weight, bias, central_query, energy_sum, norm_eps, eps, padding_mask, gradients):
    if not _runs(x, weight):
        return eager.backward
    B, N, D = x.shape
    H, d, _ = weight.shape
    step, tiling = block_tokens(B), Tiling(x, weight, "backward")
    blocks = [
        _plan_block(slice(begin, begin + step), tiling, x, weight, norm_eps, padding_mask, gradients)
        for begin in range(0, N, step)
    ]

    def run(dcentral_query, x, weight, bias, central_query, energy_sum, norm_eps, eps, padding_mask, gradients):
        dx, dweight, dbias = gradients
        scaled = (dcentral_query * (d**-0.5 / (energy_sum + eps))[..., None]).contiguous()
        offset = (scaled * central_query).sum(-1)
        bias = None if bias is None else bias.contiguous()
        given = x, weight, bias, scaled, offset, padding_mask, dx
        of_weight = of_bias = None
        for block in blocks:
            of_weight, of_bias = map(_added, (of_weight, of_bias), block(*given))
        if dweight is not None:
            dweight.copy_(of_weight.view(H, d, D))
        if dbias is not None:
            dbias.copy_(of_bias)

    return run


def _added(total, part):
    """In float32, where there is something to add."""
    return part if total is None else total.float() + part


def _plan_block(tokens, tiling, x, weight, norm_eps, padding_mask, gradients):
    """(x, weight, bias, scaled, offset, padding_mask, dx) -> what a block of tokens gives to dweight (H d, D) and dbias (H, d),
    or None; fills its part of dx."""
    (B, N, D), (H, d, _), (dx, dweight, dbias) = x.shape, weight.shape, gradients
    block, mask = x[:, tokens], None if padding_mask is None else padding_mask[:, tokens]
    length = block.shape[1]
    whole, wants_weight = length == N, dweight is not None
    rows_of = plan_rows(block, norm_eps, mask)
    row_strides = block.stride() if norm_eps is None and mask is None else (length * D, D, 1)
    splits, split_tokens = tiling.splits(B, length, x.device)
    new_dq = maker(x.device, x.dtype, B, length, H * d)
    new_dbias_parts = None if dbias is None else maker(x.device, torch.float32, B, splits, H, d)
    differentiate = Launch(
        central_query_bwd_kernel, B * splits * tiling.groups, x.device,
        row_strides, weight.stride(), strides(mask, 2), H, length, splits, split_tokens, d**-0.5, **tiling.options,
    )  # fmt: skip
    fill_dx = None if dx is None else plan_input_gradient(block, norm_eps, mask, dx[:, tokens])

    def run(x, weight, bias, scaled, offset, padding_mask, dx):
        block, mask = x, padding_mask
        if not whole:
            block, mask = x[:, tokens], None if mask is None else mask[:, tokens]
        rows, statistics = rows_of(block, mask)
        dq, dbias_parts = new_dq(), None if new_dbias_parts is None else new_dbias_parts()
        differentiate(rows, weight, bias, scaled, offset, mask, dq, dbias_parts)
        if fill_dx is not None:
            fill_dx(dq @ weight.reshape(H * d, D), block, statistics, mask, dx if whole else dx[:, tokens])
        of_weight = dq.flatten(0, 1).mT @ rows.flatten(0, 1) if wants_weight else None
        return of_weight, None if dbias_parts is None else dbias_parts.sum((0, 1))

    return run

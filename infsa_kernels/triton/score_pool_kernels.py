"""The kernels of score_pool.py.

    t_jh = x^_j . key_h + key_bias_h,  r = ReLU(t)          scores_kernel: all heads of a tile of tokens
    pooled_h = sum_j r_jh x^_j / R_h                        pool_kernel: all heads, some channels and a run of tokens ("split")

    dt = [t > 0] (x^ . g - o),  g = dpooled / R             score_gradients_kernel: with t formed once more, in one pass over x
    dkey_h = sum_j dt_jh x^_j                               pool_kernel
    dx^_j = sum_h r_jh g_h + dt_jh key_h                    token_gradient_kernel

Tensor cores take 8 digits of bfloat16, but keys, scores and gradients have float32's 24. These are multiplied in two PARTS, high
and low, which keeps 16 of them. float16 has not float32's range: its tokens multiply as TF32, exact there, and of the others 22
digits count. LayerNorm is applied to a tile before the product: a mean far above the deviation would take the digits.
"""

import triton
import triton.language as tl

from .launch import relu
from .tiles import dot

SIZES = ["H", "N", "tiles", "splits", "split_tokens"]


@triton.jit
def statistics_at(statistics, padding_mask, mask_strides, b, rows, N, stop):
    """Which rows count, and their mean, what its rounding left and 1 / deviation: (B, N, 3)."""
    live = rows < stop
    if padding_mask is not None:
        stride_b, stride_n = mask_strides
        live = live & (tl.load(padding_mask + b * stride_b + rows * stride_n, mask=live, other=1) == 0)
    mean = 0.0
    correction = 0.0
    inverse = 1.0
    if statistics is not None:
        at = statistics + (b * N + rows) * 3
        mean = tl.load(at, mask=live, other=0.0)[:, None]
        correction = tl.load(at + 1, mask=live, other=0.0)[:, None]
        inverse = tl.load(at + 2, mask=live, other=0.0)[:, None]
    return live, mean, correction, inverse


@triton.jit
def load_tokens(x, x_strides, statistics, b, rows, live, mean, correction, inverse, c, D: tl.constexpr):
    """Channels c of x^ of a tile, 0 where a token does not count: float32 where normalised, else as x is."""
    stride_b, stride_n, stride_c = x_strides
    at = (b * stride_b + rows * stride_n)[:, None] + c[None, :].to(tl.int64) * stride_c
    inside = live[:, None] & (c < D)[None, :]
    b_x = tl.load(x + at, mask=inside, other=0.0)
    if statistics is not None:
        b_x = tl.where(inside, (b_x.to(tl.float32) - mean - correction) * inverse, 0.0)
    return b_x


@triton.jit
def factor(b_x, x):
    """A tile of x^ as products take it."""
    b_x = b_x.to(x.dtype.element_ty)
    if x.dtype.element_ty == tl.float16:
        b_x = b_x.to(tl.float32)
    return b_x


@triton.jit
def leading(t, x):
    """The digits of t in float32 that a product with tokens like x takes."""
    if x.dtype.element_ty == tl.bfloat16:
        t = t.to(tl.bfloat16)
    elif x.dtype.element_ty == tl.float16:
        t = (t.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    return t


@triton.jit
def remaining(t, high, x):
    """What `leading` left of t. Of an infinite t that is nothing."""
    high = high.to(tl.float32)
    return leading(tl.where(t == high, 0.0, t - high), x)


# Numbers per head come in rows of a multiple of this many, which are read 16 bytes at a time whatever D is.
ALIGNED = tl.constexpr(16)


@triton.jit
def load_heads(parts, part, b, head, c, H, D: tl.constexpr, PARTS: tl.constexpr):
    """Channels c of heads of (B, PARTS, H, D), D rounded up, each of the two indices with an axis of its own."""
    width: tl.constexpr = (D + ALIGNED - 1) // ALIGNED * ALIGNED
    return tl.load(parts + ((b * PARTS + part) * H + head) * width + c, mask=(head < H) & (c < width), other=0.0)


@triton.jit
def products(
    x, keys, dpooled, statistics, x_strides, b, head, rows, live, mean, correction, inverse, H,
    D: tl.constexpr, HP: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x^ . keys and, if it is given, x^ . dpooled of a tile of tokens: [BM, HP]."""
    of_keys = tl.zeros([BM, HP], tl.float32)
    of_dpooled = tl.zeros([BM, HP], tl.float32)
    for k in range(0, D, BK):
        c = k + tl.arange(0, BK)
        b_x = factor(load_tokens(x, x_strides, statistics, b, rows, live, mean, correction, inverse, c, D), x)
        for part in tl.static_range(PARTS):
            b_keys = load_heads(keys, part, b, head[None, :], c[:, None], H, D, PARTS)
            of_keys = dot(b_x, b_keys, of_keys, PRECISION)
            if dpooled is not None:
                b_dpooled = load_heads(dpooled, part, b, head[None, :], c[:, None], H, D, PARTS)
                of_dpooled = dot(b_x, b_dpooled, of_dpooled, PRECISION)
    return of_keys, of_dpooled


@triton.jit
def where_am_i(tiles, H, HP: tl.constexpr, BM: tl.constexpr):
    """Sample, tile, heads and rows of this program. Heads are innermost: programs that run together read the same tokens."""
    pid = tl.program_id(0)
    groups = tl.cdiv(H, HP)
    tile = pid // groups % tiles
    head = pid % groups * HP + tl.arange(0, HP)
    return (pid // (groups * tiles)).to(tl.int64), tile, head, (tile * BM + tl.arange(0, BM)).to(tl.int64)


@triton.jit
def load_per_head(t, b, head, H):
    """Numbers per head of (B, H): [1, HP]."""
    return tl.load(t + b * H + head, mask=head < H, other=0.0)[None, :]


@triton.jit(do_not_specialize=SIZES)
def scores_kernel(
    x, keys, key_bias, statistics, padding_mask,  # (B, N, D), (B, PARTS, H, D), (B, H), (B, N, 3), (B, N)
    scores, score_parts, absolute_parts,  # with H in whole HP: (B, N, H), (B, tiles, H) and, if |t| is to be summed, alike
    x_strides, mask_strides, H, N, tiles,
    D: tl.constexpr, HP: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b, tile, head, rows = where_am_i(tiles, H, HP, BM)
    live, mean, correction, inverse = statistics_at(statistics, padding_mask, mask_strides, b, rows, N, N)
    t, _ = products(
        x, keys, None, statistics, x_strides, b, head, rows, live, mean, correction, inverse, H,
        D, HP, BM, BK, PARTS, PRECISION,
    )  # fmt: skip
    if key_bias is not None:
        t += load_per_head(key_bias, b, head, H)
    t = tl.where(live[:, None], t, 0.0)
    r = relu(t)
    heads = tl.cdiv(H, HP) * HP
    tl.store(scores + ((b * N + rows) * heads)[:, None] + head[None, :], r, mask=(rows < N)[:, None])
    at = (b * tiles + tile) * heads + head
    tl.store(score_parts + at, tl.sum(r, 0))
    if absolute_parts is not None:
        tl.store(absolute_parts + at, tl.sum(tl.abs(t), 0))


@triton.jit(do_not_specialize=SIZES)
def score_gradients_kernel(
    x, keys, dpooled, key_bias, offset,  # dpooled as keys, offset (B, H)
    floor, dabsolute,  # (B, H) both or None: what is added to a score, and the gradient of |t|
    statistics, padding_mask,
    weights, dscores, along, dbias_parts,  # r, dt: (B, N, H); (B, N, groups) or None; (B, tiles, H) or None
    x_strides, mask_strides, H, N, tiles,
    D: tl.constexpr, HP: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b, tile, head, rows = where_am_i(tiles, H, HP, BM)
    live, mean, correction, inverse = statistics_at(statistics, padding_mask, mask_strides, b, rows, N, N)
    of_keys, of_dpooled = products(
        x, keys, dpooled, statistics, x_strides, b, head, rows, live, mean, correction, inverse, H,
        D, HP, BM, BK, PARTS, PRECISION,
    )  # fmt: skip
    t = of_keys
    if key_bias is not None:
        t += load_per_head(key_bias, b, head, H)
    r = relu(t)
    # a_j = r_j / R, r = ReLU(t)
    dt = tl.where(t <= 0.0, 0.0, of_dpooled - load_per_head(offset, b, head, H))
    if floor is not None:
        r += load_per_head(floor, b, head, H)
        dt += tl.where(t > 0.0, 1.0, tl.where(t < 0.0, -1.0, 0.0)) * load_per_head(dabsolute, b, head, H)
    dt = tl.where(live[:, None], dt, 0.0)
    groups = tl.cdiv(H, HP)
    heads = groups * HP
    at = ((b * N + rows) * heads)[:, None] + head[None, :]
    if weights is not None:
        tl.store(weights + at, r, mask=(rows < N)[:, None])
    tl.store(dscores + at, dt, mask=(rows < N)[:, None])
    if along is not None:
        # dx^ . x^, which LayerNorm's gradient asks for, of these heads
        at_groups = (b * N + rows) * groups + tl.program_id(0) % groups
        tl.store(along + at_groups, tl.sum(r * of_dpooled + dt * of_keys, 1), mask=rows < N)
    if dbias_parts is not None:
        tl.store(dbias_parts + (b * tiles + tile) * heads + head, tl.sum(dt, 0))


@triton.jit(do_not_specialize=SIZES)
def pool_kernel(
    x, scores, statistics, padding_mask,  # (B, N, D), with H in whole HP (B, N, H), (B, N, 3), (B, N)
    pooled_parts, token_parts,  # (B, splits, H, D) and, if tokens are to be summed, (B, splits, D)
    x_strides, mask_strides, H, N, splits, split_tokens,
    D: tl.constexpr, HP: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    groups = tl.cdiv(H, HP)
    group = pid % groups
    pid = pid // groups
    c = pid % tl.cdiv(D, BK) * BK + tl.arange(0, BK)
    pid = pid // tl.cdiv(D, BK)
    split, b = pid % splits, (pid // splits).to(tl.int64)
    head = group * HP + tl.arange(0, HP)
    start = split * split_tokens
    stop = tl.minimum(start + split_tokens, N)
    acc = tl.zeros([HP, BK], tl.float32)
    total = tl.zeros([BM, BK], tl.float32)
    for first in range(start, stop, BM):
        rows = (first + tl.arange(0, BM)).to(tl.int64)
        live, mean, correction, inverse = statistics_at(statistics, padding_mask, mask_strides, b, rows, N, stop)
        tile = load_tokens(x, x_strides, statistics, b, rows, live, mean, correction, inverse, c, D)
        at = ((b * N + rows) * groups * HP)[None, :] + head[:, None]
        r = tl.load(scores + at, mask=live[None, :], other=0.0)
        b_x, high = factor(tile, x), leading(r, x)
        acc = dot(high, b_x, acc, PRECISION)
        if PARTS == 2:
            acc = dot(remaining(r, high, x), b_x, acc, PRECISION)
        if token_parts is not None:
            total += tile.to(tl.float32)
    part = b * splits + split
    at = (part * H + head)[:, None] * D + c[None, :]
    tl.store(pooled_parts + at, acc, mask=(head < H)[:, None] & (c < D)[None, :])
    if token_parts is not None:
        tl.store(token_parts + part * D + c, tl.sum(total, 0), mask=c < tl.where(group == 0, D, 0))


@triton.jit
def add_product(t, parts, acc, x, b, head, c, H, D: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr):
    """acc + t . heads, but for the product of both low parts."""
    high = leading(t, x)
    b_high = load_heads(parts, 0, b, head[:, None], c[None, :], H, D, PARTS)
    acc = dot(high, b_high, acc, PRECISION)
    if PARTS == 2:
        acc = dot(remaining(t, high, x), b_high, acc, PRECISION)
        acc = dot(high, load_heads(parts, 1, b, head[:, None], c[None, :], H, D, PARTS), acc, PRECISION)
    return acc


@triton.jit(do_not_specialize=SIZES)
def token_gradient_kernel(
    weights, dscores, dpooled, keys, x, statistics, along, padding_mask, dx,  # as in score_gradients_kernel; dx like x
    x_strides, dx_strides, mask_strides, H, N, tiles,
    D: tl.constexpr, HP: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    c = pid % tl.cdiv(D, BK) * BK + tl.arange(0, BK)
    pid = pid // tl.cdiv(D, BK)
    rows = (pid % tiles * BM + tl.arange(0, BM)).to(tl.int64)
    b = (pid // tiles).to(tl.int64)
    live, mean, correction, inverse = statistics_at(statistics, padding_mask, mask_strides, b, rows, N, N)
    groups = tl.cdiv(H, HP)
    acc = tl.zeros([BM, BK], tl.float32)
    along_row = tl.zeros([BM], tl.float32)
    for group in range(groups):
        head = group * HP + tl.arange(0, HP)
        at = ((b * N + rows) * groups * HP)[:, None] + head[None, :]
        r = tl.load(weights + at, mask=live[:, None], other=0.0)
        acc = add_product(r, dpooled, acc, x, b, head, c, H, D, PARTS, PRECISION)
        dt = tl.load(dscores + at, mask=live[:, None], other=0.0)
        acc = add_product(dt, keys, acc, x, b, head, c, H, D, PARTS, PRECISION)
        if along is not None:
            along_row += tl.load(along + (b * N + rows) * groups + group, mask=live, other=0.0)
    if along is not None:
        # dpooled and keys have mean 0 over channels, and so has dx^.
        tile = load_tokens(x, x_strides, statistics, b, rows, live, mean, correction, inverse, c, D)
        acc = (acc - (along_row / D)[:, None] * tile) * inverse
    stride_b, stride_n, stride_c = dx_strides
    at = (b * stride_b + rows * stride_n)[:, None] + c[None, :].to(tl.int64) * stride_c
    b_dx = tl.where(live[:, None], acc, 0.0)
    tl.store(dx + at, b_dx.to(dx.dtype.element_ty), mask=(rows < N)[:, None] & (c < D)[None, :])

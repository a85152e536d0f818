"""What Linear-InfSA's forward and backward kernels share: tiles [BT, G, D] of tokens, and vectors [G, D] of heads."""

import triton
import triton.language as tl

from .packed import sequence_of_tile, span_of


@triton.jit
def offsets(row_strides, b, heads, tokens, D: tl.constexpr):
    """Offsets [BT, G, D] into a (B, H, N, D) tensor."""
    stride_b, stride_h, stride_n, stride_d = row_strides
    base = b.to(tl.int64) * stride_b
    head = heads.to(tl.int64)[None, :, None] * stride_h
    token = tokens.to(tl.int64)[:, None, None] * stride_n
    return base + head + token + tl.arange(0, D).to(tl.int64)[None, None, :] * stride_d


@triton.jit
def rows_at(b, heads, tokens, start, stop, H, mask, mask_strides):
    """Which (token, head) exist, belong to this split and are not ignored: [BT, G, 1]."""
    live = (tokens >= start) & (tokens < stop)
    if mask is not None:
        stride_b, stride_n = mask_strides
        p_mask = mask + b.to(tl.int64) * stride_b + tokens.to(tl.int64) * stride_n
        live = live & (tl.load(p_mask, mask=live, other=1) == 0)
    return live[:, None, None] & (heads < H)[None, :, None]


@triton.jit
def inside(rows, d: tl.constexpr, D: tl.constexpr):
    """rows [BT, G, 1] restricted to the d real elements of D; the same [BT, G, 1] where nothing is padded."""
    if d == D:
        live = rows
    else:
        live = rows & (tl.arange(0, D) < d)[None, None, :]
    return live


@triton.jit
def load_tokens(
    x, x_strides, b, heads, tokens, start, stop, H, mask, mask_strides, d: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    """A tile [BT, G, D] in its own dtype. Loops load a tile ahead: memory has a whole tile's arithmetic to answer in."""
    rows = rows_at(b, heads, tokens, start, stop, H, mask, mask_strides)
    return tl.load(x + offsets(x_strides, b, heads, tokens, D), mask=inside(rows, d, D), other=0.0)


@triton.jit
def sum_of_splits(
    parts, b, heads, H, first, count, splits, d: tl.constexpr, D: tl.constexpr, G: tl.constexpr, BT: tl.constexpr
):  # fmt: skip
    """The total of `count` partial sums of (B, H, splits, d): [G, D]. Always the same order of additions."""
    total = tl.zeros([BT, G, D], tl.float32)
    of_head = tl.cast(splits, tl.int64) * d
    for before in range(0, count, BT):
        split = before + tl.arange(0, BT)
        rows = (split < count)[:, None, None] & (heads < H)[None, :, None]
        at = offsets((H * of_head, of_head, d, 1), b, heads, first + split, D)
        total += tl.load(parts + at, mask=inside(rows, d, D), other=0.0, cache_modifier=".cg")
    return tl.sum(total, 0)


@triton.jit
def store_part(parts, value, b, heads, H, split, splits, d: tl.constexpr, D: tl.constexpr):
    """value (G, D) as partial sum number `split` of (B, H, splits, d); with splits = 1, as the (B, H, d) total."""
    at = ((b * H + heads).to(tl.int64)[:, None] * splits + split) * d + tl.arange(0, D)[None, :]
    tl.store(parts + at, value, mask=(heads < H)[:, None] & (tl.arange(0, D) < d)[None, :])


@triton.jit
def load_head(p, b, heads, H, stride_b, stride_h, stride_d, d: tl.constexpr, D: tl.constexpr):
    """A (B, H, d) tensor's rows of this program: [G, D], float32."""
    dims = tl.arange(0, D)
    at = b.to(tl.int64) * stride_b + heads.to(tl.int64)[:, None] * stride_h + dims.to(tl.int64)[None, :] * stride_d
    return tl.load(p + at, mask=(heads < H)[:, None] & (dims < d)[None, :], other=0.0).to(tl.float32)


@triton.jit
def dot_of_heads(x, y):
    """x . y of each head, [G, 1]. In float64 the products are exact: an FMA of one with the sum that another thread sends would
    else leave every thread with other last bits of the same number."""
    return tl.sum(x.to(tl.float64) * y.to(tl.float64), 1, keep_dims=True).to(tl.float32)


@triton.jit
def effective_rho(rho, head_rho, head_rho_strides, b, heads, H):
    """rho of each head, [G, 1] or one number."""
    if head_rho is not None:
        stride_b, stride_h = head_rho_strides
        rho = rho * load_head(head_rho, b, heads, H, stride_b, stride_h, 0, 1, 1)
    return rho


@triton.jit
def keys_of(key_counts, b, cu_seqlens, s, M):
    """The keys that no mask ignores, at least 1."""
    if cu_seqlens is not None:
        begin, end = span_of(cu_seqlens, s, M)
        count = tl.maximum(1, end - begin).to(tl.float32)
    elif key_counts is None:
        count = M.to(tl.float32)
    else:
        count = tl.load(key_counts + b)
    return count


@triton.jit
def where_am_i(splits, split_tokens, H, G: tl.constexpr, cu_seqlens, sequences, size):
    """Of this program: the batch b and heads (G,) of its tokens, and the number of its split among theirs; the sample or sequence
    s, the number of its head group, which of its splits it is, and the tokens from start to stop."""
    pid = tl.program_id(0)
    b_group, split = pid // splits, pid % splits
    groups = tl.cdiv(H, G)
    b, group = b_group // groups, b_group % groups
    s, own = sequence_of_tile(cu_seqlens, sequences, split, size, split_tokens, b)
    begin, end = span_of(cu_seqlens, s, size)
    start = begin + own * split_tokens
    stop = start + tl.minimum(split_tokens, end - start)
    return b, group * G + tl.arange(0, G), split, s, s * groups + group, own, start, stop


def key_counts(score_floor, key_padding_mask):
    """The keys that a mask leaves, at least 1, (B,) float32, where a floor asks for them."""
    if score_floor is None or key_padding_mask is None:
        return None
    return (~key_padding_mask).sum(-1).clamp(min=1).float()

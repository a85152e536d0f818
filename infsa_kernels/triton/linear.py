"""Linear-InfSA in Triton.

    e_i = ||q_i||,  qbar = s^2 sum_i e_i q_i / (s sum_i e_i + eps)                       launch 1: sums over the queries
    r_j = s ReLU(qbar . k_j),  z = rho sum_j r_j v_j / (sum_j r_j + eps)                  launch 2: sums over the keys

A program walks over a run of tokens ("split") of G heads, [BT, G, D] of them at a time, and keeps its sums in registers of that
shape: nothing crosses a thread inside the loop but the dot products over D, and the reduction over tokens happens once.
Splits leave partial sums in scratch; whoever needs the total adds them up in their order, so the bits never depend on timing.
The total over the keys is taken by the program of a head group that arrives last, which an integer ticket tells it: the one
atomic here, it touches no number. Short sequences take one program per head group and one launch.

Accesses are [BT, G, D] with D innermost: in a [B, N, H, d] view G heads make a whole 128-byte line.
All offsets are int64. d or dv that is no power of two is padded under a mask.
"""

import torch
import triton
import triton.language as tl

from ..eager import linear as eager
from ..eager.common import scale
from . import configs
from .launch import SIZES, countable, launch, padded, relu, strides


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
def sum_of_splits(parts, b, heads, H, splits, d: tl.constexpr, D: tl.constexpr, G: tl.constexpr, BT: tl.constexpr):
    """The total of partial sums (B, H, splits, d): [G, D]. Always the same order of additions."""
    total = tl.zeros([BT, G, D], tl.float32)
    for first in range(0, splits, BT):
        split = first + tl.arange(0, BT)
        rows = (split < splits)[:, None, None] & (heads < H)[None, :, None]
        at = offsets((H * splits * d, splits * d, d, 1), b, heads, split, D)
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
def where_am_i(splits, H, G: tl.constexpr):
    """batch, heads (G,), split and head group of this program."""
    pid = tl.program_id(0)
    group = pid // splits
    groups = tl.cdiv(H, G)
    return group // groups, (group % groups) * G + tl.arange(0, G), pid % splits, group


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
    q, query_mask,  # (B, H, N, d), (B, N)
    central_parts, energy_parts, tickets,  # (B, H, splits, d), (B, H, splits), (B, head groups)
    q_strides, query_mask_strides, H, N, splits, split_tokens,
    d: tl.constexpr, D: tl.constexpr, G: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    b, heads, split, group = where_am_i(splits, H, G)
    start = split * split_tokens
    stop = tl.minimum(start + split_tokens, N)
    central, energy = sum_queries(q, q_strides, query_mask, query_mask_strides, b, heads, H, start, stop, d, D, G, BT)
    store_part(central_parts, central, b, heads, H, split, splits, d, D)
    store_part(energy_parts, energy, b, heads, H, split, splits, 1, 1)
    if split == 0:
        tl.store(tickets + group, 0)


@triton.jit
def store_result(
    pooled, score, rho, b, heads, H, scale, eps, out, context, score_sum, dv: tl.constexpr, DV: tl.constexpr
):  # fmt: skip
    score = score * scale
    z = pooled * scale / (score + eps)
    store_part(context, z, b, heads, H, 0, 1, dv, DV)
    store_part(out, (rho * z).to(out.dtype.element_ty), b, heads, H, 0, 1, dv, DV)
    store_part(score_sum, score, b, heads, H, 0, 1, 1, 1)


@triton.jit(do_not_specialize=SIZES)
def linear_fwd_keys_kernel(
    q, k, v, query_mask, key_mask, head_rho,  # (B, H, N, d), (B, H, M, d), (B, H, M, dv), (B, N), (B, M), (B, H)
    out, context, central_query, energy_sum, score_sum,  # (B, H, dv), (B, H, dv), (B, H, d), (B, H), (B, H)
    central_parts, energy_parts, query_splits,  # of the first launch
    context_parts, score_parts, tickets,  # (B, H, splits, dv), (B, H, splits), (B, head groups)
    q_strides, k_strides, v_strides, query_mask_strides, key_mask_strides, head_rho_strides,
    H, N, M, splits, split_tokens, scale, eps, rho,
    d: tl.constexpr, dv: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, G: tl.constexpr, BT: tl.constexpr,
    WHOLE: tl.constexpr,  # one program per head group: it sums the queries too, and its sums are the totals
):  # fmt: skip
    b, heads, split, group = where_am_i(splits, H, G)
    start = split * split_tokens
    stop = tl.minimum(start + split_tokens, M)
    steps = tl.cdiv(stop - start, BT)
    # Backwards: where K is Q, what the first launch read last is still in the L2 cache. The first tiles are on their way while
    # the central query is made.
    tokens = start + (steps - 1) * BT + tl.arange(0, BT)
    k_ahead = load_tokens(k, k_strides, b, heads, tokens, start, stop, H, key_mask, key_mask_strides, d, D)
    v_ahead = load_tokens(v, v_strides, b, heads, tokens, start, stop, H, key_mask, key_mask_strides, dv, DV)
    if WHOLE:
        central, energy = sum_queries(q, q_strides, query_mask, query_mask_strides, b, heads, H, 0, N, d, D, G, BT)
    else:
        central = sum_of_splits(central_parts, b, heads, H, query_splits, d, D, G, BT)
        energy = sum_of_splits(energy_parts, b, heads, H, query_splits, 1, 1, G, BT)
    energy = energy * scale
    central = central * (scale * scale) / (energy + eps)
    if split == 0:
        store_part(central_query, central, b, heads, H, 0, 1, d, D)
        store_part(energy_sum, energy, b, heads, H, 0, 1, 1, 1)

    pooled = tl.zeros([BT, G, DV], tl.float32)
    score = tl.zeros([BT, G, 1], tl.float32)
    for _ in range(steps):
        b_k, b_v = k_ahead.to(tl.float32), v_ahead.to(tl.float32)
        rows = rows_at(b, heads, tokens, start, stop, H, key_mask, key_mask_strides)
        tokens -= BT
        k_ahead = load_tokens(k, k_strides, b, heads, tokens, start, stop, H, key_mask, key_mask_strides, d, D)
        v_ahead = load_tokens(v, v_strides, b, heads, tokens, start, stop, H, key_mask, key_mask_strides, dv, DV)
        r = relu(tl.sum(b_k * central[None, :, :], 2, keep_dims=True))
        r = tl.where(rows, r, 0.0)
        score += r
        pooled += r * b_v
    pooled = tl.sum(pooled, 0)
    score = tl.sum(score, 0)

    rho = effective_rho(rho, head_rho, head_rho_strides, b, heads, H)
    if WHOLE:
        store_result(pooled, score, rho, b, heads, H, scale, eps, out, context, score_sum, dv, DV)
    else:
        store_part(context_parts, pooled, b, heads, H, split, splits, dv, DV)
        store_part(score_parts, score, b, heads, H, split, splits, 1, 1)
        # All threads have stored before one of them draws the ticket, which releases the stores and acquires the others'.
        tl.debug_barrier()
        if tl.atomic_add(tickets + group, 1, sem="acq_rel") == splits - 1:
            pooled = sum_of_splits(context_parts, b, heads, H, splits, dv, DV, G, BT)
            score = sum_of_splits(score_parts, b, heads, H, splits, 1, 1, G, BT)
            store_result(pooled, score, rho, b, heads, H, scale, eps, out, context, score_sum, dv, DV)


@triton.jit(do_not_specialize=SIZES)
def linear_bwd_keys_kernel(
    dout, k, v, key_mask, head_rho,  # (B, H, dv), (B, H, M, d), (B, H, M, dv), (B, M), (B, H)
    context, central_query, score_sum,  # (B, H, dv), (B, H, d), (B, H)
    dk, dv_out, dhead_rho, dscores, dcentral_parts,  # like k, like v, (B, H), (B, H, M), (B, H, splits, d)
    dout_strides, k_strides, v_strides, dk_strides, dv_strides, key_mask_strides, head_rho_strides,
    H, M, splits, split_tokens, scale, eps, rho,
    d: tl.constexpr, dv: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, G: tl.constexpr, BT: tl.constexpr,
    TIED: tl.constexpr, WANT_Q: tl.constexpr, WANT_K: tl.constexpr, WANT_V: tl.constexpr, WANT_RHO: tl.constexpr,
):  # fmt: skip
    b, heads, split, group = where_am_i(splits, H, G)
    stride_b, stride_h, stride_d = dout_strides
    dz = load_head(dout, b, heads, H, stride_b, stride_h, stride_d, dv, DV)
    z = load_head(context, b, heads, H, H * dv, dv, 1, dv, DV)
    dz_z = dot_of_heads(dz, z)
    if WANT_RHO and split == 0:
        store_part(dhead_rho, rho * dz_z, b, heads, H, 0, 1, 1, 1)

    rho = effective_rho(rho, head_rho, head_rho_strides, b, heads, H)
    gain = rho / (load_head(score_sum, b, heads, H, H, 1, 0, 1, 1) + eps)
    central = load_head(central_query, b, heads, H, H * d, d, 1, d, D)
    start = split * split_tokens
    stop = tl.minimum(start + split_tokens, M)
    dcentral = tl.zeros([BT, G, D], tl.float32)
    if WANT_Q or WANT_K or WANT_V:
        tokens = start + tl.arange(0, BT)
        k_ahead = load_tokens(k, k_strides, b, heads, tokens, start, stop, H, key_mask, key_mask_strides, d, D)
        if WANT_Q or WANT_K:
            v_ahead = load_tokens(v, v_strides, b, heads, tokens, start, stop, H, key_mask, key_mask_strides, dv, DV)
        for _ in range(start, stop, BT):
            rows = rows_at(b, heads, tokens, start, stop, H, key_mask, key_mask_strides)
            exists = rows_at(b, heads, tokens, start, stop, H, None, key_mask_strides)
            dk_at, dv_at = offsets(dk_strides, b, heads, tokens, D), offsets(dv_strides, b, heads, tokens, DV)
            dscores_at = offsets((tl.cast(H, tl.int64) * M, M, 1, 0), b, heads, tokens, 1)
            tokens += BT
            b_k = k_ahead.to(tl.float32)
            k_ahead = load_tokens(k, k_strides, b, heads, tokens, start, stop, H, key_mask, key_mask_strides, d, D)
            # r_j = s ReLU(qbar . k_j)
            r = relu(tl.sum(b_k * central[None, :, :], 2, keep_dims=True)) * scale
            if WANT_Q or WANT_K:
                b_v = v_ahead.to(tl.float32)
                v_ahead = load_tokens(
                    v, v_strides, b, heads, tokens, start, stop, H, key_mask, key_mask_strides, dv, DV
                )
                dr = (tl.sum(b_v * dz[None, :, :], 2, keep_dims=True) - dz_z[None, :, :]) * gain[None, :, :]
                # NaN scores pass the gradient on, as torch's ReLU does.
                dr = tl.where(rows & ~(r <= 0.0), dr, 0.0)
                if WANT_Q:
                    dcentral += dr * b_k
                if WANT_Q and TIED:
                    tl.store(dscores + dscores_at, dr, mask=exists)
                if WANT_K:
                    b_dk = tl.where(rows, dr * central[None, :, :] * scale, 0.0)
                    tl.store(dk + dk_at, b_dk.to(dk.dtype.element_ty), mask=inside(exists, d, D))
            if WANT_V:
                # z = rho sum_j r_j v_j / R
                b_dv = tl.where(rows, r * gain[None, :, :] * dz[None, :, :], 0.0)
                tl.store(dv_out + dv_at, b_dv.to(dv_out.dtype.element_ty), mask=inside(exists, dv, DV))
    if WANT_Q:
        store_part(dcentral_parts, tl.sum(dcentral, 0) * scale, b, heads, H, split, splits, d, D)


@triton.jit(do_not_specialize=SIZES)
def linear_bwd_queries_kernel(
    q, query_mask, key_mask, dq,  # (B, H, N, d), (B, N), (B, M), like q
    central_query, energy_sum, dscores, dcentral_parts, key_splits,  # (B, H, d), (B, H), (B, H, M), (B, H, splits, d)
    q_strides, dq_strides, query_mask_strides, key_mask_strides, H, N, splits, split_tokens, scale, eps,
    d: tl.constexpr, D: tl.constexpr, G: tl.constexpr, BT: tl.constexpr, TIED: tl.constexpr,
):  # fmt: skip
    b, heads, split, group = where_am_i(splits, H, G)
    dcentral = sum_of_splits(dcentral_parts, b, heads, H, key_splits, d, D, G, BT)
    central = load_head(central_query, b, heads, H, H * d, d, 1, d, D)
    central_dcentral = dot_of_heads(central, dcentral)
    per_energy = scale / (load_head(energy_sum, b, heads, H, H, 1, 0, 1, 1) + eps)
    start = split * split_tokens
    stop = tl.minimum(start + split_tokens, N)
    steps = tl.cdiv(stop - start, BT)
    # Backwards, as in the forward pass: the tied Q was read last at its end.
    tokens = start + (steps - 1) * BT + tl.arange(0, BT)
    ahead = load_tokens(q, q_strides, b, heads, tokens, start, stop, H, query_mask, query_mask_strides, d, D)
    for _ in range(steps):
        rows = rows_at(b, heads, tokens, start, stop, H, query_mask, query_mask_strides)
        exists = rows_at(b, heads, tokens, start, stop, H, None, query_mask_strides)
        if TIED:
            key_rows = rows_at(b, heads, tokens, start, stop, H, key_mask, key_mask_strides)
            dr = tl.load(
                dscores + offsets((tl.cast(H, tl.int64) * N, N, 1, 0), b, heads, tokens, 1), mask=key_rows, other=0.0
            )
        dq_at = offsets(dq_strides, b, heads, tokens, D)
        tokens -= BT
        b_q = ahead.to(tl.float32)
        ahead = load_tokens(q, q_strides, b, heads, tokens, start, stop, H, query_mask, query_mask_strides, d, D)
        # qbar = sum_i e_i u_i / E,  e_i = ||u_i||,  u = s q
        u = b_q * scale
        e = tl.sqrt(tl.sum(u * u, 2, keep_dims=True))
        de = tl.sum(u * dcentral[None, :, :], 2, keep_dims=True) - central_dcentral[None, :, :]
        direction = tl.where(e > 0.0, de / e, 0.0)
        b_dq = per_energy[None, :, :] * (e * dcentral[None, :, :] + direction * u)
        b_dq = tl.where(rows, b_dq, 0.0)
        if TIED:
            # dk_j = s dr_j qbar, whose row this is too
            b_dq += tl.where(key_rows, dr * central[None, :, :] * scale, 0.0)
        tl.store(dq + dq_at, b_dq.to(dq.dtype.element_ty), mask=inside(exists, d, D))


def forward(q, k, v, eps, rho, head_rho, key_padding_mask, query_padding_mask):
    B, H, N, d = q.shape
    M, dv = v.shape[2:]
    if 0 in (*q.shape, *v.shape):
        return eager.forward(q, k, v, eps, rho, head_rho, key_padding_mask, query_padding_mask)
    countable("infsa::linear", q, v)
    tied = k is None
    k = q if tied else k
    config = configs.linear(q, v, max(N, M))
    groups = B * triton.cdiv(H, config.heads)
    splits, split_tokens = config.splits(N, groups)
    key_splits, key_split_tokens = config.splits(M, groups)
    whole = splits == key_splits == 1
    sizes = {"d": d, "D": padded(d), "G": config.heads, "BT": config.tokens, "num_warps": config.num_warps}

    out = q.new_empty(B, H, dv)
    context, central_query, energy_sum, score_sum = (
        q.new_empty(shape, dtype=torch.float32) for shape in ((B, H, dv), (B, H, d), (B, H), (B, H))
    )
    scratch = None, None, None, None
    if not whole:
        scratch = [q.new_empty(B, H, n, dtype=torch.float32) for n in (splits * d, splits, key_splits * dv, key_splits)]
    central_parts, energy_parts, context_parts, score_parts = scratch
    tickets = None if whole else q.new_empty(groups, dtype=torch.int32)
    if not whole:
        launch(
            linear_fwd_queries_kernel, groups * splits, q.device, q, query_padding_mask, central_parts, energy_parts, tickets,
            q.stride(), strides(query_padding_mask, 2), H, N, splits, split_tokens, **sizes,
        )  # fmt: skip
    launch(
        linear_fwd_keys_kernel, groups * key_splits, q.device,
        q, k, v, query_padding_mask, key_padding_mask, head_rho, out, context, central_query, energy_sum, score_sum,
        central_parts, energy_parts, splits, context_parts, score_parts, tickets,
        q.stride(), k.stride(), v.stride(), strides(query_padding_mask, 2), strides(key_padding_mask, 2), strides(head_rho, 2),
        H, N, M, key_splits, key_split_tokens, scale(q), eps, rho, dv=dv, DV=padded(dv), WHOLE=whole, **sizes,
    )  # fmt: skip
    return out, context, central_query, energy_sum, score_sum


def backward(
    dout, q, k, v, context, central_query, energy_sum, score_sum, eps, rho, head_rho, key_padding_mask, query_padding_mask,
    gradients,
):  # fmt: skip
    B, H, N, d = q.shape
    M, dv_size = v.shape[2:]
    if 0 in (*q.shape, *v.shape):
        return eager.backward(
            dout, q, k, v, context, central_query, energy_sum, score_sum, eps, rho, head_rho, key_padding_mask,
            query_padding_mask, gradients,
        )  # fmt: skip
    countable("infsa::linear", q, v)
    dq, dk, dv, dhead_rho = gradients
    want_q = dq is not None
    tied = k is None
    k = q if tied else k
    context, central_query, energy_sum, score_sum = (
        t.contiguous() for t in (context, central_query, energy_sum, score_sum)
    )
    config = configs.linear(q, v, max(N, M))
    groups = B * triton.cdiv(H, config.heads)
    splits, split_tokens = config.splits(N, groups)
    key_splits, key_split_tokens = config.splits(M, groups)
    sizes = {
        "d": d,
        "D": padded(d),
        "G": config.heads,
        "BT": config.tokens,
        "num_warps": config.num_warps,
        "TIED": tied,
    }

    dcentral_parts = q.new_empty(B, H, key_splits, d, dtype=torch.float32) if want_q else None
    dscores = q.new_empty(B, H, M, dtype=torch.float32) if want_q and tied else None
    launch(
        linear_bwd_keys_kernel, groups * key_splits, q.device,
        dout, k, v, key_padding_mask, head_rho, context, central_query, score_sum,
        dk, dv, dhead_rho, dscores, dcentral_parts,
        dout.stride(), k.stride(), v.stride(), strides(dk, 4), strides(dv, 4),
        strides(key_padding_mask, 2), strides(head_rho, 2), H, M, key_splits, key_split_tokens, scale(q), eps, rho,
        dv=dv_size, DV=padded(dv_size), WANT_Q=want_q, WANT_K=dk is not None, WANT_V=dv is not None,
        WANT_RHO=dhead_rho is not None, **sizes,
    )  # fmt: skip
    if want_q:
        launch(
            linear_bwd_queries_kernel, groups * splits, q.device,
            q, query_padding_mask, key_padding_mask, dq, central_query, energy_sum, dscores, dcentral_parts, key_splits,
            q.stride(), dq.stride(), strides(query_padding_mask, 2), strides(key_padding_mask, 2),
            H, N, splits, split_tokens, scale(q), eps, **sizes,
        )  # fmt: skip

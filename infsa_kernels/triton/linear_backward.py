"""The gradients of Linear-InfSA; the equations stand in linear.py, and what its kernels share with these."""

import torch
import triton
import triton.language as tl

from ..eager import linear as eager
from ..eager.common import scale
from . import configs
from .launch import SIZES, Launch, countable, in_elements, maker, padded, planned, relu, strides
from .linear_fold import Fold
from .packed import Packing, tiles_of_all, tiles_of_sequence
from .tokens import (
    dot_of_heads,
    effective_rho,
    inside,
    key_counts,
    keys_of,
    load_head,
    load_tokens,
    offsets,
    rows_at,
    store_part,
    sum_of_splits,
    where_am_i,
)


@triton.jit(do_not_specialize=SIZES)
def linear_bwd_keys_kernel(
    dout, k, v, key_mask, head_rho, cu_seqlens_k,  # (B, H, dv), (B, H, M, d), (B, H, M, dv), (B, M), (B, H), (S + 1)
    context, central_query, score_sum,  # (B, H, dv), (B, H, d), (B, H)
    absolute_sum, value_mean, key_counts,  # of a floor: (B, H), (B, H, dv), and (B,) if masked
    dk, dv_out, dhead_rho, dscores, dcentral_parts,  # like k, like v, (B, H), (B, H, M), (B, H, splits, d)
    dout_strides, k_strides, v_strides, dk_strides, dv_strides, key_mask_strides, head_rho_strides,
    H, M, splits, split_tokens, sequences, scale, eps, rho, score_floor,
    d: tl.constexpr, dv: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, G: tl.constexpr, BT: tl.constexpr,
    TIED: tl.constexpr, WANT_Q: tl.constexpr, WANT_K: tl.constexpr, WANT_V: tl.constexpr, WANT_RHO: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    k_strides, v_strides = in_elements(k_strides, UNIT), in_elements(v_strides, UNIT)
    dk_strides, dv_strides = in_elements(dk_strides, UNIT), in_elements(dv_strides, UNIT)
    b, heads, split, s, group, own, start, stop = where_am_i(splits, split_tokens, H, G, cu_seqlens_k, sequences, M)
    if cu_seqlens_k is not None and (own > 0) & (start >= stop):
        return
    stride_s, stride_h, stride_d = dout_strides
    dz = load_head(dout, s, heads, H, stride_s, stride_h, stride_d, dv, DV)
    z = load_head(context, s, heads, H, H * dv, dv, 1, dv, DV)
    dz_z = dot_of_heads(dz, z)
    if WANT_RHO and own == 0:
        store_part(dhead_rho, rho * dz_z, s, heads, H, 0, 1, 1, 1)

    rho = effective_rho(rho, head_rho, head_rho_strides, s, heads, H)
    norm = load_head(score_sum, s, heads, H, H, 1, 0, 1, 1) + eps
    if score_floor is not None:
        share = score_floor * load_head(absolute_sum, s, heads, H, H, 1, 0, 1, 1)
        norm = norm + share
        mean = load_head(value_mean, s, heads, H, H * dv, dv, 1, dv, DV)
        dabsolute = score_floor * dot_of_heads(dz, mean - z) * (rho / norm)
        share = share / keys_of(key_counts, b, cu_seqlens_k, s, M)
    gain = rho / norm
    central = load_head(central_query, s, heads, H, H * d, d, 1, d, D)
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
            t = tl.sum(b_k * central[None, :, :], 2, keep_dims=True)
            r = relu(t) * scale
            if WANT_Q or WANT_K:
                b_v = v_ahead.to(tl.float32)
                v_ahead = load_tokens(
                    v, v_strides, b, heads, tokens, start, stop, H, key_mask, key_mask_strides, dv, DV
                )
                dr = (tl.sum(b_v * dz[None, :, :], 2, keep_dims=True) - dz_z[None, :, :]) * gain[None, :, :]
                # NaN scores pass the gradient on, as torch's ReLU does.
                dr = tl.where(rows & ~(r <= 0.0), dr, 0.0)
                if score_floor is not None:
                    # A factor, not a choice: where t is 0 a gradient that is NaN stays NaN.
                    sign = tl.where(t > 0.0, 1.0, tl.where(t < 0.0, -1.0, 0.0))
                    dr += tl.where(rows, sign * dabsolute[None, :, :], 0.0)
                if WANT_Q:
                    dcentral += dr * b_k
                if WANT_Q and TIED:
                    tl.store(dscores + dscores_at, dr, mask=exists)
                if WANT_K:
                    b_dk = tl.where(rows, dr * central[None, :, :] * scale, 0.0)
                    tl.store(dk + dk_at, b_dk.to(dk.dtype.element_ty), mask=inside(exists, d, D))
            if WANT_V:
                # z = rho sum_j r_j v_j / R, and r_j with the floor in it
                if score_floor is not None:
                    r += share[None, :, :]
                b_dv = tl.where(rows, r * gain[None, :, :] * dz[None, :, :], 0.0)
                tl.store(dv_out + dv_at, b_dv.to(dv_out.dtype.element_ty), mask=inside(exists, dv, DV))
    if WANT_Q:
        store_part(dcentral_parts, tl.sum(dcentral, 0) * scale, b, heads, H, split, splits, d, D)


@triton.jit(do_not_specialize=SIZES)
def linear_bwd_queries_kernel(
    q, query_mask, key_mask, cu_seqlens_q, cu_seqlens_k, dq,  # (B, H, N, d), (B, N), (B, M), (S + 1) both, like q
    central_query, energy_sum, dscores, dcentral_parts, key_splits,  # (B, H, d), (B, H), (B, H, M), (B, H, splits, d)
    q_strides, dq_strides, query_mask_strides, key_mask_strides, H, N, M, splits, split_tokens, sequences, scale, eps,
    d: tl.constexpr, D: tl.constexpr, G: tl.constexpr, BT: tl.constexpr, TIED: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    q_strides, dq_strides = in_elements(q_strides, UNIT), in_elements(dq_strides, UNIT)
    b, heads, split, s, group, own, start, stop = where_am_i(splits, split_tokens, H, G, cu_seqlens_q, sequences, N)
    if cu_seqlens_q is not None and start >= stop:
        return
    first, count = tiles_of_sequence(cu_seqlens_k, s, M, split_tokens, key_splits)
    dcentral = sum_of_splits(dcentral_parts, b, heads, H, first, count, key_splits, d, D, G, BT)
    central = load_head(central_query, s, heads, H, H * d, d, 1, d, D)
    central_dcentral = dot_of_heads(central, dcentral)
    per_energy = scale / (load_head(energy_sum, s, heads, H, H, 1, 0, 1, 1) + eps)
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


@planned
def backward(
    dout, q, k, v, context, central_query, energy_sum, score_sum, eps, rho, head_rho, key_padding_mask, query_padding_mask,
    gradients,
):  # fmt: skip
    if 0 in (*q.shape, *v.shape):
        return eager.backward
    run = plan_backward(dout, q, k, v, eps, None, rho, head_rho, key_padding_mask, query_padding_mask, gradients)

    def run_without_floor(dout, q, k, v, context, central_query, energy_sum, score_sum, eps, rho, *more):
        run(dout, q, k, v, context, central_query, energy_sum, score_sum, None, None, *more)

    return run_without_floor


def split(config, groups: int, N: int, M: int, packing: Packing | None) -> tuple[tuple[int, int], tuple[int, int]]:
    """How many splits of how many tokens the queries are cut into, and the keys."""
    if packing is None:
        return config.splits(N, groups), config.splits(M, groups)
    # Both sides into splits of one length, by which a program finds those of the other. A short sequence is one.
    tokens = max(N, M)
    _, split_tokens = (1, tokens + 1) if packing.longest <= configs.WHOLE else config.splits(tokens, groups)
    return (tiles_of_all(N, split_tokens, packing), split_tokens), (
        tiles_of_all(M, split_tokens, packing),
        split_tokens,
    )


def plan_backward(
    dout, q, k, v, eps, score_floor, rho, head_rho, key_padding_mask, query_padding_mask, gradients,
    packing: Packing | None = None,
):  # fmt: skip
    """(dout, q, k, v, what forward kept, head_rho, masks, gradients, offsets): linear_bwd, or with a floor linear_floor_bwd.

    Packed sequences as in the forward pass.
    """
    B, H, N, d = q.shape
    M, dv_size = v.shape[2:]
    countable("infsa::linear" if packing is None else packing.op, q, v)
    dq, dk, dv, dhead_rho = gradients
    want_q = dq is not None
    tied = k is None
    k = q if tied else k
    samples = B if packing is None else packing.sequences
    longest = max(N, M) if packing is None else packing.longest
    config = configs.linear(q, v, longest, "backward", score_floor is not None, None if packing is None else samples)
    groups = B * triton.cdiv(H, config.heads)
    (splits, split_tokens), (key_splits, key_split_tokens) = split(config, groups, N, M, packing)
    sequences = None if packing is None else samples
    sizes = config.sizes(d) | {"TIED": tied}
    keys = Launch(
        linear_bwd_keys_kernel, groups * key_splits, q.device,
        dout.stride(), k.stride(), v.stride(), strides(dk, 4), strides(dv, 4),
        strides(key_padding_mask, 2), strides(head_rho, 2), H, M, key_splits, key_split_tokens, sequences,
        scale(q), eps, rho, score_floor,
        dv=dv_size, DV=padded(dv_size), WANT_Q=want_q, WANT_K=dk is not None, WANT_V=dv is not None,
        WANT_RHO=dhead_rho is not None, **sizes,
    )  # fmt: skip
    fold, parts = None, key_splits
    if want_q:
        if packing is None and config.folds(key_splits, d, groups * splits):
            fold, parts = Fold(B, H, key_splits, d, q.device), 1
        queries = Launch(
            linear_bwd_queries_kernel, groups * splits, q.device,
            q.stride(), dq.stride(), strides(query_padding_mask, 2), strides(key_padding_mask, 2),
            H, N, M, splits, split_tokens, sequences, scale(q), eps, **sizes,
        )  # fmt: skip

    new_dcentral_parts, new_dscores = (
        maker(q.device, torch.float32, B, H, *shape) for shape in ((key_splits, d), (M,))
    )

    def run(
        dout, q, k, v, context, central_query, energy_sum, score_sum, absolute_sum, value_mean, head_rho, key_padding_mask,
        query_padding_mask, gradients, cu_seqlens_q=None, cu_seqlens_k=None,
    ):  # fmt: skip
        dq, dk, dv, dhead_rho = gradients
        k = q if k is None else k
        context, central_query, energy_sum, score_sum, absolute_sum, value_mean = (
            None if t is None else t.contiguous()
            for t in (context, central_query, energy_sum, score_sum, absolute_sum, value_mean)
        )
        dcentral_parts = new_dcentral_parts() if want_q else None
        dscores = new_dscores() if want_q and tied else None
        keys(
            dout, k, v, key_padding_mask, head_rho, cu_seqlens_k, context, central_query, score_sum,
            absolute_sum, value_mean, key_counts(score_floor, key_padding_mask), dk, dv, dhead_rho, dscores, dcentral_parts,
        )  # fmt: skip
        if fold is not None:
            dcentral_parts, _ = fold(dcentral_parts)
        if want_q:
            queries(
                q,
                query_padding_mask,
                key_padding_mask,
                cu_seqlens_q,
                cu_seqlens_k,
                dq,
                central_query,
                energy_sum,
                dscores,
                dcentral_parts,
                parts,
            )

    return run

"""Pure InfSA in torch operations, a block of queries at a time: O(N) memory, forward and written-out gradients (docs/pure.md)."""

from collections.abc import Iterator

import torch
from torch import Tensor

from .common import acc_dtype, effective_rho, finite, remove, rows, scale, split, unit

# Scores held at a time, over all heads. Large enough to keep matrix products efficient, small enough that a block's
# float32 sum of squares is exact to its last digits.
BLOCK_SCORES = 1 << 22

# The gradient of so few scores may be a small difference of two terms, of which c, taken from the rounded output, would leave
# its rounding (docs/pure.md): c is made from P and G there.
FEW_SCORES = 32 * 32


def forward(q, k, v, eps, rho, head_rho, key_padding_mask, query_padding_mask):
    u, kappa, v_acc, u_unit, k_unit = _inputs(q, k, v, key_padding_mask, query_padding_mask)
    v_unit = unit(v_acc)  # values that cancel stay in range as they are summed
    v_acc = v_acc * v_unit
    out = u.new_empty(*u.shape[:3], v.shape[3])
    squares = u.new_zeros(u.shape[:2])
    for block in _blocks(u, kappa):
        scores = _scores(u, kappa, block, key_padding_mask, query_padding_mask)
        squares += scores.square().sum((-2, -1))
        out[:, :, block] = scores @ v_acc
    norm = squares.sqrt()
    out *= effective_rho(rho, head_rho, 2) / (norm + eps * u_unit * k_unit)[..., None, None]
    out /= v_unit  # apart: both at once may overflow
    return output_like(q, v).copy_(remove(out, query_padding_mask)), norm / u_unit / k_unit


def backward(
    dout, q, k, v, out, norm, eps, rho, head_rho, key_padding_mask, query_padding_mask, gradients, dout_out=None
):  # fmt: skip
    """dout_out: <dout, out> (B, H), of which ``out`` is not all, nor are q, k and v."""
    u, kappa, v_acc, u_unit, k_unit = _inputs(q, k, v, key_padding_mask, query_padding_mask)
    dout = remove(dout, query_padding_mask).to(u.dtype)
    dq, dk, dv, dhead_rho = gradients
    s = scale(q)
    norm = norm * u_unit * k_unit
    F = norm + eps * u_unit * k_unit

    # O = rho P v / F: the norm's own gradient is one scalar per head, c, times P.
    mantissa, per_norm = (t[..., None, None] for t in split(F))
    gain = effective_rho(rho, head_rho, 2) / mantissa
    few = dout_out is None and _few(u, kappa)
    if dout_out is None:
        dout_out = (dout * remove(out, query_padding_mask)).sum((-2, -1))
    dout_out = dout_out.to(norm.dtype) / per_norm[..., 0, 0]
    du, dkappa, dv_acc = torch.zeros_like(u), torch.zeros_like(kappa), torch.zeros_like(v_acc)
    drho = torch.zeros_like(norm)
    for block in _blocks(u, kappa):
        scores = _scores(u, kappa, block, key_padding_mask, query_padding_mask)
        dout_v = dout[:, :, block] @ v_acc.mT
        if few:
            dout_out = gain[..., 0, 0] * (scores * dout_v).sum((-2, -1))
        c = torch.where(norm > 0, dout_out / F / norm, 0)[..., None, None]
        dscores = (gain * dout_v - c * scores).masked_fill_(scores <= 0, 0)
        if dq is not None:
            du[:, :, block] = dscores @ kappa
        if dk is not None or (dq is not None and k is None):
            dkappa += dscores.mT @ u[:, :, block]
        if dv is not None:
            dv_acc += scores.mT @ dout[:, :, block]
        if dhead_rho is not None:
            drho += (scores * dout_v).sum((-2, -1))
    # dS came out divided by both units, kappa and u multiplied by their own.
    # A row that is ignored has no gradient, even where 0 met infinity.
    du = remove(du, query_padding_mask) * finite(s * per_norm * u_unit[..., None, None])
    dkappa = remove(dkappa, key_padding_mask) * finite(s * per_norm * k_unit[..., None, None])
    if dq is not None:
        dq.copy_(du + dkappa if k is None else du)
    if dk is not None:
        dk.copy_(dkappa)
    if dv is not None:
        dv.copy_(remove(gain * dv_acc * per_norm, key_padding_mask))
    if dhead_rho is not None:
        dhead_rho.copy_(rho * drho / F)


def output_like(q: Tensor, v: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised output (B, H, N, dv) in the memory layout of q: token-major if q is a view of [B, N, H, d]."""
    B, H, N, _ = q.shape
    if q.stride(1) < q.stride(2):
        return v.new_empty(B, N, H, v.shape[3], dtype=dtype).transpose(1, 2)
    return v.new_empty(B, H, N, v.shape[3], dtype=dtype)


def _inputs(q, k, v, key_padding_mask, query_padding_mask) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """u = s q, kappa = s k and v in the accumulation dtype, ignored rows 0; u and kappa in units, (B, H), that follow."""
    s, acc = scale(q), acc_dtype(q)
    u = remove(q, query_padding_mask).to(acc)
    kappa = remove(q if k is None else k, key_padding_mask).to(acc)
    units = unit(u), unit(kappa)
    u, kappa = (x * (s * x_unit) for x, x_unit in zip((u, kappa), units))
    return u, kappa, remove(v, key_padding_mask).to(acc), *(x[..., 0, 0] for x in units)


def _scores(u, kappa, block, key_padding_mask, query_padding_mask) -> Tensor:
    """ReLU(u kappa^T) of a block of queries; 0 for what is removed, though the other side be infinite or NaN."""
    scores = torch.relu(u[:, :, block] @ kappa.mT)
    if key_padding_mask is not None:
        scores.masked_fill_(rows(key_padding_mask)[..., None, :], 0)
    return remove(scores, None if query_padding_mask is None else query_padding_mask[:, block])


def _blocks(u: Tensor, kappa: Tensor) -> Iterator[slice]:
    B, H, N, _ = u.shape
    step = N if _few(u, kappa) else BLOCK_SCORES // max(1, B * H * kappa.shape[2])
    step = max(1, step)
    return (slice(i, i + step) for i in range(0, N, step))


def _few(u: Tensor, kappa: Tensor) -> bool:
    return u.shape[2] * kappa.shape[2] <= FEW_SCORES

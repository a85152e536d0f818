"""`infsa::pooled_linear`: Linear-InfSA self-attention with its projections, from tokens to the one row that all of them get.

    y = W_o z + b_o,   z_h = rho (W_v,h p_h + A_h b_v,h),   p_h = sum_j a_hj x^_j,   A_h = sum_j a_hj

The output is one row per image, so x is pooled first and projected once: values, the broadcast output and its projection are
never formed for a token, and neither are keys, whose scores x^_j . (W_k,h^T qbar_h) come from x itself. Two raw operators carry
all that touches tokens, `central_query` and `score_pool`; the rest is per image, in float32 and differentiated by autograd.

Exactness, gradients and what is saved: docs/pooled_linear.md.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..eager.common import acc_dtype
from . import central_query, check, score_pool, score_pool_floor, sharding
from .autograd import skipped_if_unused
from .backends import backend_of_backward, choose_backend
from .register import overridable, public

OP = "infsa::pooled_linear"


@overridable
def pooled_linear_infsa(
    x: Tensor,
    num_heads: int,
    q_weight: Tensor,
    v_weight: Tensor,
    out_weight: Tensor,
    *,
    q_bias: Tensor | None = None,
    k_weight: Tensor | None = None,
    k_bias: Tensor | None = None,
    v_bias: Tensor | None = None,
    out_bias: Tensor | None = None,
    rho: float | Tensor = 0.95,
    eps: float = 1e-6,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float | None = None,
    padding_mask: Tensor | None = None,
    score_floor: float = 0.0,
) -> Tensor:
    """Linear-InfSA self-attention as a whole layer: LayerNorm, projections, attention, output projection.

    What attention layers compute from x by ``nn.LayerNorm``, three ``nn.Linear``, :func:`linear_infsa` and one more
    ``nn.Linear``, in exact arithmetic, and with all its gradients; but with one product of x and a square matrix, not four.

    Args:
        x: tokens (B, N, D); float32, bfloat16, float16 or float64. Any strides.
        num_heads: H, which divides the projections' outputs.
        q_weight: (H*d, D), as in ``nn.Linear``. v_weight: (H*dv, D). out_weight: (D_out, H*dv). In the dtype of ``x``.
        k_weight: (H*d, D); None for the paper's tied operator, whose keys are the queries.
        q_bias, k_bias: (H*d,). v_bias: (H*dv,). out_bias: (D_out,). In the dtype of ``x`` or float32.
        rho: output scale of the heads, a number or a tensor of shape (), (1,) or (H,), which gets its gradient.
        eps: added to the sums of energies and of scores before they divide; above 0.
        norm_eps: LayerNorm's eps, if the layer starts with one; None for no LayerNorm.
        norm_weight, norm_bias: (D,), LayerNorm's affine part.
        padding_mask: (B, N) bool, True = the token is removed, as a query and as a key.
        score_floor: as in :func:`linear_infsa`.

    Returns:
        (B, D_out) in the dtype of ``x``: the layer's output at every position.

    Raises:
        ValueError: a wrong shape, device, rho, eps or score_floor. TypeError: a wrong dtype or layout.

    Example::

        >>> x, w = torch.randn(1, 4096, 64), torch.randn(3, 64, 64)
        >>> pooled_linear_infsa(x, 4, *w, norm_eps=1e-6).shape
        torch.Size([1, 64])
    """
    return pooled_linear(
        x, q_weight, v_weight, out_weight, num_heads, q_bias, k_weight, k_bias, v_bias, out_bias, rho, eps, norm_weight,
        norm_bias, norm_eps, padding_mask, score_floor=score_floor,
    )  # fmt: skip


TENSORS = {
    "x": "(B, N, D)",
    "norm_weight": "(D,) or acc",
    "norm_bias": "(D,) or acc",
    "padding_mask": "(B, N) bool",
    "q_weight": "(H*d, D)",
    "k_weight": "(H*d, D)",
    "v_weight": "(H*dv, D)",
    "out_weight": "(D_out, H*dv)",
    "q_bias": "(H*d,) or acc",
    "k_bias": "(H*d,) or acc",
    "v_bias": "(H*dv,) or acc",
    "out_bias": "(D_out,) or acc",
}


def cast(dtype_of, args, kwargs):
    """Tokens and matrices take autocast's dtype; float32 vectors stay, since they are used in float32."""
    given = dict(zip(pooled_linear.signature.arguments, args)) | kwargs
    if given.get("norm_eps") is not None and dtype_of(given["x"]) != given["x"].dtype:
        given |= {"x": _normalised(given), "norm_weight": None, "norm_bias": None, "norm_eps": None}

    def concerned(name, t):
        matrix = name in ("x", "q_weight", "k_weight", "v_weight", "out_weight")
        return matrix or (name.endswith(("bias", "norm_weight")) and t.dtype != torch.float32)

    return (), {n: t.to(dtype_of(t)) if isinstance(t, Tensor) and concerned(n, t) else t for n, t in given.items()}


def _normalised(given):
    """LayerNorm of the tokens in float32, before they are rounded: a mean or a channel that is large would take the digits."""
    x, weight, bias = (
        t.float() if isinstance(t, Tensor) and t.dtype in (torch.bfloat16, torch.float16) else t
        for t in (given.get(name) for name in ("x", "norm_weight", "norm_bias"))
    )
    eps, mask = given["norm_eps"], given.get("padding_mask")
    _TOKENS.check((x, weight, bias, eps, mask))
    if mask is not None:
        # A removed token may hold anything, but 0 * NaN would reach gradients. Its stand-in has a variance: eps may be 0.
        x = torch.where(mask[..., None], torch.arange(x.shape[2], dtype=x.dtype, device=x.device), x)
    return torch.nn.functional.layer_norm(x, x.shape[2:], weight, bias, eps)


_TOKENS = check.Signature(
    "pooled_linear(Tensor x, Tensor? norm_weight, Tensor? norm_bias, float? norm_eps, Tensor? padding_mask) -> Tensor",
    TENSORS,
)


@public(
    "pooled_linear(Tensor x, Tensor q_weight, Tensor v_weight, Tensor out_weight, int num_heads, Tensor? q_bias=None, "
    "Tensor? k_weight=None, Tensor? k_bias=None, Tensor? v_bias=None, Tensor? out_bias=None, Tensor? rho=None, "
    "float eps=1e-6, Tensor? norm_weight=None, Tensor? norm_bias=None, float? norm_eps=None, Tensor? padding_mask=None, "
    "str backend='', float score_floor=0.0) -> Tensor",
    TENSORS,
    raw=[central_query.raw, score_pool.raw, score_pool_floor.raw],
    cast=cast,
)
def pooled_linear(
    x, q_weight, v_weight, out_weight, num_heads, q_bias=None, k_weight=None, k_bias=None, v_bias=None, out_bias=None,
    rho=None, eps=1e-6, norm_weight=None, norm_bias=None, norm_eps=None, padding_mask=None, backend="", score_floor=0.0,
    over_ranks=None,
):  # fmt: skip
    """`torch.ops.infsa.pooled_linear`: the row (B, D_out).

    over_ranks: what, of the name of a backend, gives the two raw operators for tokens of which other ranks have the rest.
    """
    _check_heads(num_heads, q_weight=q_weight, k_weight=k_weight, v_weight=v_weight, out_weight=out_weight)
    pooled_linear.signature.check(
        (x, q_weight, v_weight, out_weight, num_heads, q_bias, k_weight, k_bias, v_bias, out_bias, rho, eps, norm_weight,
         norm_bias, norm_eps, padding_mask, backend, score_floor)
    )  # fmt: skip
    if isinstance(rho, Tensor):
        check.rho_tensor(OP, rho, x, num_heads, "(H,)", "x")
    elif rho is not None:
        check.finite(OP, "rho", rho)
    if k_bias is not None and k_weight is None:
        raise ValueError(f"{OP}: k_bias is given without k_weight; keys tied to the queries have q_bias")
    if norm_eps is None and not (norm_weight is None and norm_bias is None):
        raise ValueError(f"{OP}: norm_weight or norm_bias is given without norm_eps; give LayerNorm's eps, as 1e-5")

    if sharding.over_sequence(1, x):
        from ..distributed import dtensor

        given = dict(zip(pooled_linear.signature.arguments, (
            x, q_weight, v_weight, out_weight, num_heads, q_bias, k_weight, k_bias, v_bias, out_bias, rho, eps, norm_weight,
            norm_bias, norm_eps, padding_mask, backend, score_floor)))  # fmt: skip
        return dtensor.pooled(x, given)

    d = q_weight.shape[0] // num_heads
    shape = x.shape[0], num_heads, x.shape[1], d
    name = choose_backend("pooled_linear", x.device, x.dtype, shape, backend or backend_of_backward())
    query_op, pool_op = over_ranks(name) if over_ranks else _raw(name, score_floor)
    floor = () if score_floor == 0 else (score_floor,)
    tensors = x, q_weight, k_weight, v_weight, out_weight, q_bias, k_bias, v_bias, out_bias, norm_weight, norm_bias
    rho_tensor = rho if isinstance(rho, Tensor) else None

    with skipped_if_unused(*tensors, rho_tensor):
        queries = Projection.of(q_weight, q_bias, num_heads, norm_weight, norm_bias)
        qbar = query_op(x, queries.whole().to(x.dtype), queries.bias, norm_eps, eps, padding_mask)[0]  # (B, H, d)
        if k_weight is not None:
            queries = Projection.of(k_weight, k_bias, num_heads, norm_weight, norm_bias)
        keys, key_bias = keys_of(qbar, queries)
        pooled, mass, *_ = pool_op(x, keys, key_bias, norm_eps, eps, *floor, padding_mask)  # (B, H, D), (B, H)
        values = Projection.of(v_weight, v_bias, num_heads, norm_weight, norm_bias)
        return output_of(pooled, mass, values, rho, out_weight, out_bias).to(x.dtype)


def _raw(backend, score_floor):
    pool = score_pool if score_floor == 0 else score_pool_floor
    return central_query.raw.forwards[backend], pool.raw.forwards[backend]


class Projection(NamedTuple):
    """A projection of LayerNorm's output as one of normalised tokens, per head: W x~ + b = W (scale * x^) + bias."""

    weight: Tensor  # (H, ., D)
    bias: Tensor | None  # (H, .)
    scale: Tensor | None  # (D,), which vectors of channels take instead of the matrix where they can

    @classmethod
    def of(cls, weight, bias, num_heads, norm_weight, norm_bias):
        acc = acc_dtype(weight)
        heads = num_heads, weight.shape[0] // num_heads
        if norm_bias is not None:
            shift = weight.to(acc) @ norm_bias.to(acc)
            bias = shift if bias is None else bias.to(acc) + shift
        bias = None if bias is None else bias.to(acc).view(heads)
        scale = None if norm_weight is None else norm_weight.to(acc)
        return cls(weight.view(*heads, weight.shape[1]), bias, scale)

    def whole(self) -> Tensor:
        """The matrix of normalised tokens."""
        return self.weight if self.scale is None else self.weight * self.scale


def keys_of(qbar, projection):
    """Scores r_j = ReLU(qbar . s k_j), k_j = W x~_j + b, as those of x^ with one key a head: (B, H, D) and (B, H) or None."""
    weight, bias, scale = projection
    if qbar.shape[-1]:
        qbar = qbar * qbar.shape[-1] ** -0.5
    keys = _per_head(qbar, weight)
    return keys if scale is None else keys * scale, None if bias is None else (qbar * bias).sum(-1)


def output_of(pooled, mass, projection, rho, out_weight, out_bias):
    """The layer's row (B, D_out), in the dtype of sums, from pooled tokens (B, H, D) and the sums of their weights (B, H)."""
    acc = pooled.dtype
    weight, bias, scale = projection
    z = _per_head(pooled if scale is None else pooled * scale, weight.mT)
    if bias is not None:
        z = z + mass[..., None] * bias
    if isinstance(rho, Tensor):
        rho = rho.to(acc)
        rho = rho[..., None] if rho.dim() else rho
    z = z if rho is None else rho * z
    out_bias = None if out_bias is None else out_bias.to(acc)
    return torch.nn.functional.linear(z.flatten(1), out_weight.to(acc), out_bias)


def _per_head(rows, matrices):
    """rows (B, H, m) in the dtype of sums times matrices (H, m, n): (B, H, n)."""
    acc = rows.dtype
    # Inside vmap, functorch brings autocast back, and with it a lower dtype.
    return (rows.transpose(0, 1) @ matrices.to(acc)).transpose(0, 1).to(acc)


def _check_heads(num_heads, **weights):
    if num_heads < 1:
        raise ValueError(f"{OP}: num_heads is {num_heads}, expected at least 1")
    for name, t in weights.items():
        if t is None:
            continue
        if t.dim() != 2:
            raise ValueError(
                f"{OP}: {name} has shape {list(t.shape)}, expected two dimensions, as nn.Linear.weight has"
            )
        if name != "out_weight" and t.shape[0] % num_heads:
            raise ValueError(
                f"{OP}: {name} has shape {list(t.shape)}, whose {t.shape[0]} outputs {num_heads} heads do not divide"
            )

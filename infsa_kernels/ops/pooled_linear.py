"""`infsa::pooled_linear`: Linear-InfSA self-attention with its projections, from tokens to the one row that all of them get.

    y = W_o z + b_o,   z_h = rho (W_v,h p_h + A_h b_v,h),   p_h = sum_j a_hj x^_j,   A_h = sum_j a_hj

The output is one row per image, so x is pooled first and projected once: values, the broadcast output and its projection are
never formed for a token, and neither are keys, whose scores x^_j . (W_k,h^T qbar_h) come from x itself. Two raw operators carry
all that touches tokens, `central_query` and `score_pool`; the rest is per image, in float32 and differentiated by autograd.

Exactness, gradients and what is saved: docs/pooled_linear.md.
"""

import torch
from torch import Tensor

from . import central_query, check, register, score_pool, sharding
from .backends import SUFFIXES, backend_of_backward, choose_backend
from .check_tokens import norm_eps_number

OP = "infsa::pooled_linear"


@register.overridable
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

    Returns:
        (B, D_out) in the dtype of ``x``: the layer's output at every position.

    Raises:
        ValueError: a wrong shape, device, rho or eps. TypeError: a wrong dtype or layout.

    Example::

        >>> x, w = torch.randn(1, 4096, 64), torch.randn(3, 64, 64)
        >>> pooled_linear_infsa(x, 4, *w, norm_eps=1e-6).shape
        torch.Size([1, 64])
    """
    tensors = {"x": x, "q_weight": q_weight, "v_weight": v_weight, "out_weight": out_weight}
    optional = {
        "q_bias": q_bias, "k_weight": k_weight, "k_bias": k_bias, "v_bias": v_bias, "out_bias": out_bias,
        "norm_weight": norm_weight, "norm_bias": norm_bias, "padding_mask": padding_mask,
    }  # fmt: skip
    check.layer_python_types(OP, tensors, optional, num_heads, rho, eps, norm_eps)
    op = tensor_rho if isinstance(rho, Tensor) else scalar_rho
    return op(*tensors.values(), num_heads, **optional, rho=rho, eps=eps, norm_eps=norm_eps)


def _call(
    x, q_weight, v_weight, out_weight, num_heads, q_bias=None, k_weight=None, k_bias=None, v_bias=None, out_bias=None,
    rho=None, eps=1e-6, norm_weight=None, norm_bias=None, norm_eps=None, padding_mask=None, backend="",
):  # fmt: skip
    sharding.register_waiting()
    _check_arguments(
        x, num_heads, {"q_weight": q_weight, "k_weight": k_weight, "v_weight": v_weight, "out_weight": out_weight},
        {"q_bias": q_bias, "k_bias": k_bias, "v_bias": v_bias, "out_bias": out_bias},
        {"norm_weight": norm_weight, "norm_bias": norm_bias, "norm_eps": norm_eps}, rho, padding_mask,
    )  # fmt: skip
    d, acc = q_weight.shape[0] // num_heads, check.acc_dtype(x)
    forced = backend or backend_of_backward()
    suffix = SUFFIXES[
        choose_backend("pooled_linear", x.device, x.dtype, (x.shape[0], num_heads, x.shape[1], d), forced)
    ]
    tensors = x, q_weight, k_weight, v_weight, out_weight, q_bias, k_bias, v_bias, out_bias, norm_weight, norm_bias
    rho_tensor = rho if isinstance(rho, Tensor) else None

    def heads(weight, bias):
        """A projection of LayerNorm's output as one of normalised tokens, per head: (H, ., D) and (H, .) or None."""
        weight = weight.to(acc)
        if norm_bias is not None:
            shift = weight @ norm_bias.to(acc)
            bias = shift if bias is None else bias.to(acc) + shift
        if norm_weight is not None:
            weight = weight * norm_weight.to(acc)
        width = weight.shape[0] // num_heads
        bias = None if bias is None else bias.to(acc).unflatten(0, (num_heads, width))
        return weight.unflatten(0, (num_heads, width)), bias

    with register.without_autograd_if_unused(*tensors, rho_tensor):
        weight, bias = heads(q_weight, q_bias)
        forward = central_query.raw.forwards[suffix]
        qbar = forward(x, weight.to(x.dtype), bias, norm_eps, eps, padding_mask)[0]  # (B, H, d)

        # r_j = ReLU(qbar . s k_j) with k_j = W x^_j + b
        if k_weight is not None:
            weight, bias = heads(k_weight, k_bias)
        if d:
            qbar = qbar * d**-0.5
        # Inside vmap, functorch brings autocast back, and with it a lower dtype.
        keys = torch.einsum("bhd,hdc->bhc", qbar, weight).to(acc)
        key_bias = None if bias is None else (qbar * bias).sum(-1)
        forward = score_pool.raw.forwards[suffix]
        pooled, mass, _ = forward(x, keys, key_bias, norm_eps, eps, padding_mask)  # (B, H, D), (B, H)

        weight, bias = heads(v_weight, v_bias)
        z = torch.einsum("bhc,hec->bhe", pooled, weight)
        if bias is not None:
            z = z + mass[..., None] * bias
        if rho_tensor is not None:
            rho = rho_tensor.to(acc)
            rho = rho[..., None] if rho.dim() else rho
        z = z if rho is None else rho * z
        out_bias = None if out_bias is None else out_bias.to(acc)
        return torch.nn.functional.linear(z.flatten(1), out_weight.to(acc), out_bias).to(x.dtype)


def _check_arguments(x, num_heads, weights, biases, norm, rho, padding_mask):
    for name, t in {**weights, **biases, "rho": rho}.items():
        if isinstance(t, Tensor) or name in ("q_weight", "v_weight", "out_weight"):
            check.dense(OP, name, t)
    _check_tokens(x, **norm, padding_mask=padding_mask)
    if num_heads < 1:
        raise ValueError(f"{OP}: num_heads is {num_heads}, expected at least 1")
    D = x.shape[2]
    for name, t in weights.items():
        if t is None:
            continue
        check.dtype(OP, name, t, x.dtype)
        check.device(OP, name, t, x, "x")
        if t.dim() != 2:
            raise ValueError(
                f"{OP}: {name} has shape {list(t.shape)}, expected two dimensions, as nn.Linear.weight has"
            )
        if name != "out_weight" and t.shape[0] % num_heads:
            raise ValueError(
                f"{OP}: {name} has shape {list(t.shape)}, whose {t.shape[0]} outputs {num_heads} heads do not divide"
            )
    q_width, v_width = weights["q_weight"].shape[0], weights["v_weight"].shape[0]
    out_width = weights["out_weight"].shape[0]
    check.shape(OP, "q_weight", weights["q_weight"], (q_width, D), "(H*d, D)")
    if weights["k_weight"] is not None:
        check.shape(OP, "k_weight", weights["k_weight"], (q_width, D), "(H*d, D)")
    elif biases["k_bias"] is not None:
        raise ValueError(f"{OP}: k_bias is given without k_weight; keys tied to the queries have q_bias")
    check.shape(OP, "v_weight", weights["v_weight"], (v_width, D), "(H*dv, D)")
    check.shape(OP, "out_weight", weights["out_weight"], (out_width, v_width), "(D_out, H*dv)")
    lengths = {"q_bias": (q_width, "(H*d,)"), "k_bias": (q_width, "(H*d,)"), "v_bias": (v_width, "(H*dv,)")}
    lengths["out_bias"] = out_width, "(D_out,)"
    for name, t in biases.items():
        _check_vector(name, t, x, *lengths[name])
    if isinstance(rho, Tensor):
        check.rho_tensor(OP, rho, x, num_heads, "(H,)", "x")
    elif rho is not None:
        check.finite_rho(OP, rho)


def _check_tokens(x, norm_weight, norm_bias, norm_eps, padding_mask):
    """The tokens, and what concerns them before any projection."""
    for name, t in {"x": x, "norm_weight": norm_weight, "norm_bias": norm_bias, "padding_mask": padding_mask}.items():
        if t is not None or name == "x":
            check.dense(OP, name, t)
    check.floating(OP, "x", x)
    if x.dim() != 3:
        raise ValueError(f"{OP}: x has shape {list(x.shape)}, expected (B, N, D); view it with 3 dimensions")
    for name, t in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        _check_vector(name, t, x, x.shape[2], "(D,)")
    if norm_eps is not None:
        norm_eps_number(OP, norm_eps)
    elif norm_weight is not None or norm_bias is not None:
        raise ValueError(f"{OP}: norm_weight or norm_bias is given without norm_eps; give LayerNorm's eps, as 1e-5")
    check.mask(OP, "padding_mask", padding_mask, x, x.shape[:2], "(B, N)", "x")


def _check_vector(name, t, x, length, letters):
    if t is None:
        return
    if t.dtype not in (x.dtype, check.acc_dtype(x)):
        check.dtype(OP, name, t, x.dtype)
    check.device(OP, name, t, x, "x")
    check.shape(OP, name, t, (length,), letters)


def _cast(dtype_of, args, kwargs):
    """Tokens and matrices take autocast's dtype; float32 vectors stay, since they are used in float32."""
    given = dict(zip((a.name for a in tensor_rho._schema.arguments), args)) | kwargs
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
    _check_tokens(x, weight, bias, eps, mask)
    if mask is not None:
        # A removed token may hold anything, but 0 * NaN would reach gradients. Its stand-in has a variance: eps may be 0.
        x = torch.where(mask[..., None], torch.arange(x.shape[2], dtype=x.dtype, device=x.device), x)
    return torch.nn.functional.layer_norm(x, x.shape[2:], weight, bias, eps)


_ARGUMENTS = (
    "Tensor x, Tensor q_weight, Tensor v_weight, Tensor out_weight, int num_heads, Tensor? q_bias=None, "
    "Tensor? k_weight=None, Tensor? k_bias=None, Tensor? v_bias=None, Tensor? out_bias=None, {}, float eps=1e-6, "
    "Tensor? norm_weight=None, Tensor? norm_bias=None, float? norm_eps=None, Tensor? padding_mask=None, str backend=''"
)
tensor_rho, scalar_rho = register.define(
    "pooled_linear",
    {"": _ARGUMENTS.format("Tensor? rho=None"), "scalar_rho": _ARGUMENTS.format("float rho=1.0")},
    _call,
    _cast,
)

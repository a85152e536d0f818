"""Argument checks of the raw operators for the backends written in Python and for fake tensors.

The same checks, with the same words, stand in csrc/check.h for the compiled backends; tests/ops/test_bad_input.py holds the two
together.
"""

import math

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def python_types(op, q, k, v, rho, eps, key_padding_mask, query_padding_mask):
    """What the dispatcher would refuse with a RuntimeError about schemas."""
    for name, t in (("q", q), ("k", k), ("v", v)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: {name} is a {type(t).__name__}, expected a Tensor")
    for name, t in (("key_padding_mask", key_padding_mask), ("query_padding_mask", query_padding_mask)):
        if t is not None and not isinstance(t, Tensor):
            raise TypeError(f"{op}: {name} is a {type(t).__name__}, expected a Tensor of torch.bool or None")
    _numbers(op, rho, eps)


def layer_python_types(op, tensors, optional, num_heads, rho, eps, norm_eps):
    """The same for the layer: tensors by name, those that may be None, and the numbers."""
    for name, t in tensors.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: {name} is a {type(t).__name__}, expected a Tensor")
    for name, t in optional.items():
        if t is not None and not isinstance(t, Tensor):
            raise TypeError(f"{op}: {name} is a {type(t).__name__}, expected a Tensor or None")
    if not isinstance(num_heads, (int, torch.SymInt)) or isinstance(num_heads, bool):
        raise TypeError(f"{op}: num_heads is a {type(num_heads).__name__}, expected an int")
    _numbers(op, rho, eps)
    if norm_eps is not None:
        number(op, "norm_eps", norm_eps, "a number or None")


def _numbers(op, rho, eps):
    if not (isinstance(rho, (int, float, Tensor)) or hasattr(rho, "__float__")):
        raise TypeError(f"{op}: rho is a {type(rho).__name__}, expected a number or a Tensor")
    number(op, "eps", eps)


def number(op, name, value, expected="a number"):
    """What becomes a float: whatever has one, but no tensor whose gradient, or whose other elements, would be lost."""
    if isinstance(value, (int, float)):
        return
    if not isinstance(value, Tensor):
        if not hasattr(value, "__float__"):
            raise TypeError(f"{op}: {name} is a {type(value).__name__}, expected {expected}")
    elif value.requires_grad:
        raise TypeError(
            f"{op}: {name} is a tensor that requires a gradient, expected {expected}: it gets none; give float({name})"
        )
    elif torch._C._functorch.is_batchedtensor(value):
        raise TypeError(
            f"{op}: {name} is a tensor that vmap maps over, expected {expected}; loop over its values instead"
        )
    elif value.numel() != 1:
        raise TypeError(
            f"{op}: {name} is a tensor of shape {list(value.shape)}, expected {expected}; give one for all heads"
        )


def real_among_fake(op, tensors: dict) -> TypeError | None:
    """What to say where torch's FakeTensorMode has refused a real tensor with an AssertionError that names none."""
    for name, t in tensors.items():
        if type(t) in (Tensor, torch.nn.Parameter):
            return TypeError(
                f"{op}: {name} is a real tensor, expected a fake one, as others are or as the FakeTensorMode in force asks "
                "for; convert it with mode.from_tensor()"
            )
    return None


def dense(op, name, t):
    """Whatever is no memory with strides, in the public ops: the raw ones never see it."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: {name} is None, expected a Tensor")
    if t.layout != torch.strided or t.is_quantized or t.is_nested:
        kind = "nested tensor" if t.is_nested else "quantized tensor" if t.is_quantized else f"{t.layout} tensor"
        raise TypeError(f"{op}: {name} is a {kind}, expected a dense strided one; densify it first")


def rho_tensor(op, rho, q, heads, letters, like="q"):
    """rho as a public op takes it: one value, or one per head."""
    if not rho.is_floating_point():
        raise TypeError(f"{op}: rho has dtype {rho.dtype}, expected a floating dtype; convert it with .to()")
    if rho.shape not in ((), (1,), (heads,)):
        raise ValueError(
            f"{op}: rho has shape {list(rho.shape)}, expected [], [1] or {letters} = [{heads}]; "
            "give one value, or one per head"
        )
    device(op, "rho", rho, q, like)


def acc_dtype(q: Tensor) -> torch.dtype:
    """The dtype of sums and statistics: float32, or float64 for float64 input."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def forward_arguments(op, q, k, v, eps, rho, head_rho, key_padding_mask, query_padding_mask):
    """Every argument that forward and backward have in common; k is None where it is tied to q."""
    floating(op, "q", q)
    others = [("v", v, "(B, H, M, dv)")] if k is None else [("k", k, "(B, H, M, d)"), ("v", v, "(B, H, M, dv)")]
    for name, t, _ in others:
        dtype(op, name, t, q.dtype)
    for name, t, _ in others:
        device(op, name, t, q)
    for name, t, letters in [("q", q, "(B, H, N, d)"), *others]:
        if t.dim() != 4:
            raise ValueError(f"{op}: {name} has shape {list(t.shape)}, expected {letters}; view it with 4 dimensions")
    B, H, N, d = q.shape
    M = N if k is None else k.shape[2]
    if k is not None:
        shape(op, "k", k, (B, H, M, d), "(B, H, M, d)")
    shape(op, "v", v, (B, H, M, v.shape[3]), "(B, H, M, dv)")

    positive_eps(op, eps)
    finite_rho(op, rho)
    if head_rho is not None:
        statistic(op, "head_rho", head_rho, q, (B, H), "(B, H)")
    mask(op, "key_padding_mask", key_padding_mask, q, (B, M), "(B, M)")
    mask(op, "query_padding_mask", query_padding_mask, q, (B, N), "(B, N)")


def floating(op, name, t):
    if t.dtype not in DTYPES:
        raise TypeError(
            f"{op}: {name} has dtype {t.dtype}, expected torch.float32, torch.bfloat16, torch.float16 or torch.float64; "
            "convert it with .to()"
        )


def positive_eps(op, eps):
    if not (math.isfinite(eps) and eps > 0):
        raise ValueError(f"{op}: eps is {eps:g}, expected a finite number above 0; the paper's is 1e-6")


def finite_rho(op, rho):
    if not math.isfinite(rho):
        raise ValueError(f"{op}: rho is {rho:g}, expected a finite number; the paper's is 0.95")


def like_q(op, name, t, q, expected, letters):
    """dout, and whatever else has the dtype of q."""
    dtype(op, name, t, q.dtype)
    device(op, name, t, q)
    shape(op, name, t, expected, letters)


def statistic(op, name, t, q, expected, letters, like="q"):
    """A float32/float64 tensor that an op made and takes back, or head_rho."""
    dtype(op, name, t, acc_dtype(q))
    device(op, name, t, q, like)
    shape(op, name, t, expected, letters)


def mask(op, name, t, q, expected, letters, like="q"):
    if t is not None:
        dtype(op, name, t, torch.bool)
        device(op, name, t, q, like)
        shape(op, name, t, expected, letters)


def dtype(op, name, t, expected):
    if t.dtype != expected:
        raise TypeError(f"{op}: {name} has dtype {t.dtype}, expected {expected}; convert it with .to({expected})")


def device(op, name, t, q, like="q"):
    if t.device != q.device:
        raise ValueError(
            f"{op}: {name} is on {t.device}, expected {q.device}, where {like} is; move it with .to({like}.device)"
        )


def three_dimensions(op, q, k, v):
    """q (B*H, N, d), k and v, before they are viewed with four dimensions, so that errors name the shapes given."""
    heads, _, d = q.shape
    M = k.shape[1]
    shape(op, "k", k, (heads, M, d), "(B*H, M, d)")
    shape(op, "v", v, (heads, M, v.shape[2]), "(B*H, M, dv)")


def shape(op, name, t, expected, letters):
    if t.shape != expected:
        raise ValueError(
            f"{op}: {name} has shape {list(t.shape)}, expected {letters} = {list(expected)}; "
            "broadcasting is not implied, use .expand()"
        )


def empty_gradients(q, k, v, head_rho, output_mask):
    """dq, dk, dv and dhead_rho, uninitialised; one that is not wanted or does not exist is empty, of shape (0,)."""
    dq = torch.empty_like(q) if output_mask[0] else q.new_empty(0)
    dk = torch.empty_like(k) if output_mask[1] and k is not None else q.new_empty(0)
    dv = torch.empty_like(v) if output_mask[2] else q.new_empty(0)
    wants_rho = output_mask[3] and head_rho is not None
    dhead_rho = q.new_empty(q.shape[:2] if wants_rho else 0, dtype=acc_dtype(q))
    return dq, dk, dv, dhead_rho

"""Argument checks of the raw operators for the backends written in Python and for fake tensors.

The same checks, with the same words, stand in csrc/check.h for the compiled backends; tests/test_bad_input.py holds the two
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
    if not (isinstance(rho, (int, float, Tensor)) or hasattr(rho, "__float__")):
        raise TypeError(f"{op}: rho is a {type(rho).__name__}, expected a number or a Tensor")
    if not (isinstance(eps, (int, float)) or hasattr(eps, "__float__")):
        raise TypeError(f"{op}: eps is a {type(eps).__name__}, expected a number")


def acc_dtype(q: Tensor) -> torch.dtype:
    """The dtype of sums and statistics: float32, or float64 for float64 input."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def forward_arguments(op, q, k, v, eps, rho, head_rho, key_padding_mask, query_padding_mask):
    """Every argument that forward and backward have in common; k is None where it is tied to q."""
    if q.dtype not in DTYPES:
        raise TypeError(
            f"{op}: q has dtype {q.dtype}, expected torch.float32, torch.bfloat16, torch.float16 or torch.float64; "
            "convert it with .to()"
        )
    others = [("v", v, "(B, H, M, dv)")] if k is None else [("k", k, "(B, H, M, d)"), ("v", v, "(B, H, M, dv)")]
    for name, t, _ in others:
        _dtype(op, name, t, q.dtype)
    for name, t, _ in others:
        device(op, name, t, q)
    for name, t, letters in [("q", q, "(B, H, N, d)"), *others]:
        if t.dim() != 4:
            raise ValueError(f"{op}: {name} has shape {list(t.shape)}, expected {letters}; view it with 4 dimensions")
    B, H, N, d = q.shape
    M = N if k is None else k.shape[2]
    if k is not None:
        _shape(op, "k", k, (B, H, M, d), "(B, H, M, d)")
    _shape(op, "v", v, (B, H, M, v.shape[3]), "(B, H, M, dv)")

    if not (math.isfinite(eps) and eps > 0):
        raise ValueError(f"{op}: eps is {eps:g}, expected a finite number above 0; the paper's is 1e-6")
    if not math.isfinite(rho):
        raise ValueError(f"{op}: rho is {rho:g}, expected a finite number; the paper's is 0.95")
    if head_rho is not None:
        statistic(op, "head_rho", head_rho, q, (B, H), "(B, H)")
    _mask(op, "key_padding_mask", key_padding_mask, q, (B, M), "(B, M)")
    _mask(op, "query_padding_mask", query_padding_mask, q, (B, N), "(B, N)")


def like_q(op, name, t, q, expected, letters):
    """dout, and whatever else has the dtype of q."""
    _dtype(op, name, t, q.dtype)
    device(op, name, t, q)
    _shape(op, name, t, expected, letters)


def statistic(op, name, t, q, expected, letters):
    """A float32/float64 tensor that an op made and takes back, or head_rho."""
    _dtype(op, name, t, acc_dtype(q))
    device(op, name, t, q)
    _shape(op, name, t, expected, letters)


def _mask(op, name, t, q, expected, letters):
    if t is not None:
        _dtype(op, name, t, torch.bool)
        device(op, name, t, q)
        _shape(op, name, t, expected, letters)


def _dtype(op, name, t, expected):
    if t.dtype != expected:
        raise TypeError(f"{op}: {name} has dtype {t.dtype}, expected {expected}; convert it with .to({expected})")


def device(op, name, t, q):
    if t.device != q.device:
        raise ValueError(f"{op}: {name} is on {t.device}, expected {q.device}, where q is; move it with .to(q.device)")


def three_dimensions(op, q, k, v):
    """q (B*H, N, d), k and v, before they are viewed with four dimensions, so that errors name the shapes given."""
    heads, _, d = q.shape
    M = k.shape[1]
    _shape(op, "k", k, (heads, M, d), "(B*H, M, d)")
    _shape(op, "v", v, (heads, M, v.shape[2]), "(B*H, M, dv)")


def _shape(op, name, t, expected, letters):
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

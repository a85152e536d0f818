"""Argument checks of the raw operators over tokens x (B, N, D), as check.py has them for q, k and v.

The same checks, with the same words, stand in csrc/check_tokens.h for the compiled backends.
"""

import math

from . import check


def central_query_arguments(op, x, weight, bias, norm_eps, eps, padding_mask):
    """Every argument that forward and backward have in common."""
    check.floating(op, "x", x)
    check.dtype(op, "weight", weight, x.dtype)
    check.device(op, "weight", weight, x, "x")
    _rank(op, "x", x, "(B, N, D)")
    _rank(op, "weight", weight, "(H, d, D)")
    H, d, _ = weight.shape
    check.shape(op, "weight", weight, (H, d, x.shape[2]), "(H, d, D)")
    if bias is not None:
        check.statistic(op, "bias", bias, x, (H, d), "(H, d)", "x")
    _common(op, x, norm_eps, eps, padding_mask)


def score_pool_arguments(op, x, keys, key_bias, norm_eps, eps, padding_mask):
    """Every argument that forward and backward have in common."""
    check.floating(op, "x", x)
    check.dtype(op, "keys", keys, check.acc_dtype(x))
    check.device(op, "keys", keys, x, "x")
    _rank(op, "x", x, "(B, N, D)")
    _rank(op, "keys", keys, "(B, H, D)")
    B, _, D = x.shape
    H = keys.shape[1]
    check.shape(op, "keys", keys, (B, H, D), "(B, H, D)")
    if key_bias is not None:
        check.statistic(op, "key_bias", key_bias, x, (B, H), "(B, H)", "x")
    _common(op, x, norm_eps, eps, padding_mask)


def _common(op, x, norm_eps, eps, padding_mask):
    check.positive_eps(op, eps)
    if norm_eps is not None:
        norm_eps_number(op, norm_eps)
    check.mask(op, "padding_mask", padding_mask, x, x.shape[:2], "(B, N)", "x")


def norm_eps_number(op, norm_eps):
    if not (math.isfinite(norm_eps) and norm_eps >= 0):
        raise ValueError(
            f"{op}: norm_eps is {norm_eps:g}, expected a finite number of at least 0, or None for no normalisation"
        )


def _rank(op, name, t, letters):
    if t.dim() != 3:
        raise ValueError(f"{op}: {name} has shape {list(t.shape)}, expected {letters}; view it with 3 dimensions")

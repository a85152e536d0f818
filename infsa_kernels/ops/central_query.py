"""`infsa::central_query_fwd`: tokens -> projected queries -> their central query, per head; the queries are not stored.

    u_i = s (W_h x^_i + b_h),  e_i = ||u_i||,  qbar_h = sum_i e_i u_i / (sum_i e_i + eps)        s = 1/sqrt(d)

with x^ the tokens (B, N, D), or these normalised to mean 0 and variance 1, without an affine part, where norm_eps is given.
Half of the pooled layer (pooled_linear.py); the gradients, what is saved and why: docs/pooled_linear.md.
"""

import torch

from .. import reference
from ..eager import central_query as eager
from . import check
from .autograd import RawOps
from .check_tokens import central_query_arguments

OP = "infsa::central_query"


def _fake_forward(x, weight, bias, norm_eps, eps, padding_mask):
    central_query_arguments(OP, x, weight, bias, norm_eps, eps, padding_mask)
    B, (H, d, _) = x.shape[0], weight.shape
    acc = check.acc_dtype(x)
    return x.new_empty(B, H, d, dtype=acc), x.new_empty(B, H, dtype=acc)


def _check_backward(dcentral_query, x, weight, bias, central_query, energy_sum, norm_eps, eps, padding_mask):
    central_query_arguments(OP, x, weight, bias, norm_eps, eps, padding_mask)
    B, (H, d, _) = x.shape[0], weight.shape
    check.statistic(OP, "dcentral_query", dcentral_query, x, (B, H, d), "(B, H, d)", "x")
    check.statistic(OP, "central_query", central_query, x, (B, H, d), "(B, H, d)", "x")
    check.statistic(OP, "energy_sum", energy_sum, x, (B, H), "(B, H)", "x")


def _fake_backward(*args):
    _check_backward(*args[:-1])
    _, x, weight, bias, *_, output_mask = args
    return (
        torch.empty_like(x) if output_mask[0] else x.new_empty(0),
        torch.empty_like(weight) if output_mask[1] else x.new_empty(0),
        torch.empty_like(bias) if output_mask[2] and bias is not None else x.new_empty(0, dtype=check.acc_dtype(x)),
    )


def _formula(x, weight, bias, norm_eps, eps, padding_mask):
    acc = check.acc_dtype(x)
    return (reference.central_query(x.to(acc), weight.to(acc), bias, norm_eps, eps, padding_mask),)


def _flops(products):
    return lambda x, weight, bias: 2 * products * x[0] * x[1] * weight[0] * weight[1] * weight[2]


def _eager_forward(*args):
    central_query_arguments(OP, *args)
    return eager.forward(*args)


def _eager_backward(*args):
    _check_backward(*args[:-1])
    return eager.backward(*args)


raw = RawOps(
    "central_query",
    tensors="Tensor x, Tensor weight, Tensor? bias",
    rest="float? norm_eps, float eps, Tensor? padding_mask",
    dims={
        "x": "BND", "weight": "HdD", "bias": "Hd", "padding_mask": "BN", "central_query": "BHd", "energy_sum": "BH"
    },
    wrt=["x", "weight", "bias"],
    outputs=["central_query", "energy_sum"],
    saved=["central_query", "energy_sum"],
    formula=_formula,
    fake_forward=_fake_forward,
    fake_backward=_fake_backward,
    flops_forward=_flops(1),
    flops_backward=_flops(3),
)  # fmt: skip
raw.implement("eager", "CompositeExplicitAutograd", _eager_forward, _eager_backward)

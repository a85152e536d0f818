"""`infsa::central_query_fwd`: tokens -> projected queries -> their central query, per head; the queries are not stored.

    u_i = s (W_h x^_i + b_h),  e_i = ||u_i||,  qbar_h = sum_i e_i u_i / (sum_i e_i + eps)        s = 1/sqrt(d)

with x^ the tokens (B, N, D), or these normalised to mean 0 and variance 1, without an affine part, where norm_eps is given.
Half of the pooled layer (pooled_linear.py); the gradients, what is saved and why: docs/pooled_linear.md.
"""

from .. import reference
from ..eager import central_query as eager
from ..eager.common import acc_dtype
from . import backends
from .register import RawOps


def _formula(x, weight, bias, norm_eps, eps, padding_mask):
    acc = acc_dtype(x)
    return (reference.central_query(x.to(acc), weight.to(acc), bias, norm_eps, eps, padding_mask),)


raw = RawOps(
    forward="central_query_fwd(Tensor x, Tensor weight, Tensor? bias, float? norm_eps, float eps, Tensor? padding_mask) -> "
    "(Tensor central_query, Tensor energy_sum)",
    backward="central_query_bwd(Tensor dcentral_query, Tensor x, Tensor weight, Tensor? bias, Tensor central_query, "
    "Tensor energy_sum, float? norm_eps, float eps, Tensor? padding_mask, bool[3] output_mask) -> "
    "(Tensor dx, Tensor dweight, Tensor dbias)",
    tensors={
        "x": "(B, N, D)",
        "weight": "(H, d, D)",
        "bias": "(H, d) acc",
        "padding_mask": "(B, N) bool",
        "central_query": "(B, H, d) acc",
        "energy_sum": "(B, H) acc",
    },
    kernels={"cpu": "csrc/cpu/central_query.cpp", "triton": ".triton.central_query", "eager": eager},
    formula=_formula,
    flops_forward=lambda B, N, D, H, d: 2 * B * N * H * d * D,
    flops_backward=lambda B, N, D, H, d: 6 * B * N * H * d * D,
)
backends.OPERATORS[raw.name] = frozenset(raw.kernels)

"""`infsa::linear_floor_fwd`: Linear-InfSA with a floor under its scores, what `infsa::linear` runs where score_floor is above 0.

    t_j = qbar . kappa_j,  R = sum_j ReLU(t_j),  T = sum_j |t_j|,  c = score_floor T / M
    z = rho sum_j (ReLU(t_j) + c) v_j / (R + score_floor T + eps)

over the M keys that no mask ignores; qbar and kappa as in linear.py. Beside linear's statistics it returns T and the mean value:
raw operators of its own, so that the paper's operator pays for neither. Derivation, and what it is for: docs/linear.md.
"""

import functools

from .. import reference
from ..eager import linear_floor as eager
from . import backends, qkv
from .register import RawOps

TENSORS = {
    "q": "(B, H, N, d)",
    "k": "(B, H, M, d)",
    "v": "(B, H, M, dv)",
    "head_rho": "(B, H) acc",
    "key_padding_mask": "(B, M) bool",
    "query_padding_mask": "(B, N) bool",
    "out": "(B, H, dv)",
    "context": "(B, H, dv) acc",
    "central_query": "(B, H, d) acc",
    "energy_sum": "(B, H) acc",
    "score_sum": "(B, H) acc",
    "absolute_sum": "(B, H) acc",
    "value_mean": "(B, H, dv) acc",
    "dhead_rho": "(B, H) acc",
}


def _formula(q, k, v, eps, score_floor, *rest):
    return qkv.formula(functools.partial(reference.linear, score_floor=score_floor))(q, k, v, eps, *rest)


def _flops_forward(B, H, N, M, d, dv):
    return B * H * (4 * N * d + 2 * M * d + 3 * M * dv)


def _flops_backward(B, H, N, M, d, dv):
    return B * H * (8 * N * d + 5 * M * d + 3 * M * dv)


raw = RawOps(
    forward="linear_floor_fwd(Tensor q, Tensor? k, Tensor v, float eps, float score_floor, float rho, Tensor? head_rho, "
    "Tensor? key_padding_mask, Tensor? query_padding_mask) -> (Tensor out, Tensor context, Tensor central_query, "
    "Tensor energy_sum, Tensor score_sum, Tensor absolute_sum, Tensor value_mean)",
    backward="linear_floor_bwd(Tensor dout, Tensor q, Tensor? k, Tensor v, Tensor context, Tensor central_query, "
    "Tensor energy_sum, Tensor score_sum, Tensor absolute_sum, Tensor value_mean, float eps, float score_floor, float rho, "
    "Tensor? head_rho, Tensor? key_padding_mask, Tensor? query_padding_mask, bool[4] output_mask) -> "
    "(Tensor dq, Tensor dk, Tensor dv, Tensor dhead_rho)",
    tensors=TENSORS,
    stand_ins={"k": "q"},
    kernels={
        "cpu": "csrc/cpu/linear.cpp",
        "cuda": "csrc/cuda/linear_op.cpp",
        "triton": ".triton.linear_floor",
        "eager": eager,
    },
    formula=_formula,
    flops_forward=_flops_forward,
    flops_backward=_flops_backward,
)
# What can run a call of infsa::linear with a floor.
backends.OPERATORS[raw.name] = frozenset(raw.kernels)

"""Linear-InfSA of packed sequences with a floor under the scores of each in Triton: linear_varlen.py and what the floor adds."""

from ..eager import varlen as eager
from .launch import planned
from .linear_varlen import of_nothing, plan_backward, plan_forward
from .packed import Packing

OP = "infsa::linear_varlen_floor"


@planned
def forward(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, eps, score_floor, rho, head_rho):
    if of_nothing(q, v, cu_seqlens_q):
        return eager.linear_floor.forward
    packing = Packing.of(OP, q, cu_seqlens_q, max_q, max_k)
    return plan_forward(packing, q, k, v, eps, score_floor, rho, head_rho)


@planned
def backward(
    dout, q, k, v, context, central_query, energy_sum, score_sum, absolute_sum, value_mean, cu_seqlens_q, cu_seqlens_k,
    max_q, max_k, eps, score_floor, rho, head_rho, gradients,
):  # fmt: skip
    if of_nothing(q, v, cu_seqlens_q):
        return eager.linear_floor.backward
    packing = Packing.of(OP, q, cu_seqlens_q, max_q, max_k)
    return plan_backward(packing, dout, q, k, v, eps, score_floor, rho, head_rho, gradients)

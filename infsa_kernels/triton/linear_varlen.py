"""Linear-InfSA of packed sequences in Triton: the kernels of linear.py, between the bounds of each sequence (packed.py)."""

from ..eager import varlen as eager
from . import linear, linear_backward
from .launch import planned
from .packed import Packing, as_batch, gradients_as_batch, offsets


@planned
def forward(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, eps, rho, head_rho):
    if cu_seqlens_q.shape[0] == 1 or 0 in (*q.shape, *v.shape):
        return eager.linear.forward
    packing = Packing.of("infsa::linear_varlen", q, cu_seqlens_q, max_q, max_k)
    run = linear.plan_forward(as_batch(q), as_batch(k), as_batch(v), eps, None, rho, head_rho, packing=packing)

    def run_packed(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, eps, rho, head_rho):
        q, k, v = as_batch(q), as_batch(k), as_batch(v)
        return run(q, k, v, head_rho, None, None, *offsets(cu_seqlens_q, cu_seqlens_k))

    return run_packed


@planned
def backward(
    dout, q, k, v, context, central_query, energy_sum, score_sum, cu_seqlens_q, cu_seqlens_k, max_q, max_k, eps, rho, head_rho,
    gradients,
):  # fmt: skip
    if cu_seqlens_q.shape[0] == 1 or 0 in (*q.shape, *v.shape):
        return eager.linear.backward
    packing = Packing.of("infsa::linear_varlen", q, cu_seqlens_q, max_q, max_k)
    run = linear_backward.plan_backward(
        dout,
        as_batch(q),
        as_batch(k),
        as_batch(v),
        eps,
        None,
        rho,
        head_rho,
        None,
        None,
        gradients_as_batch(gradients),
        packing,
    )

    def run_packed(dout, q, k, v, *rest):
        *saved, cu_seqlens_q, cu_seqlens_k, _, _, _, _, head_rho, gradients = rest
        run(
            dout, as_batch(q), as_batch(k), as_batch(v), *saved, None, None, head_rho, None, None, gradients_as_batch(gradients),
            *offsets(cu_seqlens_q, cu_seqlens_k),
        )  # fmt: skip

    return run_packed

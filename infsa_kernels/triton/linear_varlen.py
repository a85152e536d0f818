"""Linear-InfSA of packed sequences in Triton: the kernels of linear.py, between the bounds of each sequence (packed.py)."""

from collections.abc import Callable

from ..eager import varlen as eager
from . import linear, linear_backward
from .launch import planned
from .packed import Packing, as_batch, gradients_as_batch, offsets

OP = "infsa::linear_varlen"


@planned
def forward(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, eps, rho, head_rho):
    if of_nothing(q, v, cu_seqlens_q):
        return eager.linear.forward
    packing = Packing.of(OP, q, cu_seqlens_q, max_q, max_k)
    return plan_forward(packing, q, k, v, eps, None, rho, head_rho)


@planned
def backward(
    dout, q, k, v, context, central_query, energy_sum, score_sum, cu_seqlens_q, cu_seqlens_k, max_q, max_k, eps, rho, head_rho,
    gradients,
):  # fmt: skip
    if of_nothing(q, v, cu_seqlens_q):
        return eager.linear.backward
    packing = Packing.of(OP, q, cu_seqlens_q, max_q, max_k)
    return plan_backward(packing, dout, q, k, v, eps, None, rho, head_rho, gradients)


def of_nothing(q, v, cu_seqlens_q) -> bool:
    return cu_seqlens_q.shape[0] == 1 or 0 in (*q.shape, *v.shape)


def plan_forward(packing: Packing, q, k, v, eps, score_floor, rho, head_rho) -> Callable:
    """The arguments of forward, whatever numbers among them -> its results."""
    run = linear.plan_forward(
        as_batch(q), as_batch(k), as_batch(v), eps, score_floor, rho, head_rho, packing=packing
    )  # fmt: skip

    def run_packed(q, k, v, cu_seqlens_q, cu_seqlens_k, *rest):
        return run(as_batch(q), as_batch(k), as_batch(v), rest[-1], None, None, *offsets(cu_seqlens_q, cu_seqlens_k))

    return run_packed


def plan_backward(packing: Packing, dout, q, k, v, eps, score_floor, rho, head_rho, gradients) -> Callable:
    """The arguments of backward, which fills the gradients."""
    run = linear_backward.plan_backward(
        dout, as_batch(q), as_batch(k), as_batch(v), eps, score_floor, rho, head_rho, None, None, gradients_as_batch(gradients),
        packing,
    )  # fmt: skip
    kept, of_floor = (4, [None, None]) if score_floor is None else (6, [])

    def run_packed(dout, q, k, v, *rest):
        cu_seqlens_q, cu_seqlens_k, *_, head_rho, gradients = rest[kept:]
        run(
            dout, as_batch(q), as_batch(k), as_batch(v), *rest[:kept], *of_floor, head_rho, None, None,
            gradients_as_batch(gradients), *offsets(cu_seqlens_q, cu_seqlens_k),
        )  # fmt: skip

    return run_packed

"""Pure InfSA of packed sequences in Triton: the kernels of pure.py, between the bounds of each sequence (packed.py)."""

from ..eager import varlen as eager
from . import pure, pure_backward
from .launch import planned
from .packed import Packing, as_batch, gradients_as_batch, offsets

OP = "infsa::pure_varlen"


@planned
def forward(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, eps, rho, head_rho):
    if cu_seqlens_q.shape[0] == 1 or 0 in (*q.shape, *v.shape):
        return eager.pure.forward
    packing = Packing.of(OP, q, cu_seqlens_q, max_q, max_k)
    like = as_batch(_output(q, v))
    multiply = pure.plan_forward(as_batch(q), as_batch(k), as_batch(v), like, eps, rho, head_rho, packing=packing)

    def run(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, eps, rho, head_rho):
        out = _output(q, v)
        tokens = map(as_batch, (q, k, v, out))
        return out, multiply(*tokens, head_rho, None, None, *offsets(cu_seqlens_q, cu_seqlens_k))

    return run


@planned
def backward(
    dout, q, k, v, out, norm, cu_seqlens_q, cu_seqlens_k, max_q, max_k, eps, rho, head_rho, gradients
):  # fmt: skip
    if cu_seqlens_q.shape[0] == 1 or 0 in (*q.shape, *v.shape):
        return eager.pure.backward
    packing = Packing.of(OP, q, cu_seqlens_q, max_q, max_k)
    # Any of the sequences may have few scores.
    run = pure_backward.plan_backward(
        *map(as_batch, (dout, q, k, v, out)), eps, rho, head_rho, gradients_as_batch(gradients), True, packing=packing
    )  # fmt: skip

    def run_packed(*arguments):
        *tokens, norm, cu_seqlens_q, cu_seqlens_k, _, _, _, _, head_rho, gradients = arguments
        gradients = gradients_as_batch(gradients)
        run(*map(as_batch, tokens), norm, head_rho, gradients, None, None, *offsets(cu_seqlens_q, cu_seqlens_k))

    return run_packed


def _output(q, v):
    return q.new_empty(*q.shape[:2], v.shape[2])

"""Pure InfSA of some of the queries with some of the keys: a block of P, where no process has them all.

    fwd   (P_b v_b / (||P_b||_F + eps), ||P_b||_F)        in the dtype of sums; norms add up as squares, P v after it is unscaled
    bwd   what the block gives to dq, dk, dv and drho     from ||P||_F and <dO, O> of the whole, in the dtype of sums

Equations: docs/pure.md, and docs/distributed.md for how blocks make the whole.
"""

from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from ..eager import pure as eager
from ..eager.common import acc_dtype
from ..torch_private import OpOverload
from . import backends
from .steps import Step, define


class Blocks(NamedTuple):
    """The operators on one backend."""

    fwd: OpOverload  # (q, k, v, eps, key_padding_mask, query_padding_mask) -> (out, norm)
    # (dout, q, k, v, dout_out, norm, eps, rho, head_rho, key_padding_mask, query_padding_mask, output_mask) ->
    # (dq, dk, dv, dhead_rho), (0,) for what is not wanted
    bwd: OpOverload


def choose_blocks(q: Tensor, backend: str = "") -> Blocks:
    """The operators on the backend that runs them for q (B, H, N, d)."""
    forced = backend or backends.backend_of_backward()
    return _ON[backends.choose_backend("pure_blocks", q.device, q.dtype, q.shape, forced)]


_TENSORS = {
    "q": "(B, H, N, d)",
    "k": "(B, H, M, d)",
    "v": "(B, H, M, dv)",
    "dout": "(B, H, N, dv)",
    "dout_out": "(B, H) float64",
    "norm": "(B, H) acc",
    "head_rho": "(B, H) acc",
    "key_padding_mask": "(B, M) bool",
    "query_padding_mask": "(B, N) bool",
}


def _fake_fwd(suffix, q, k, v, eps, key_padding_mask, query_padding_mask):
    acc = acc_dtype(q)
    return eager.output_like(q, v, acc), q.new_empty(q.shape[:2], dtype=acc)


def _fake_bwd(suffix, dout, q, k, v, dout_out, norm, eps, rho, head_rho, key_mask, query_mask, output_mask):
    inputs = q, k, v, head_rho
    return tuple(
        torch.empty_like(t, dtype=norm.dtype) if want and t is not None and n < 3
        else norm.new_empty(q.shape[:2]) if want and t is not None
        else norm.new_empty(0)
        for n, (t, want) in enumerate(zip(inputs, output_mask))
    )  # fmt: skip


def _flops(per_score, at):
    def formula(*shapes, out_shape=None, **kwargs):
        (B, H, N, d), (_, _, M, dv) = shapes[at], shapes[at + 2]
        return B * H * N * M * per_score(d, dv)

    return formula


def _eager_fwd(q, k, v, eps, key_padding_mask, query_padding_mask):
    q, k, v = (None if t is None else t.to(acc_dtype(t)) for t in (q, k, v))
    return eager.forward(q, k, v, eps, 1.0, None, key_padding_mask, query_padding_mask)


def _triton_fwd(q, k, v, eps, key_padding_mask, query_padding_mask):
    from ..triton import first_use, pure

    arguments = q, k, v, eps, 1.0, None, key_padding_mask, query_padding_mask
    if first_use.failure("pure", "forward", arguments):
        return _eager_fwd(q, k, v, eps, key_padding_mask, query_padding_mask)
    return pure.forward(*arguments, dtype=acc_dtype(q))


def _eager_bwd(dout, q, k, v, dout_out, norm, *more):
    return _filled(eager.backward, dout, q, k, v, dout_out, norm, *more)


def _triton_bwd(dout, q, k, v, dout_out, norm, *more):
    from ..triton import first_use, pure

    failed = first_use.failure("pure", "backward", (dout, q, k, v, dout, norm, *more[:-1]))
    return _filled(eager.backward if failed else pure.backward, dout, q, k, v, dout_out, norm, *more)


def _filled(backward, dout, q, k, v, dout_out, norm, *more):
    gradients = _fake_bwd("", dout, q, k, v, dout_out, norm, *more)
    wanted = [g if g.dim() > 1 else None for g in gradients]
    if any(g is not None for g in wanted):
        # dout stands where pure's own backward has the output, of which dout_out is all that it reads.
        backward(dout, q, k, v, dout, norm, *more[:-1], wanted, dout_out)
    return gradients


kernels = {
    "cpu": "csrc/cpu/pure.cpp",
    "triton": SimpleNamespace(fwd=_triton_fwd, bwd=_triton_bwd),
    "eager": SimpleNamespace(fwd=_eager_fwd, bwd=_eager_bwd),
}
_ON = define(
    "pure_blocks",
    Blocks,
    Blocks(
        Step(
            "(Tensor q, Tensor? k, Tensor v, float eps, Tensor? key_padding_mask, Tensor? query_padding_mask) -> "
            "(Tensor out, Tensor norm)",
            _TENSORS,
            _fake_fwd,
            _flops(lambda d, dv: 2 * d + 2 * dv, 0),
            {"k": "q"},
        ),
        Step(
            "(Tensor dout, Tensor q, Tensor? k, Tensor v, Tensor dout_out, Tensor norm, float eps, float rho, "
            "Tensor? head_rho, Tensor? key_padding_mask, Tensor? query_padding_mask, bool[4] output_mask) -> "
            "(Tensor dq, Tensor dk, Tensor dv, Tensor dhead_rho)",
            _TENSORS,
            _fake_bwd,
            _flops(lambda d, dv: 6 * d + 4 * dv, 1),
            {"k": "q"},
        ),
    ),
    kernels,
    "infsa_kernels.distributed.pure_infsa has one",
)

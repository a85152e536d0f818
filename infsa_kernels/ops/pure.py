"""`infsa::pure`: Frobenius-normalised ReLU attention, per head.

    P = ReLU((s q)(s k)^T)  (N, M),   O = rho P v / (||P||_F + eps)          with s = 1/sqrt(d)

O(N M) time, O(N + M) memory: P is never held. Derivation of the gradients, what is saved and why: docs/pure.md.
"""

from torch import Tensor

from .. import reference
from ..eager import pure as eager
from . import check
from .backends import triton_kernels
from .qkv import Operator
from .register import overridable

OP = "infsa::pure"


@overridable
def pure_infsa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rho: float | Tensor = 0.95,
    eps: float = 1e-6,
    key_padding_mask: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
) -> Tensor:
    """Pure InfSA: ReLU attention divided by its Frobenius norm. O(N M) time, O(N + M) memory (paper eqs 11-12).

    Args:
        q: queries (B, H, N, d) or (B*H, N, d); float32, bfloat16, float16 or float64. Any strides.
        k: keys (B, H, M, d). Pass the same object as ``q`` for the paper's tied (symmetric) operator.
        v: values (B, H, M, dv).
        rho: output scale, a number or a tensor of shape (), (1,) or (H,), which gets its gradient.
        eps: added to the Frobenius norm before it divides; above 0.
        key_padding_mask: (B, M) bool, True = ignore that key and its value.
        query_padding_mask: (B, N) bool, True = ignore that query: its output is 0 and it is left out of the norm. For
            self-attention over a padded batch give the same mask twice: the padding would else count in the norm.

    Returns:
        (B, H, N, dv) in the dtype of ``q`` and in its memory layout: token-major where ``q`` is a view of [B, N, H, d].

    Raises:
        ValueError: a wrong shape, device, eps or rho. TypeError: a wrong dtype or layout.

    Example::

        >>> q, k, v = torch.randn(3, 1, 16, 197, 64).unbind()
        >>> pure_infsa(q, k, v).shape
        torch.Size([1, 16, 197, 64])
    """
    check.python_types(OP, q, k, v, rho, eps, key_padding_mask, query_padding_mask)
    op = operator.overload(rho)
    return op(q, k, v, eps, rho, key_padding_mask, query_padding_mask)


@overridable
def pure_infsa_scores(
    q: Tensor,
    k: Tensor,
    rho: float | Tensor = 0.95,
    eps: float = 1e-6,
    key_padding_mask: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
) -> Tensor:
    """rho P / (||P||_F + eps), the whole matrix: (..., N, M). Arguments as :func:`pure_infsa`.

    In torch operations, for analysis and for dropout on the scores; sums in float32 or wider whatever the dtype of ``q``.
    """
    operator.check_scores(q, k, rho, eps, key_padding_mask, query_padding_mask)
    acc = check.acc_dtype(q)
    return reference.pure_scores(q.to(acc), k.to(acc), rho, eps, key_padding_mask, query_padding_mask).to(q.dtype)


def _fake_forward(q, k, v, eps, rho, head_rho, key_padding_mask, query_padding_mask):
    check.forward_arguments(OP, q, k, v, eps, rho, head_rho, key_padding_mask, query_padding_mask)
    return eager.output_like(q, v), q.new_empty(q.shape[:2], dtype=check.acc_dtype(q))


def _check_backward(dout, q, k, v, out, norm, eps, rho, head_rho, key_padding_mask, query_padding_mask):
    check.forward_arguments(OP, q, k, v, eps, rho, head_rho, key_padding_mask, query_padding_mask)
    B, H, N, _ = q.shape
    dv = v.shape[3]
    check.like_q(OP, "dout", dout, q, (B, H, N, dv), "(B, H, N, dv)")
    check.like_q(OP, "out", out, q, (B, H, N, dv), "(B, H, N, dv)")
    check.statistic(OP, "norm", norm, q, (B, H), "(B, H)")


def _fake_backward(dout, q, k, v, *rest):
    *rest, output_mask = rest
    _check_backward(dout, q, k, v, *rest)
    return check.empty_gradients(q, k, v, rest[-3], output_mask)


def _flops_forward(B, H, N, M, d, dv):
    return 2 * B * H * N * M * (d + dv)


def _flops_backward(B, H, N, M, d, dv):
    return B * H * N * M * (6 * d + 4 * dv)


def _eager_forward(*args):
    check.forward_arguments(OP, *args)
    return eager.forward(*args)


def _eager_backward(*args):
    _check_backward(*args[:-1])
    return eager.backward(*args)


def _triton_forward(*args):
    check.forward_arguments(OP, *args)
    return triton_kernels(OP, args[0]).forward(*args)


def _triton_backward(*args):
    _check_backward(*args[:-1])
    return triton_kernels(OP, args[1]).backward(*args)


operator = Operator(
    "pure",
    reference=reference.pure,
    outputs={"out": "BHNv", "norm": "BH"},
    saved=("out", "norm"),
    fake_forward=_fake_forward,
    fake_backward=_fake_backward,
    flops_forward=_flops_forward,
    flops_backward=_flops_backward,
)
operator.implement("eager", "CompositeExplicitAutograd", _eager_forward, _eager_backward)
for key in ("CUDA", "CPU"):
    operator.implement("triton", key, _triton_forward, _triton_backward)

"""`infsa::linear`: token norms -> softmax-free weights -> central query -> ReLU key scores -> pooled values, per head.

    e_i = ||u_i||,  qbar = sum_i e_i u_i / (sum_i e_i + eps),  r_j = ReLU(qbar . kappa_j),
    z = rho sum_j r_j v_j / (sum_j r_j + eps)          with u = s q, kappa = s k, s = 1/sqrt(d)

Derivation of the gradients, what is saved and why: docs/linear.md.
"""

from torch import Tensor

from .. import reference
from ..eager import linear as eager
from . import check
from .backends import triton_kernels
from .qkv import Operator
from .register import overridable

OP = "infsa::linear"


@overridable
def linear_infsa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rho: float | Tensor = 0.95,
    eps: float = 1e-6,
    key_padding_mask: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
) -> Tensor:
    """Linear-InfSA: one pooled context per head, given to every query position. O(N) time, O(d) state (paper eqs 16-21).

    Args:
        q: queries (B, H, N, d) or (B*H, N, d); float32, bfloat16, float16 or float64. Any strides.
        k: keys (B, H, M, d). Pass the same object as ``q`` for the paper's tied (symmetric) operator.
        v: values (B, H, M, dv).
        rho: output scale, a number or a tensor of shape (), (1,) or (H,), which gets its gradient.
        eps: added to both sums before they divide; above 0.
        key_padding_mask: (B, M) bool, True = ignore that key and its value.
        query_padding_mask: (B, N) bool, True = leave that query out of the central query. For self-attention over a padded
            batch give the same mask twice: the padding would else take part in the average.

    Returns:
        (B, H, N, dv) in the dtype of ``q``: an expanded view (stride 0) of the context ``torch.ops.infsa.linear`` returns.

    Raises:
        ValueError: a wrong shape, device, eps or rho. TypeError: a wrong dtype or layout.

    Example::

        >>> q = torch.randn(1, 64, 4096, 16)
        >>> linear_infsa(q, q, torch.randn(1, 64, 4096, 16)).shape
        torch.Size([1, 64, 4096, 16])
    """
    check.python_types(OP, q, k, v, rho, eps, key_padding_mask, query_padding_mask)
    op = operator.overload(rho)
    context = op(q, k, v, eps, rho, key_padding_mask, query_padding_mask)
    return context.unsqueeze(-2).expand(*q.shape[:-1], context.shape[-1])


@overridable
def linear_infsa_scores(
    q: Tensor,
    k: Tensor,
    rho: float | Tensor = 0.95,
    eps: float = 1e-6,
    key_padding_mask: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
) -> Tensor:
    """rho a_j, the weight that Linear-InfSA gives to each key: (..., M, 1). Arguments as :func:`linear_infsa`.

    In torch operations, for analysis and for dropout on the scores; sums in float32 or wider whatever the dtype of ``q``.
    """
    operator.check_scores(q, k, rho, eps, key_padding_mask, query_padding_mask)
    acc = check.acc_dtype(q)
    scores = reference.linear_scores(q.to(acc), k.to(acc), rho, eps, key_padding_mask, query_padding_mask)
    return scores.to(q.dtype).unsqueeze(-1)


def _fake_forward(q, k, v, eps, rho, head_rho, key_padding_mask, query_padding_mask):
    check.forward_arguments(OP, q, k, v, eps, rho, head_rho, key_padding_mask, query_padding_mask)
    B, H, _, d = q.shape
    dv = v.shape[3]
    acc = check.acc_dtype(q)
    return (
        q.new_empty(B, H, dv),
        q.new_empty(B, H, dv, dtype=acc),
        q.new_empty(B, H, d, dtype=acc),
        q.new_empty(B, H, dtype=acc),
        q.new_empty(B, H, dtype=acc),
    )


def _check_backward(
    dout, q, k, v, context, central_query, energy_sum, score_sum, eps, rho, head_rho, key_padding_mask, query_padding_mask
):  # fmt: skip
    check.forward_arguments(OP, q, k, v, eps, rho, head_rho, key_padding_mask, query_padding_mask)
    B, H, _, d = q.shape
    dv = v.shape[3]
    check.like_q(OP, "dout", dout, q, (B, H, dv), "(B, H, dv)")
    check.statistic(OP, "context", context, q, (B, H, dv), "(B, H, dv)")
    check.statistic(OP, "central_query", central_query, q, (B, H, d), "(B, H, d)")
    check.statistic(OP, "energy_sum", energy_sum, q, (B, H), "(B, H)")
    check.statistic(OP, "score_sum", score_sum, q, (B, H), "(B, H)")


def _fake_backward(dout, q, k, v, *rest):
    *rest, output_mask = rest
    _check_backward(dout, q, k, v, *rest)
    return check.empty_gradients(q, k, v, rest[-3], output_mask)


def _flops_forward(B, H, N, M, d, dv):
    return B * H * (4 * N * d + 2 * M * d + 2 * M * dv)


def _flops_backward(B, H, N, M, d, dv):
    return B * H * (8 * N * d + 5 * M * d + 3 * M * dv)


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
    "linear",
    reference=reference.linear,
    outputs={"out": "BHv", "context": "BHv", "central_query": "BHd", "energy_sum": "BH", "score_sum": "BH"},
    saved=("context", "central_query", "energy_sum", "score_sum"),
    fake_forward=_fake_forward,
    fake_backward=_fake_backward,
    flops_forward=_flops_forward,
    flops_backward=_flops_backward,
)
operator.implement("eager", "CompositeExplicitAutograd", _eager_forward, _eager_backward)
for key in ("CUDA", "CPU"):
    operator.implement("triton", key, _triton_forward, _triton_backward)

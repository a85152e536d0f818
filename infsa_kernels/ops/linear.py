"""`infsa::linear`: token norms -> softmax-free weights -> central query -> ReLU key scores -> pooled values, per head.

    e_i = ||u_i||,  qbar = sum_i e_i u_i / (sum_i e_i + eps),  r_j = ReLU(qbar . kappa_j),
    z = rho sum_j r_j v_j / (sum_j r_j + eps)          with u = s q, kappa = s k, s = 1/sqrt(d)

With score_floor above 0 another raw operator runs: linear_floor.py. With another activation than ReLU the reference does, in
torch operations. Derivation of the gradients, what is saved and why: docs/linear.md.
"""

from torch import Tensor

from .. import reference
from ..eager import linear as eager
from ..eager.common import acc_dtype
from . import linear_floor, qkv
from .register import RawOps, overridable, public


@overridable
def linear_infsa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rho: float | Tensor = 0.95,
    eps: float = 1e-6,
    key_padding_mask: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
    *,
    score_floor: float = 0.0,
    activation: str = "relu",
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
        score_floor: at least 0; 0 is the paper's operator. Above 0 every key's score gains that share of the mean absolute
            score: a mixture with the mean of the values, which keeps gradients bounded where few scores are positive
            (docs/linear.md). It has no gradient.
        activation: what becomes of the scores: "relu", the paper's, or "gelu", "abs" or "softplus". Only "relu" has kernels. The
            others run in torch operations and keep what autograd needs of q and k (docs/linear.md, Other activations).

    Returns:
        (B, H, N, dv) in the dtype of ``q``: an expanded view (stride 0) of the context ``torch.ops.infsa.linear`` returns.

    Raises:
        ValueError: a wrong shape, device, eps, rho, score_floor or activation. TypeError: a wrong dtype or layout.
        RuntimeError: a backend was asked for that cannot run the call.

    Example::

        >>> q = torch.randn(1, 64, 4096, 16)
        >>> linear_infsa(q, q, torch.randn(1, 64, 4096, 16)).shape
        torch.Size([1, 64, 4096, 16])
    """
    masks = key_padding_mask, query_padding_mask
    # What is by default goes unsaid, since each argument costs a microsecond.
    by_default = type(score_floor) is float and score_floor == 0 and activation == "relu"
    more = () if by_default else ("", score_floor, activation)
    context = linear(q, k, v, eps, rho, *masks, *more)
    return context.unsqueeze(-2).expand(*[-1] * (context.dim() - 1), q.shape[-2], -1)


@overridable
def linear_infsa_scores(
    q: Tensor,
    k: Tensor,
    rho: float | Tensor = 0.95,
    eps: float = 1e-6,
    key_padding_mask: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
    *,
    score_floor: float = 0.0,
    activation: str = "relu",
) -> Tensor:
    """rho a_j, the weight that Linear-InfSA gives to each key: (..., M, 1). Arguments as :func:`linear_infsa`.

    In torch operations, for analysis and for dropout on the scores; sums in float32 or wider whatever the dtype of ``q``.
    """
    masks = key_padding_mask, query_padding_mask
    qkv.demand_of_scores(
        linear, linear_floor.raw, q, k, rho, eps, *masks, activation=activation, score_floor=score_floor
    )
    acc = acc_dtype(q)
    scores = reference.linear_scores(q.to(acc), k.to(acc), rho, eps, *masks, score_floor, activation)
    return scores.to(q.dtype).unsqueeze(-1)


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
    "dhead_rho": "(B, H) acc",
}


def _flops_forward(B, H, N, M, d, dv):
    return B * H * (4 * N * d + 2 * M * d + 2 * M * dv)


def _flops_backward(B, H, N, M, d, dv):
    return B * H * (8 * N * d + 5 * M * d + 3 * M * dv)


raw = RawOps(
    forward="linear_fwd(Tensor q, Tensor? k, Tensor v, float eps, float rho, Tensor? head_rho, "
    "Tensor? key_padding_mask, Tensor? query_padding_mask) -> "
    "(Tensor out, Tensor context, Tensor central_query, Tensor energy_sum, Tensor score_sum)",
    backward="linear_bwd(Tensor dout, Tensor q, Tensor? k, Tensor v, Tensor context, Tensor central_query, "
    "Tensor energy_sum, Tensor score_sum, float eps, float rho, Tensor? head_rho, Tensor? key_padding_mask, "
    "Tensor? query_padding_mask, bool[4] output_mask) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dhead_rho)",
    tensors=TENSORS,
    stand_ins={"k": "q"},
    kernels={
        "cpu": "csrc/cpu/linear.cpp",
        "cuda": "csrc/cuda/linear_op.cpp",
        "triton": ".triton.linear",
        "eager": eager,
    },
    formula=qkv.formula(reference.linear),
    flops_forward=_flops_forward,
    flops_backward=_flops_backward,
)


@public(
    "linear(Tensor q, Tensor k, Tensor v, float eps=1e-6, Tensor? rho=None, Tensor? key_padding_mask=None, "
    "Tensor? query_padding_mask=None, str backend='', float score_floor=0.0, str activation='relu') -> Tensor",
    TENSORS,
    raw=[raw],
    cast=qkv.cast,
)
def linear(
    q, k, v, eps=1e-6, rho=None, key_padding_mask=None, query_padding_mask=None, backend="", score_floor=0.0,
    activation="relu",
):  # fmt: skip
    """`torch.ops.infsa.linear`: the context (B, H, dv), or (B*H, dv)."""
    given = q, k, v, eps, rho, key_padding_mask, query_padding_mask, backend
    if activation != "relu":
        return qkv.attend_in_torch(linear_floor.raw, reference.linear, *given, activation, score_floor=score_floor)
    if score_floor == 0:
        return qkv.attend(raw, *given)
    return qkv.attend(linear_floor.raw, *given, score_floor)

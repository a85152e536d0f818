"""`infsa::pure`: Frobenius-normalised ReLU attention, per head.

    P = ReLU((s q)(s k)^T)  (N, M),   O = rho P v / (||P||_F + eps)          with s = 1/sqrt(d)

O(N M) time, O(N + M) memory: P is never held. With another activation than ReLU the reference runs, in torch operations, and
holds it. Derivation of the gradients, what is saved and why: docs/pure.md.
"""

from torch import Tensor

from .. import reference
from ..eager import pure as eager
from ..eager.common import acc_dtype
from . import qkv
from .register import RawOps, overridable, public


@overridable
def pure_infsa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rho: float | Tensor = 0.95,
    eps: float = 1e-6,
    key_padding_mask: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
    *,
    activation: str = "relu",
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
        activation: what becomes of the scores: "relu", the paper's, or "gelu", "abs" or "softplus". Only "relu" has kernels. The
            others run in torch operations and hold (B, H, N, M) (docs/pure.md, Other activations).

    Returns:
        (B, H, N, dv) in the dtype of ``q`` and, with "relu", in its memory layout: token-major where ``q`` is a view of
        [B, N, H, d].

    Raises:
        ValueError: a wrong shape, device, eps, rho or activation. TypeError: a wrong dtype or layout.
        RuntimeError: a backend was asked for that cannot run the call.

    Example::

        >>> q, k, v = torch.randn(3, 1, 16, 197, 64).unbind()
        >>> pure_infsa(q, k, v).shape
        torch.Size([1, 16, 197, 64])
    """
    more = {} if activation == "relu" else {"activation": activation}  # as linear_infsa
    return pure(q, k, v, eps, rho, key_padding_mask, query_padding_mask, **more)


@overridable
def pure_infsa_scores(
    q: Tensor,
    k: Tensor,
    rho: float | Tensor = 0.95,
    eps: float = 1e-6,
    key_padding_mask: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
    *,
    activation: str = "relu",
) -> Tensor:
    """rho P / (||P||_F + eps), the whole matrix: (..., N, M). Arguments as :func:`pure_infsa`.

    In torch operations, for analysis and for dropout on the scores; sums in float32 or wider whatever the dtype of ``q``.
    """
    masks = key_padding_mask, query_padding_mask
    qkv.demand_of_scores(pure, raw, q, k, rho, eps, *masks, activation=activation)
    acc = acc_dtype(q)
    return reference.pure_scores(q.to(acc), k.to(acc), rho, eps, *masks, activation).to(q.dtype)


TENSORS = {
    "q": "(B, H, N, d)",
    "k": "(B, H, M, d)",
    "v": "(B, H, M, dv)",
    "head_rho": "(B, H) acc",
    "key_padding_mask": "(B, M) bool",
    "query_padding_mask": "(B, N) bool",
    "out": "(B, H, N, dv)",
    "norm": "(B, H) acc",
    "dhead_rho": "(B, H) acc",
}


def _flops_forward(B, H, N, M, d, dv):
    return 2 * B * H * N * M * (d + dv)


def _flops_backward(B, H, N, M, d, dv):
    return B * H * N * M * (6 * d + 4 * dv)


raw = RawOps(
    forward="pure_fwd(Tensor q, Tensor? k, Tensor v, float eps, float rho, Tensor? head_rho, "
    "Tensor? key_padding_mask, Tensor? query_padding_mask) -> (Tensor out, Tensor norm)",
    backward="pure_bwd(Tensor dout, Tensor q, Tensor? k, Tensor v, Tensor out, Tensor norm, float eps, float rho, "
    "Tensor? head_rho, Tensor? key_padding_mask, Tensor? query_padding_mask, bool[4] output_mask) -> "
    "(Tensor dq, Tensor dk, Tensor dv, Tensor dhead_rho)",
    tensors=TENSORS,
    stand_ins={"k": "q"},
    like={"out": lambda given: eager.output_like(given["q"], given["v"])},
    kernels={"cpu": "csrc/cpu/pure.cpp", "triton": ".triton.pure", "eager": eager},
    formula=qkv.formula(reference.pure),
    flops_forward=_flops_forward,
    flops_backward=_flops_backward,
)


@public(
    "pure(Tensor q, Tensor k, Tensor v, float eps=1e-6, Tensor? rho=None, Tensor? key_padding_mask=None, "
    "Tensor? query_padding_mask=None, str backend='', str activation='relu') -> Tensor",
    TENSORS,
    raw=[raw],
    cast=qkv.cast,
)
def pure(
    q, k, v, eps=1e-6, rho=None, key_padding_mask=None, query_padding_mask=None, backend="", activation="relu"
):  # fmt: skip
    """`torch.ops.infsa.pure`: the output (B, H, N, dv), or (B*H, N, dv)."""
    given = q, k, v, eps, rho, key_padding_mask, query_padding_mask, backend
    if activation != "relu":
        return qkv.attend_in_torch(raw, reference.pure, *given, activation)
    return qkv.attend(raw, *given)

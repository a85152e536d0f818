"""`infsa_attention`: the operators by the name of their variant, with dropout on the scores."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import distributed
from ..graph.walks import multi_hop_infsa
from ..ops import check
from ..ops.linear import linear_infsa, linear_infsa_scores
from ..ops.pure import pure_infsa, pure_infsa_scores
from ..ops.register import overridable
from .checks import NO_DROPOUT, integer, number
from .masks import without

VARIANTS = ("linear_infsa", "pure_infsa", "multi_hop_infsa")


@overridable
def infsa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    variant: str = "pure_infsa",
    rho: float | Tensor = 0.95,
    dropout_p: float = 0.0,
    training: bool = False,
    eps: float = 1e-6,
    key_padding_mask: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
    *,
    hops: int | None = None,
    score_floor: float = 0.0,
    activation: str = "relu",
) -> Tensor:
    """InfSA attention over projected q, k, v, by ``variant``.

    Args:
        variant: "pure_infsa", "linear_infsa", or "multi_hop_infsa": sum_{t=1..hops} rho^t A^t v with Pure InfSA's A, as
            :func:`infsa_kernels.graph.multi_hop_infsa` with gamma = rho, for q (B, H, N, d).
        dropout_p: probability of dropping a score, in training only. Dropout needs the scores in memory: with
            ``dropout_p > 0 and training`` the pure variant holds the N x M matrix and runs in torch operations.
        training: whether dropout applies.
        hops: of multi_hop_infsa; None for all of them.
        score_floor: of linear_infsa, as in :func:`linear_infsa`.
        activation: of linear_infsa and pure_infsa, as there: others than "relu" run in torch operations.

    The other arguments, the shapes and the errors are those of :func:`pure_infsa`.

    Returns:
        (B, H, N, dv) in the dtype of ``q``.

    Raises:
        NotImplementedError: dropout with multi_hop_infsa.
    """
    check_variant("infsa_attention", variant, hops)
    check_score_floor("infsa_attention", variant, score_floor)
    check_activation("infsa_attention", variant, activation)
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"infsa_attention: dropout_p is {dropout_p}, expected a probability between 0 and 1")
    masks = key_padding_mask, query_padding_mask
    dropped = dropout_p if training else 0.0
    context, _ = attend(
        q, k, v, variant, rho, eps, *masks, hops=hops, score_floor=score_floor, activation=activation, dropout_p=dropped
    )
    return context.expand(*q.shape[:-1], v.shape[-1])


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    variant: str,
    rho: float | Tensor,
    eps: float,
    key_padding_mask: Tensor | None,
    query_padding_mask: Tensor | None,
    *,
    hops: int | None = None,
    score_floor: float = 0.0,
    activation: str = "relu",
    dropout_p: float = 0.0,
    need_scores: bool = False,
    group: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The context (..., N, dv), and the scores that it was made with, (..., N, M), where they are needed or some are dropped.

    Linear-InfSA has one row for all queries, of both: 1 in the place of N. ``group`` names the ranks that have the other tokens.
    """
    masks = key_padding_mask, query_padding_mask
    if group is not None:
        refuse_in_parallel(variant, dropout_p, need_scores, activation)
        if variant == "linear_infsa":
            # Not [:1] of every position: a rank may have none.
            context = distributed.linear.sharded_linear(q, k, v, eps, rho, *masks, group, score_floor=score_floor)
            return context.unsqueeze(-2), None
        return distributed.pure_infsa(q, k, v, rho, eps, *masks, group=group), None
    if variant == "multi_hop_infsa":
        refuse_dropout("infsa_attention", dropout_p)

    def fused(v):
        if variant == "linear_infsa":
            return linear_infsa(q, k, v, rho, eps, *masks, score_floor=score_floor, activation=activation)[..., :1, :]
        if variant == "pure_infsa":
            return pure_infsa(q, k, v, rho, eps, *masks, activation=activation)
        return multi_hop_infsa(q, k, v, rho, hops, eps, *masks, tol=1e-12 if q.dtype == torch.float64 else 1e-6)

    if not (need_scores or dropout_p > 0):
        return fused(v), None
    if variant == "linear_infsa":
        scores = linear_infsa_scores(q, k, rho, eps, *masks, score_floor=score_floor, activation=activation).mT
    elif variant == "pure_infsa":
        scores = pure_infsa_scores(q, k, rho, eps, *masks, activation=activation)
    else:
        scores = fused(torch.eye(q.shape[2], dtype=q.dtype, device=q.device).expand(*q.shape[:2], -1, -1))
    scores = F.dropout(scores, dropout_p)
    return scores @ without(key_padding_mask, v), scores


def refuse_in_parallel(variant: str, dropout: float, need_scores: bool, activation: str) -> None:
    """What attention has no form of where tokens lie on several ranks."""
    what = (
        "the variant is 'multi_hop_infsa'" if variant == "multi_hop_infsa"
        else f"dropout is {dropout}" if dropout > 0
        else "the weights are asked for" if need_scores
        else f"activation is {activation!r}, not 'relu'" if activation != "relu"
        else None
    )  # fmt: skip
    if what:
        raise NotImplementedError(
            f"sequence-parallel InfSA: {what}: scores are held on no rank there; use linear_infsa or pure_infsa, without dropout "
            "of scores and weights"
        )


def check_variant(op: str, variant: str, hops: int | None) -> None:
    if variant not in VARIANTS:
        raise ValueError(
            f"{op}: variant is {variant!r}, expected {', '.join(map(repr, VARIANTS[:-1]))} or {VARIANTS[-1]!r}"
        )
    if hops is None:
        return
    if variant != "multi_hop_infsa":
        raise ValueError(f"{op}: hops is {hops!r}, expected None with variant={variant!r}, which has one")
    integer(op, "hops", hops)


def check_score_floor(op: str, variant: str, score_floor: float) -> None:
    number(op, "score_floor", score_floor)
    if not (math.isfinite(score_floor) and score_floor >= 0):
        raise ValueError(
            f"{op}: score_floor is {score_floor}, expected a finite number of at least 0; 0 is the paper's operator"
        )
    if score_floor > 0 and variant != "linear_infsa":
        raise ValueError(
            f"{op}: score_floor is {score_floor}, expected 0 with variant={variant!r}: only linear_infsa divides by a sum of "
            "scores, which a floor keeps from 0"
        )


def check_activation(op: str, variant: str, activation: str) -> None:
    check.activation(op, activation)
    if activation != "relu" and variant not in ("linear_infsa", "pure_infsa"):
        raise NotImplementedError(
            f"{op}: activation is {activation!r}, expected 'relu' with variant={variant!r}: only linear_infsa and pure_infsa "
            "have another"
        )


def refuse_dropout(op: str, dropout: float) -> None:
    """Of multi_hop_infsa."""
    if dropout > 0:
        raise NotImplementedError(f"{op}: dropout is {dropout}, expected 0: {NO_DROPOUT}")

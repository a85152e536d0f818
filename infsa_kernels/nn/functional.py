"""`infsa_attention`: the operators by the name of their variant, with dropout on the scores."""

import torch.nn.functional as F
from torch import Tensor

from ..ops.linear import linear_infsa, linear_infsa_scores
from ..ops.pure import pure_infsa, pure_infsa_scores
from ..ops.register import overridable
from .masks import without

VARIANTS = ("linear_infsa", "pure_infsa")


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
) -> Tensor:
    """InfSA attention over projected q, k, v: :func:`pure_infsa` or :func:`linear_infsa`, by ``variant``.

    Args:
        variant: "pure_infsa" or "linear_infsa".
        dropout_p: probability of dropping a score, in training only. Dropout needs the scores in memory: with
            ``dropout_p > 0 and training`` the pure variant holds the N x M matrix and runs in torch operations.
        training: whether dropout applies.

    The other arguments, the shapes and the errors are those of :func:`pure_infsa`.

    Returns:
        (B, H, N, dv) in the dtype of ``q``.
    """
    if variant not in VARIANTS:
        raise ValueError(f"infsa_attention: variant is {variant!r}, expected 'pure_infsa' or 'linear_infsa'")
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"infsa_attention: dropout_p is {dropout_p}, expected a probability between 0 and 1")
    masks = key_padding_mask, query_padding_mask
    context, _ = attend(q, k, v, variant, rho, eps, *masks, dropout_p=dropout_p if training else 0.0)
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
    dropout_p: float = 0.0,
    need_scores: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The context (..., N, dv), and the scores that it was made with, (..., N, M), where they are needed or some are dropped.

    Linear-InfSA has one row for all queries, of both: 1 in the place of N.
    """
    arguments = rho, eps, key_padding_mask, query_padding_mask
    linear = variant == "linear_infsa"
    if not (need_scores or dropout_p > 0):
        return (linear_infsa(q, k, v, *arguments)[..., :1, :] if linear else pure_infsa(q, k, v, *arguments)), None
    scores = linear_infsa_scores(q, k, *arguments).mT if linear else pure_infsa_scores(q, k, *arguments)
    scores = F.dropout(scores, dropout_p)
    return scores @ without(key_padding_mask, v), scores

"""`infsa_attention`: both operators behind one name, with dropout on the scores."""

import torch.nn.functional as F
from torch import Tensor

from .linear import linear_infsa, linear_infsa_scores
from .pure import pure_infsa, pure_infsa_scores
from .register import overridable

_VARIANTS = {"pure_infsa": (pure_infsa, pure_infsa_scores), "linear_infsa": (linear_infsa, linear_infsa_scores)}


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
    if variant not in _VARIANTS:
        raise ValueError(f"infsa_attention: variant is {variant!r}, expected 'pure_infsa' or 'linear_infsa'")
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"infsa_attention: dropout_p is {dropout_p}, expected a probability between 0 and 1")
    fused, scores_of = _VARIANTS[variant]
    if not (training and dropout_p > 0):
        return fused(q, k, v, rho, eps, key_padding_mask, query_padding_mask)

    scores = F.dropout(scores_of(q, k, rho, eps, key_padding_mask, query_padding_mask), dropout_p)
    if key_padding_mask is not None:
        rows = key_padding_mask[:, None, :, None] if v.dim() == 4 else key_padding_mask[:, :, None]
        v = v.masked_fill(rows, 0)
    if variant == "pure_infsa":
        return scores @ v
    return (scores.mT @ v).expand(*q.shape[:-1], v.shape[-1])

"""Attention weights of softmax and of Linear-InfSA as graphs over tokens, with the interface of the token graph of Pure InfSA.

So that centralities, maps and rollouts are the same for all three. Neither holds an N x M matrix.
"""

import torch
from torch import Tensor

from ..eager.common import acc_dtype
from ..graph import TokenGraph, katz_centrality
from ..ops.linear import linear_infsa_scores

# Scores of softmax that are held at a time: 64 MB in float32.
BLOCK = 1 << 24


class _Rows:
    """Weights W >= 0 whose rows sum to 1 or less, per head. A subclass gives ``matmul``, ``rmatmul`` and ``scores``.

    Attributes:
        q, k: queries (B, H, N, d) and keys (B, H, M, d), in float32 or float64.
    """

    q: Tensor
    k: Tensor
    tied = False

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, N, M)."""
        return (*self.q.shape[:3], self.k.shape[2])

    @property
    def T(self) -> "_Turned":
        return _Turned(self)

    def row_sums(self) -> Tensor:
        """What leaves each token, (B, H, N)."""
        return self.matmul(self.q.new_ones(1, 1, 1, 1).expand(*self.k.shape[:3], 1)).squeeze(-1)

    def column_sums(self) -> Tensor:
        """What reaches each token, (B, H, M)."""
        return self.rmatmul(self.kept()).squeeze(-1)

    def kept(self) -> Tensor:
        return self.q.new_ones(1, 1, 1, 1).expand(*self.q.shape[:3], 1)


class _Turned:
    """W^T."""

    def __init__(self, weights: _Rows):
        self.matmul, self.rmatmul, self.T = weights.rmatmul, weights.matmul, weights


class SoftmaxGraph(_Rows):
    """W = softmax(scale q k^T), the weights of scaled_dot_product_attention. O(N M) time a product, O(N + M) memory.

    Args:
        q: (B, H, N, d). k: (B, H, M, d).
        scale: default 1 / sqrt(d).
    """

    def __init__(self, q: Tensor, k: Tensor, scale: float | None = None):
        acc = acc_dtype(q)
        self.scale = q.shape[-1] ** -0.5 if scale is None else scale
        self.q, self.k = q.to(acc), k.to(acc)

    def scores(self, tokens) -> Tensor:
        """Rows of W, as an index, a list, a slice or a tensor of R chooses them: (B, H, R, M)."""
        tokens = tokens if isinstance(tokens, slice) else torch.as_tensor(tokens, device=self.q.device).reshape(-1)
        return torch.softmax(self.scale * self.q[:, :, tokens] @ self.k.mT, -1)

    def matmul(self, x: Tensor) -> Tensor:
        """W x for x (B, H, M, c): (B, H, N, c)."""
        return torch.cat([self.scores(rows) @ x for rows in self._blocks()], 2)

    def rmatmul(self, x: Tensor) -> Tensor:
        """W^T x for x (B, H, N, c): (B, H, M, c)."""
        return sum(self.scores(rows).mT @ x[:, :, rows] for rows in self._blocks())

    def _blocks(self) -> list[slice]:
        B, H, N, M = self.shape
        step = max(1, BLOCK // (B * H * M))
        return [slice(i, i + step) for i in range(0, N, step)]


class LinearGraph(_Rows):
    """W = 1 a^T with the weights a of Linear-InfSA: every token looks at the same. O(N) time and memory.

    All centralities of such a graph are functions of a. Rows are 0 where a head has no positive score and no floor.

    Args:
        q, k: as of :func:`infsa_kernels.linear_infsa`, as are the masks, eps and score_floor.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        key_padding_mask=None,
        query_padding_mask=None,
        eps: float = 1e-6,
        score_floor: float = 0.0,
    ):
        acc = acc_dtype(q)
        self.q = q.to(acc)
        self.k = self.q if k is q else k.to(acc)
        masks = key_padding_mask, query_padding_mask
        self.weights = linear_infsa_scores(self.q, self.k, 1.0, eps, *masks, score_floor=score_floor)  # (B, H, M, 1)

    def scores(self, tokens) -> Tensor:
        """Rows of W for R tokens: (B, H, R, M)."""
        rows = torch.as_tensor(tokens).numel()
        return self.weights.mT.expand(-1, -1, rows, -1)

    def matmul(self, x: Tensor) -> Tensor:
        """W x for x (B, H, M, c): (B, H, N, c)."""
        return (self.weights.mT @ x).expand(-1, -1, self.q.shape[2], -1)

    def rmatmul(self, x: Tensor) -> Tensor:
        """W^T x for x (B, H, N, c): (B, H, M, c)."""
        return self.weights * x.sum(2, keepdim=True)


Graph = TokenGraph | SoftmaxGraph | LinearGraph


def katz(graph: Graph, gamma: float, tol: float = 1e-6) -> Tensor:
    """Column sums of (I - gamma W)^-1, (B, H, N), to a relative error of ``tol``."""
    if isinstance(graph, TokenGraph):
        return katz_centrality(graph, gamma, "in", tol)
    # ||W||_2 may exceed 1, which the token graph's solver relies on; but W^T takes no sum of absolute values above what it was.
    total = term = graph.kept()
    while (term.sum(2) * gamma / (1 - gamma) > tol * total.sum(2)).any():
        term = gamma * graph.rmatmul(term)
        total = total + term
    return total.squeeze(-1)

"""The matrix A of Pure InfSA as a graph over tokens, implicit.

    A = ReLU((s q)(s k)^T) / (F + eps),   F = ||ReLU((s q)(s k)^T)||_F,   s = 1/sqrt(d)        per head; A_ij is the edge i -> j

A product with A is one call of `torch.ops.infsa.pure`, one with its transpose the call with q and k exchanged: O(N) memory.
"""

import functools
from contextlib import nullcontext

import torch
from torch import Tensor

from ..eager.common import acc_dtype
from ..ops import qkv
from ..ops.extension import torch_ops
from ..ops.pure import pure, pure_infsa_scores, raw
from .checks import check_columns, check_count


class TokenGraph:
    """The matrix A of Pure InfSA, implicit: one graph per head, whose nodes are tokens.

    Args:
        q: queries (B, H, N, d), where edges start; float32, bfloat16, float16 or float64. Any strides.
        k: keys (B, H, M, d), where they end; None, or q itself, for the paper's tied operator, whose graph is undirected.
        key_padding_mask: (B, M) bool, True = no edge ends there.
        query_padding_mask: (B, N) bool, True = no edge starts there. Give the same mask twice to remove padding from a graph.
        eps: added to the Frobenius norm before it divides; above 0.

    All results are float32, or float64 for float64 input.

    Raises:
        ValueError: a wrong shape, device or eps. TypeError: a wrong dtype or layout.

    Example::

        >>> g = TokenGraph(torch.randn(1, 16, 4096, 64))
        >>> katz_centrality(g).shape
        torch.Size([1, 16, 4096])
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor | None = None,
        *,
        key_padding_mask: Tensor | None = None,
        query_padding_mask: Tensor | None = None,
        eps: float = 1e-6,
    ):
        k = q if k is None else k
        qkv.demand_of_scores(pure, raw, q, k, 1.0, eps, key_padding_mask, query_padding_mask)
        if q.dim() != 4:
            raise ValueError(
                f"TokenGraph: q has shape {list(q.shape)}, expected (B, H, N, d); view it with 4 dimensions"
            )
        acc = acc_dtype(q)
        self.q = q.to(acc)
        self.k = self.q if k is q else k.to(acc)
        self.key_padding_mask, self.query_padding_mask, self.eps = key_padding_mask, query_padding_mask, eps

    @property
    def tied(self) -> bool:
        """Whether A is symmetric by construction."""
        return self.k is self.q and self.key_padding_mask is self.query_padding_mask

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, N, M)."""
        return (*self.q.shape[:3], self.k.shape[2])

    @property
    def T(self) -> "TokenGraph":
        """The graph with its edges turned round: q and k exchanged."""
        turned = object.__new__(TokenGraph)
        turned.q, turned.k, turned.eps = self.k, self.q, self.eps
        turned.key_padding_mask, turned.query_padding_mask = self.query_padding_mask, self.key_padding_mask
        return turned

    def matmul(self, x: Tensor) -> Tensor:
        """A x for x (B, H, M, c): (B, H, N, c). Differentiable in q, k and x."""
        B, H, _, M = self.shape
        check_columns("TokenGraph", x, (B, H, M))
        masks = self.key_padding_mask, self.query_padding_mask
        # Autocast would round q and k once more: a solver's residuals would be those of another matrix.
        device = self.q.device.type
        with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
            return torch_ops.pure(self.q, self.k, x.to(self.q.dtype), self.eps, 1.0, *masks)

    def rmatmul(self, x: Tensor) -> Tensor:
        """A^T x for x (B, H, N, c): (B, H, M, c). Differentiable in q, k and x."""
        return self.T.matmul(x)

    def row_sums(self) -> Tensor:
        """What leaves each token, (B, H, N)."""
        return self.matmul(self.q.new_ones(1, 1, 1, 1).expand(*self.k.shape[:3], 1)).squeeze(-1)

    def column_sums(self) -> Tensor:
        """What reaches each token, (B, H, M)."""
        return self.T.row_sums()

    @functools.cached_property
    def norm(self) -> Tensor:
        """F, (B, H): the Frobenius norm of the ReLU scores. A statistic, without a gradient."""
        with torch.no_grad():
            values = self.q.new_ones(1, 1, 1, 1).expand(*self.k.shape[:3], 1)
            masks = self.key_padding_mask, self.query_padding_mask
            return qkv.statistics(raw, self.q, self.k, values, self.eps, *masks)[0]

    def dense(self) -> Tensor:
        """A itself, (B, H, N, M): for looking at small graphs."""
        masks = self.key_padding_mask, self.query_padding_mask
        return pure_infsa_scores(self.q, self.k, 1.0, self.eps, *masks)

    def scores(self, tokens) -> Tensor:
        """Rows of A: the edges that leave ``tokens`` (an index, a list or tensor of R indices): (B, H, R, M)."""
        tokens = torch.as_tensor(tokens, device=self.q.device).reshape(-1)
        N = self.shape[2]
        if tokens.is_floating_point() or tokens.dtype == torch.bool:
            raise TypeError(f"TokenGraph: tokens has dtype {tokens.dtype}, expected integers, indices of tokens")
        if tokens.numel() and not -N <= tokens.min() <= tokens.max() < N:
            raise ValueError(f"TokenGraph: tokens holds {tokens.tolist()}, expected indices below N = {N}")
        scale = self.q.shape[-1] ** -0.5 if self.q.shape[-1] else 1.0
        rows = torch.relu((self.q[:, :, tokens] * scale) @ (self.k * scale).mT)
        if self.key_padding_mask is not None:
            rows = rows.masked_fill(self.key_padding_mask[:, None, None], 0)
        if self.query_padding_mask is not None:
            rows = rows.masked_fill(self.query_padding_mask[:, None, tokens, None], 0)
        return rows / (self.norm[..., None, None] + self.eps)

    def neighbors(self, tokens, top: int = 8) -> tuple[Tensor, Tensor]:
        """The ``top`` heaviest edges that leave ``tokens``: weights and tokens at their ends, both (B, H, R, top)."""
        check_count("TokenGraph", "top", top, self.shape[3])
        return tuple(self.scores(tokens).topk(top, -1))

    def linear_operator(self, batch: int, head: int):
        """One head as a scipy.sparse.linalg.LinearOperator (N, M), for eigsh, gmres, expm_multiply and the like."""
        from scipy.sparse.linalg import LinearOperator

        B, H, N, M = self.shape
        for name, index, size in (("batch", batch, B), ("head", head, H)):
            if not -size <= index < size:
                raise ValueError(f"TokenGraph: {name} is {index}, expected an index below {size}")
        one = object.__new__(TokenGraph)
        one.q, one.eps = self.q[batch, head].detach()[None, None], self.eps
        one.k = one.q if self.k is self.q else self.k[batch, head].detach()[None, None]
        masks = self.key_padding_mask, self.query_padding_mask
        one.key_padding_mask, one.query_padding_mask = (None if m is None else m[batch][None] for m in masks)

        def product(graph):
            def apply(x):
                columns = torch.as_tensor(x, device=self.q.device).reshape(1, 1, len(x), -1)
                return graph.matmul(columns)[0, 0].reshape(-1, *x.shape[1:]).cpu().numpy()

            return apply

        forward, backward = product(one), product(one.T)
        dtype = str(self.q.dtype).removeprefix("torch.")
        return LinearOperator((N, M), forward, backward, forward, dtype, backward)

    def removed(self) -> Tensor | None:
        """(B, N) bool, the tokens that neither mask leaves in a graph of as many keys as queries; None without two masks."""
        if self.key_padding_mask is None or self.query_padding_mask is None:
            return None
        return self.key_padding_mask & self.query_padding_mask

    def kept(self) -> Tensor:
        """1 for every token, 0 for those removed: (B, H, N, 1)."""
        removed = self.removed()
        kept = self.q.new_ones(*self.q.shape[:3], 1)
        return kept if removed is None else kept.masked_fill(removed[:, None, :, None], 0)

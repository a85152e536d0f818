"""The graph whose edges are Pure InfSA's weights, and the centralities of its tokens, without an N x N matrix.

    A = ReLU((s q)(s k)^T) / (F + eps),   F = ||ReLU((s q)(s k)^T)||_F,   s = 1/sqrt(d)        per head; A_ij is the edge i -> j

A product with A is one call of `torch.ops.infsa.pure`, one with its transpose the call with q and k exchanged: O(N) memory.
||A||_2 <= ||A||_F < 1, so sum_t gamma^t A^t = (I - gamma A)^-1 exists for every gamma in (0, 1) (paper section 3.2, eqs 7-15).

Derivations, the solver and what of the paper does not hold: docs/graph.md.
"""

import functools
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from .ops import _check
from .ops.pure import operator, pure_infsa_scores

__all__ = [
    "SolverInfo",
    "TokenGraph",
    "absorption_probability",
    "eigenvector_alignment",
    "eigenvector_centrality",
    "fundamental_matmul",
    "katz_centrality",
    "multi_hop_infsa",
    "pagerank",
]


@dataclass(frozen=True)
class SolverInfo:
    """What an iteration took.

    Attributes:
        products: how many products with the matrix were made; every one reads q and k once, for all columns.
        error: (B, H), a bound of the relative error that is left, in the norm that the function names.
    """

    products: int
    error: Tensor


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
        operator.check_scores(q, k, 1.0, eps, key_padding_mask, query_padding_mask)
        if q.dim() != 4:
            raise ValueError(
                f"TokenGraph: q has shape {list(q.shape)}, expected (B, H, N, d); view it with 4 dimensions"
            )
        acc = _check.acc_dtype(q)
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
        if x.dim() != 4 or x.shape[:3] != (B, H, M):
            raise ValueError(f"TokenGraph: x has shape {list(x.shape)}, expected (B, H, M, c) = {[B, H, M]} and any c")
        masks = self.key_padding_mask, self.query_padding_mask
        return torch.ops.infsa.pure(self.q, self.k, x.to(self.q.dtype), self.eps, 1.0, *masks)

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
            return operator.statistics(
                self.q, self.k, values, self.eps, self.key_padding_mask, self.query_padding_mask
            )[0]

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
        M = self.shape[3]
        if not 1 <= top <= M:
            raise ValueError(f"TokenGraph: top is {top}, expected 1 to M = {M}")
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
                columns = torch.as_tensor(x, dtype=self.q.dtype, device=self.q.device).reshape(1, 1, len(x), -1)
                return graph.matmul(columns)[0, 0].reshape(-1, *x.shape[1:]).cpu().numpy()

            return apply

        forward, backward = product(one), product(one.T)
        dtype = str(self.q.dtype).removeprefix("torch.")
        return LinearOperator((N, M), forward, backward, forward, dtype, backward)


def fundamental_matmul(
    g: TokenGraph, x: Tensor, gamma: float | Tensor = 0.9, tol: float = 1e-6, *, return_info: bool = False
) -> Tensor | tuple[Tensor, SolverInfo]:
    """(I - gamma A)^-1 x, the fundamental matrix of the absorbing chain times x (paper eqs 13-14).

    Args:
        g: a graph with as many keys as queries.
        x: (B, H, N, c). All columns share every product with A.
        gamma: discount of a step, in (0, 1): a number, or a tensor of shape (), (1,) or (H,), which gets its gradient.
        tol: relative error in the Euclidean norm, of every column. Rounding of the products, about 1e-7 / (1 - gamma) in
            float32, comes on top of it.
        return_info: whether to return a :class:`SolverInfo` too.

    Returns:
        (B, H, N, c), with exact gradients to q, k, x and gamma of any order, at the memory cost of one product. Tokens that
        both masks of ``g`` remove get 0.

    Raises:
        ValueError: gamma out of range, a wrong shape. RuntimeError: no convergence; names the products made and the error left.
    """
    _square("fundamental_matmul", g)
    B, H, N, _ = g.shape
    if x.dim() != 4 or x.shape[:3] != (B, H, N):
        raise ValueError(
            f"fundamental_matmul: x has shape {list(x.shape)}, expected (B, H, N, c) = {[B, H, N]} and any c"
        )
    gamma = _gamma("fundamental_matmul", gamma, g)
    removed = _removed(g)
    x = x.to(g.q.dtype)
    if removed is not None:
        x = x.masked_fill(removed[:, None, :, None], 0)
    info: list[SolverInfo] = []
    k = None if g.k is g.q else g.k
    y = _Fundamental.apply(g.q, k, x, gamma, g.eps, g.key_padding_mask, g.query_padding_mask, tol, info)
    return (y, info[0]) if return_info else y


def multi_hop_infsa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gamma: float | Tensor = 0.9,
    hops: int | None = None,
    eps: float = 1e-6,
    key_padding_mask: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
    tol: float = 1e-6,
) -> Tensor:
    """sum_{t=1..hops} gamma^t A^t v: the paper's walk of eq 7 inside one layer. O(N^2) time a hop, O(N) memory.

    Args:
        q, k, v: (B, H, N, d), (B, H, N, d), (B, H, N, dv). Pass the same object as q and k for the tied operator.
        gamma: discount of a hop, in (0, 1): a number, or a tensor of shape (), (1,) or (H,), which gets its gradient.
        hops: how many; None for all of them, ((I - gamma A)^-1 - I) v, solved to ``tol`` as :func:`fundamental_matmul` does.
        key_padding_mask, query_padding_mask: as :func:`infsa_kernels.pure_infsa`; give padding twice.

    Returns:
        (B, H, N, dv) in the dtype of ``q``.
    """
    g = TokenGraph(q, k, key_padding_mask=key_padding_mask, query_padding_mask=query_padding_mask, eps=eps)
    _square("multi_hop_infsa", g)
    if hops is None:
        # A fundamental(v) and not fundamental(v) - v, whose terms cancel.
        reached = g.matmul(fundamental_matmul(g, v, gamma, tol))
        return (_gamma("multi_hop_infsa", gamma, g) * reached).to(q.dtype)
    if isinstance(hops, bool) or not isinstance(hops, int) or hops < 1:
        raise ValueError(f"multi_hop_infsa: hops is {hops!r}, expected an int of at least 1, or None for all hops")
    gamma = _gamma("multi_hop_infsa", gamma, g)
    v = v.to(g.q.dtype)
    total = gamma * g.matmul(v)
    for _ in range(hops - 1):
        total = gamma * g.matmul(v + total)
    return total.to(q.dtype)


def katz_centrality(
    g: TokenGraph, gamma: float | Tensor = 0.9, direction: str = "in", tol: float = 1e-6, *, return_info: bool = False
) -> Tensor | tuple[Tensor, SolverInfo]:
    """Sums of (I - gamma A)^-1, the start of every walk included: (B, H, N) (paper eq 15).

    Args:
        direction: "in", column sums: what walks from everywhere bring to a token; networkx's katz_centrality with alpha = gamma,
            beta = 1 and without its normalisation. "out", row sums: a token's influence.

    The other arguments, gradients and errors: :func:`fundamental_matmul`.
    """
    if direction not in ("in", "out"):
        raise ValueError(
            f"katz_centrality: direction is {direction!r}, expected 'in' (column sums) or 'out' (row sums)"
        )
    turned = g.T if direction == "in" and not g.tied else g
    ones = g.q.new_ones(1, 1, 1, 1).expand(*g.q.shape[:3], 1)
    sums, info = fundamental_matmul(turned, ones, gamma, tol, return_info=True)
    return (sums.squeeze(-1), info) if return_info else sums.squeeze(-1)


@torch.no_grad()
def eigenvector_centrality(
    g: TokenGraph, tol: float = 1e-6, *, max_products: int = 1000, return_info: bool = False
) -> Tensor | tuple[Tensor, SolverInfo]:
    """The eigenvector of A^T with the largest eigenvalue, above 0 and of norm 1: (B, H, N), as networkx has it.

    A head without a positive score gives every token the same. ``tol`` bounds ||A^T c - lambda c|| / lambda, which is the
    ``error`` of the info. No gradient.

    Raises:
        RuntimeError: no convergence after ``max_products``; where two eigenvalues lie close together, raise it.
    """
    _square("eigenvector_centrality", g)
    graph, kept = g.T, _kept(g)
    x = kept / torch.linalg.vector_norm(kept, dim=-2, keepdim=True).clamp(min=1)
    for products in range(1, max_products + 1):
        y = graph.matmul(x)
        size = (x * y).sum(-2, keepdim=True)
        error = torch.linalg.vector_norm(y - size * x, dim=-2, keepdim=True) / torch.where(size > 0, size, 1)
        if (error <= tol).all():
            info = SolverInfo(products, error[..., 0, 0])
            return (x.squeeze(-1), info) if return_info else x.squeeze(-1)
        # The shift, as networkx's, ends the swinging of a graph whose cycles are all even.
        y = y + 0.1 * torch.linalg.vector_norm(y, dim=-2, keepdim=True) * x
        size = torch.linalg.vector_norm(y, dim=-2, keepdim=True)
        x = torch.where(size > 0, y / size, x)
    _not_converged("eigenvector_centrality", max_products, error, tol)


@torch.no_grad()
def pagerank(
    g: TokenGraph,
    damping: float = 0.85,
    personalization: Tensor | None = None,
    tol: float = 1e-6,
    *,
    max_products: int = 1000,
    return_info: bool = False,
) -> Tensor | tuple[Tensor, SolverInfo]:
    """Google's ranks of the tokens, (B, H, N), which sum to 1, as networkx has them: A's rows divided by their sums.

    Args:
        damping: probability of following an edge, in (0, 1).
        personalization: where the other steps lead, (N,) or (B, H, N), not negative; divided by its sum. Default: anywhere.
            A token that no edge leaves leads there too.
        tol: bound of the sum of absolute errors. No gradient.
    """
    _square("pagerank", g)
    if not 0 < damping < 1:
        raise ValueError(f"pagerank: damping is {damping}, expected a number between 0 and 1, both excluded")
    B, H, N, _ = g.shape
    start = _kept(g)
    if personalization is not None:
        if personalization.shape not in ((N,), (B, H, N)):
            raise ValueError(
                f"pagerank: personalization has shape {list(personalization.shape)}, expected (N,) or (B, H, N) = {[B, H, N]}"
            )
        start = start * personalization.to(g.q.dtype)[..., None]
    total = start.sum(-2, keepdim=True)
    if not (start >= 0).all() or not (total > 0).all():
        raise ValueError(
            "pagerank: personalization is negative, or 0 everywhere, expected weights of which some are above 0"
        )
    start = start / total
    leaving = g.row_sums()[..., None]
    x, graph = start, g.T
    for products in range(2, max_products + 2):
        followed = graph.matmul(torch.where(leaving > 0, x / leaving, 0))
        # What follows no edge jumps: dangling tokens, and the share 1 - damping of all others.
        y = damping * followed
        y = y + (1 - y.sum(-2, keepdim=True)) * start
        error = (y - x).abs().sum(-2, keepdim=True) * (damping / (1 - damping))
        x = y
        if (error <= tol).all():
            info = SolverInfo(products, error[..., 0, 0])
            return (x.squeeze(-1), info) if return_info else x.squeeze(-1)
    _not_converged("pagerank", max_products, error, tol)


def absorption_probability(g: TokenGraph, gamma: float | Tensor = 0.9) -> Tensor:
    """1 - gamma sum_j A_ij, what a walk at token i loses in a step (paper eq 13): (B, H, N).

    NaN where that is negative and so no probability: A need not be substochastic, as the paper says it is. The edges of a token
    that scores high with many others, a hub, sum to more than 1.
    """
    _square("absorption_probability", g)
    left = 1 - _gamma("absorption_probability", gamma, g).squeeze(-1) * g.row_sums()
    return torch.where(left >= 0, left, torch.nan)


def eigenvector_alignment(q: Tensor, key_padding_mask: Tensor | None = None, tol: float = 1e-6) -> dict[str, Tensor]:
    """How close Linear-InfSA's weights come to the Perron eigenvector of the tied graph (supplement 8, eqs 25-27).

    Args:
        q: (B, H, N, d), queries that are keys too. key_padding_mask: (B, N) bool, True = remove that token.

    Returns:
        "cosine" and "spearman", (B, H) each, and "uniform_cosine": the cosine that equal weights reach, without which the
        first says little: about 0.97 on random tokens.

    Needs scipy.
    """
    from scipy.stats import rankdata

    from .ops.linear import linear_infsa_scores

    g = TokenGraph(q, key_padding_mask=key_padding_mask, query_padding_mask=key_padding_mask)
    perron = eigenvector_centrality(g, tol)
    masks = key_padding_mask, key_padding_mask
    with torch.no_grad():
        weights = linear_infsa_scores(g.q, g.q, 1.0, g.eps, *masks).squeeze(-1)
    kept = _kept(g).squeeze(-1)

    def cosine(a, b):
        return torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=-1)

    spearman = perron.new_full(perron.shape[:2], torch.nan)
    for b in range(len(kept)):
        inside = kept[b, 0].bool()
        ranks = [torch.from_numpy(rankdata(t[b][:, inside].cpu().numpy(), axis=-1)) for t in (perron, weights)]
        first, second = (r - r.mean(-1, keepdim=True) for r in ranks)
        spearman[b] = cosine(first, second).to(spearman)
    return {
        "cosine": cosine(weights, perron).to(perron),
        "spearman": spearman,
        "uniform_cosine": cosine(kept, perron).to(perron),
    }


class _Fundamental(torch.autograd.Function):
    """y = (I - gamma A)^-1 x. With w = (I - gamma A^T)^-1 dy: dx = w, and q, k, gamma get the gradients of w . (gamma A y)."""

    @staticmethod
    def forward(q, k, x, gamma, eps, key_padding_mask, query_padding_mask, tol, info):
        g = _graph(q, k, key_padding_mask, query_padding_mask, eps)
        y, found = _solve(g, x, gamma, tol)
        info.append(found)
        return y

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, _, gamma, *ctx.constants, _ = inputs
        ctx.save_for_backward(q, k, gamma, output)

    @staticmethod
    def backward(ctx, dy):
        q, k, gamma, y = ctx.saved_tensors
        eps, key_padding_mask, query_padding_mask, tol = ctx.constants
        turned = (q, None) if k is None else (k, q)
        w = _Fundamental.apply(*turned, dy, gamma, eps, query_padding_mask, key_padding_mask, tol, [])
        grads: list[Tensor | None] = [None] * 9
        grads[2] = w if ctx.needs_input_grad[2] else None
        wanted = [i for i in (0, 1, 3) if ctx.needs_input_grad[i]]
        if wanted:
            again = torch.is_grad_enabled()
            with torch.enable_grad():
                # Views, so that y, which depends on the same tensors, is a constant here.
                q, k, gamma = (None if t is None else t.view_as(t) for t in (q, k, gamma))
                reached = gamma * _graph(q, k, key_padding_mask, query_padding_mask, eps).matmul(y)
                given = {0: q, 1: k, 3: gamma}
                found = torch.autograd.grad(reached, [given[i] for i in wanted], w, create_graph=again)
            for i, grad in zip(wanted, found):
                grads[i] = grad
        return tuple(grads)


def _graph(q, k, key_padding_mask, query_padding_mask, eps) -> TokenGraph:
    return TokenGraph(q, k, key_padding_mask=key_padding_mask, query_padding_mask=query_padding_mask, eps=eps)


# Conjugate directions that an untied system remembers; a symmetric one needs the last.
MEMORY = 4
MAX_PRODUCTS = 1000


def _solve(g: TokenGraph, x: Tensor, gamma: Tensor, tol: float) -> tuple[Tensor, SolverInfo]:
    """Minimal residuals by conjugate directions: one product an iteration, for all columns of all heads at once.

    With one direction remembered this is the conjugate residual method (symmetric), with more Orthomin. Both converge because
    the symmetric part of I - gamma A is positive definite, and ||residual|| / (1 - gamma) bounds the error.
    """

    def norm(t):
        return torch.linalg.vector_norm(t, dim=-2, keepdim=True)

    def over(a, b):
        return torch.where(b > 0, a / b, 0)

    # Columns of any size: the squares below would overflow or vanish.
    scale = x.abs().amax(-2, keepdim=True) if x.shape[-2] else x.new_ones(())
    scale = torch.where(scale > 0, scale, 1)
    y = x / scale
    r, products = gamma * g.matmul(y), 1
    directions: list[tuple[Tensor, Tensor, Tensor]] = []
    while True:
        error = over(norm(r), (1 - gamma) * norm(y))
        # Not <=: a head with NaN in it has nothing to wait for.
        if not (error > tol).any():
            break
        if products >= MAX_PRODUCTS:
            _not_converged("fundamental_matmul", products, error, tol)
        p, image = r, r - gamma * g.matmul(r)
        products += 1
        for older, older_image, square in directions:
            share = over((image * older_image).sum(-2, keepdim=True), square)
            p, image = p - share * older, image - share * older_image
        square = (image * image).sum(-2, keepdim=True)
        step = over((r * image).sum(-2, keepdim=True), square)
        y, r = y + step * p, r - step * image
        directions = [*directions, (p, image, square)][-(1 if g.tied else MEMORY) :]
    return scale * y, SolverInfo(
        products, error.amax(-1).squeeze(-1) if error.shape[-1] else error.new_zeros(error.shape[:2])
    )


def _not_converged(name: str, products: int, error: Tensor, tol: float) -> NoReturn:
    raise RuntimeError(
        f"{name}: after {products} products the error is bounded by {error.max():.1e}, expected tol = {tol:.1e}; "
        "give a larger tol, or float64 input"
    )


def _square(name: str, g: TokenGraph) -> None:
    _, _, N, M = g.shape
    if N != M:
        raise ValueError(
            f"{name}: the graph has {N} queries and {M} keys, expected as many: its tokens have to be the same"
        )


def _gamma(name: str, gamma: float | Tensor, g: TokenGraph) -> Tensor:
    """gamma as a tensor that broadcasts over (B, H, N, c)."""
    H = g.shape[1]
    if not isinstance(gamma, Tensor):
        gamma = torch.as_tensor(gamma, dtype=g.q.dtype, device=g.q.device)
    if gamma.shape not in ((), (1,), (H,)):
        raise ValueError(f"{name}: gamma has shape {list(gamma.shape)}, expected [], [1] or (H,) = [{H}]")
    if not torch.compiler.is_compiling() and not ((gamma > 0) & (gamma < 1)).all():
        raise ValueError(f"{name}: gamma is {gamma.tolist()}, expected between 0 and 1, both excluded")
    return gamma.to(g.q.dtype).reshape(1, -1, 1, 1)


def _removed(g: TokenGraph) -> Tensor | None:
    """(B, N), the tokens that no edge leaves or reaches by the masks."""
    if g.key_padding_mask is None or g.query_padding_mask is None:
        return None
    return g.key_padding_mask & g.query_padding_mask


def _kept(g: TokenGraph) -> Tensor:
    """1 for every token, 0 for those removed: (B, H, N, 1)."""
    removed = _removed(g)
    kept = g.q.new_ones(*g.q.shape[:3], 1)
    return kept if removed is None else kept.masked_fill(removed[:, None, :, None], 0)

"""What the token graph says of a token: Katz, eigenvector and PageRank centrality, absorption (paper eqs 13-15, 25-27)."""

import torch
from torch import Tensor

from .checks import check_count, check_number, check_square, check_tol
from .token_graph import TokenGraph
from .walks import SolverInfo, fundamental_matmul, not_converged, per_head_gamma


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
    check_square("eigenvector_centrality", *g.shape[2:])
    check_tol("eigenvector_centrality", tol)
    check_count("eigenvector_centrality", "max_products", max_products)
    graph, kept = g.T, g.kept()
    x = kept / torch.linalg.vector_norm(kept, dim=-2, keepdim=True).clamp(min=1)
    for products in range(1, max_products + 1):
        y = graph.matmul(x)
        size = (x * y).sum(-2, keepdim=True)
        error = torch.linalg.vector_norm(y - size * x, dim=-2, keepdim=True) / torch.where(size > 0, size, 1)
        if not (error > tol).any():  # so said, a head with NaN in it ends too
            x = torch.where(error.isnan(), torch.nan, x)
            info = SolverInfo(products, error[..., 0, 0])
            return (x.squeeze(-1), info) if return_info else x.squeeze(-1)
        # The shift, as networkx's, ends the swinging of a graph whose cycles are all even.
        y = y + 0.1 * torch.linalg.vector_norm(y, dim=-2, keepdim=True) * x
        size = torch.linalg.vector_norm(y, dim=-2, keepdim=True)
        x = torch.where(size > 0, y / size, x)
    not_converged("eigenvector_centrality", max_products, error, tol)


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
    check_square("pagerank", *g.shape[2:])
    check_number("pagerank", "damping", damping, 0, 1, "a number between 0 and 1, both excluded")
    check_tol("pagerank", tol)
    check_count("pagerank", "max_products", max_products)
    B, H, N, _ = g.shape
    start = g.kept()
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
        if not (error > tol).any():  # so said, a head with NaN in it ends too
            info = SolverInfo(products, error[..., 0, 0])
            return (x.squeeze(-1), info) if return_info else x.squeeze(-1)
    not_converged("pagerank", max_products, error, tol)


def absorption_probability(g: TokenGraph, gamma: float | Tensor = 0.9) -> Tensor:
    """1 - gamma sum_j A_ij, what a walk at token i loses in a step (paper eq 13): (B, H, N).

    NaN where that is negative and so no probability: A need not be substochastic, as the paper says it is. The edges of a token
    that scores high with many others, a hub, sum to more than 1.
    """
    check_square("absorption_probability", *g.shape[2:])
    left = 1 - per_head_gamma("absorption_probability", gamma, g).squeeze(-1) * g.row_sums()
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

    from ..ops.linear import linear_infsa_scores

    g = TokenGraph(q, key_padding_mask=key_padding_mask, query_padding_mask=key_padding_mask)
    perron = eigenvector_centrality(g, tol)
    masks = key_padding_mask, key_padding_mask
    with torch.no_grad():
        weights = linear_infsa_scores(g.q, g.q, 1.0, g.eps, *masks).squeeze(-1)
    kept = g.kept().squeeze(-1)

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

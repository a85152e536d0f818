"""The graph whose edges are Pure InfSA's weights, and the centralities of its tokens, without an N x N matrix.

Derivations, the solver and what of the paper does not hold: docs/graph.md.
"""

from .centrality import (
    absorption_probability,
    eigenvector_alignment,
    eigenvector_centrality,
    katz_centrality,
    pagerank,
)
from .token_graph import TokenGraph
from .walks import SolverInfo, fundamental_matmul, multi_hop_infsa

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

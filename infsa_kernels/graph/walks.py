"""Sums over walks of every length: (I - gamma A)^-1 = sum_t gamma^t A^t, matrix-free and differentiable.

||A||_2 <= ||A||_F < 1, so the sum exists for every gamma in (0, 1) (paper section 3.2, eqs 7-14).
"""

from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from ..ops.pure import pure_infsa
from .checks import check_columns, check_count, check_gamma, check_square, check_tol
from .token_graph import TokenGraph

# Conjugate directions that an untied system remembers; a symmetric one needs the last.
MEMORY = 4
MAX_PRODUCTS = 1000


@dataclass(frozen=True)
class SolverInfo:
    """What an iteration took.

    Attributes:
        products: how many products with the matrix were made; every one reads q and k once, for all columns.
        error: (B, H), a bound of the relative error that is left, in the norm that the function names.
    """

    products: int
    error: Tensor


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
    check_square("fundamental_matmul", *g.shape[2:])
    check_tol("fundamental_matmul", tol)
    B, H, N, _ = g.shape
    check_columns("fundamental_matmul", x, (B, H, N))
    gamma = per_head_gamma("fundamental_matmul", gamma, g)
    removed = g.removed()
    x = x.to(g.q.dtype)
    if removed is not None:
        x = x.masked_fill(removed[:, None, :, None], 0)
    info: list[SolverInfo] = []
    k = None if g.k is g.q else g.k
    solve = _Fundamental.apply
    if torch.compiler.is_compiling():
        # No graph knows when an iteration ends: it breaks once, here, and not at every step.
        solve = torch.compiler.disable(solve)
    y = solve(g.q, k, x, gamma, g.eps, g.key_padding_mask, g.query_padding_mask, tol, info)
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
        hops: how many; None for all of them, ((I - gamma A)^-1 - I) v, solved to ``tol`` as :func:`fundamental_matmul` does,
            in float32 or wider. One hop is :func:`infsa_kernels.pure_infsa` with rho = gamma.
        key_padding_mask, query_padding_mask: as :func:`infsa_kernels.pure_infsa`; give padding twice.

    Returns:
        (B, H, N, dv) in the dtype of ``q``.
    """
    if hops is None:
        g = TokenGraph(q, k, key_padding_mask=key_padding_mask, query_padding_mask=query_padding_mask, eps=eps)
        if key_padding_mask is not None:
            v = v.masked_fill(key_padding_mask[:, None, :, None], 0)
        # A fundamental(v) and not fundamental(v) - v, whose terms cancel.
        reached = g.matmul(fundamental_matmul(g, v, gamma, tol))
        return (per_head_gamma("multi_hop_infsa", gamma, g) * reached).to(q.dtype)
    check_count("multi_hop_infsa", "hops", hops)
    if q.dim() != 4:
        raise ValueError(
            f"multi_hop_infsa: q has shape {list(q.shape)}, expected (B, H, N, d); view it with 4 dimensions"
        )
    check_square("multi_hop_infsa", q.shape[2], k.shape[2])
    check_gamma("multi_hop_infsa", gamma, q.shape[1], wait=False)
    total = pure_infsa(q, k, v, gamma, eps, key_padding_mask, query_padding_mask)
    for _ in range(hops - 1):
        total = pure_infsa(q, k, v + total, gamma, eps, key_padding_mask, query_padding_mask)
    return total


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


def _solve(g: TokenGraph, x: Tensor, gamma: Tensor, tol: float) -> tuple[Tensor, SolverInfo]:
    """Minimal residuals by conjugate directions: one product an iteration, for all columns of all heads at once.

    With one direction remembered this is the conjugate residual method (symmetric), with more Orthomin. Both converge because
    the symmetric part of I - gamma A is positive definite, and ||residual|| / (1 - gamma) bounds the error. From y = 0 the
    first residual takes no product.
    """

    def norm(t):
        return torch.linalg.vector_norm(t, dim=-2, keepdim=True)

    def dot(a, b):
        # Not vecdot, which autocast would round.
        return (a * b).sum(-2, keepdim=True)

    def over(a, b):
        return torch.where(b > 0, a / b, 0)

    # Columns of any size: the squares below would overflow or vanish.
    scale = x.abs().amax(-2, keepdim=True) if x.shape[-2] else x.new_ones(())
    scale = torch.where(scale > 0, scale, 1)
    r, y, products = x / scale, torch.zeros_like(x), 0
    directions: list[tuple[Tensor, Tensor, Tensor]] = []
    while True:
        size = norm(r)
        error = torch.where(size == 0, 0, size / ((1 - gamma) * norm(y)))
        # Not <=: a head with NaN in it has nothing to wait for.
        if not (error > tol).any():
            break
        if products >= MAX_PRODUCTS:
            not_converged("fundamental_matmul", products, error, tol)
        p = r.clone()
        image = torch.addcmul(r, gamma, g.matmul(r), value=-1)
        products += 1
        for older, older_image, square in directions:
            share = over(dot(image, older_image), square)
            p.addcmul_(share, older, value=-1)
            image.addcmul_(share, older_image, value=-1)
        square = dot(image, image)
        # Columns that are done stay: of their residuals only rounding is left, and a step along that leads anywhere.
        step = torch.where(error > tol, over(dot(r, image), square), 0)
        y.addcmul_(step, p)
        r.addcmul_(step, image, value=-1)
        directions = [*directions, (p, image, square)][-(1 if g.tied else MEMORY) :]
    y = torch.where(error.isnan(), torch.nan, y.mul_(scale))
    return y, SolverInfo(products, error.amax(-1).squeeze(-1) if error.shape[-1] else error.new_zeros(error.shape[:2]))


def not_converged(name: str, products: int, error: Tensor, tol: float) -> NoReturn:
    raise RuntimeError(
        f"{name}: after {products} products the error is bounded by {error.max():.1e}, expected tol = {tol:.1e}; "
        "give a larger tol, or float64 input"
    )


def per_head_gamma(name: str, gamma: float | Tensor, g: TokenGraph) -> Tensor:
    """gamma as a tensor that broadcasts over (B, H, N, c)."""
    check_gamma(name, gamma, g.shape[1])
    return torch.as_tensor(gamma, dtype=g.q.dtype, device=g.q.device).reshape(1, -1, 1, 1)

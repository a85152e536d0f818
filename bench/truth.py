"""The gate: a result counts only if it is as close to float64 as plain torch code of its dtype (infsa_kernels/testing.py).

Linear is compared whole. Pure is compared in rows and heads drawn at random: their norm, and so their output and
gradients, are exact in float64 over all N x N scores, computed a block of queries at a time.

A gradient jumps where a score is 0, and either side is right there: tokens with a score that float32 cannot tell from 0
are left out when gradients are compared.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from infsa_kernels import reference
from infsa_kernels.testing import FORWARD, GRADIENT, error_of_eager, rounding

from .cases import EPS, RHO, Case

HEADS_AT_ONCE = 8
ROWS = 64
BLOCK_SCORES = 1 << 21

# float64 operations that checking one case of Pure may take, beyond one head.
FLOPS = 5e10

# A score this small beside |u| |kappa| may have either sign in float32. Linear's central query carries the rounding of
# a sum over all tokens, Pure's scores that of one product.
KINK = {"linear": 1e-5, "pure": 1e-6}


@dataclass
class Verdict:
    """The tensor that is worst beside its bound; error and bound are relative to the tensor's largest entry."""

    right: bool
    error: float
    bound: float
    what: str


class Truth:
    """float64 values of out, and of dq, dk, dv if ``gradients`` (when tied, dk is part of dq), and bounds on errors.

    ``checked`` says which part of the tensors they cover.
    """

    def __init__(self, case: Case, inputs: dict[str, Tensor], dout: Tensor, gradients: bool):
        make = self._linear if case.op == "linear" else self._pure
        self.checked = "all"
        self._select = lambda t: t
        self._values, plain, self._undecided = make(case, inputs, dout, gradients)
        self._bounds = {}
        for name, truth in self._values.items():
            self._values[name] = truth = self._decided(name, truth)
            eager_error = error_of_eager(self._decided(name, plain[name]), truth, case.dtype)
            self._bounds[name] = (FORWARD if name == "out" else GRADIENT) * eager_error + rounding(truth, case.dtype)

    def judge(self, results: dict[str, Tensor]) -> Verdict:
        verdicts = []
        for name in results.keys() & self._values.keys():
            truth = self._values[name]
            error = (self._decided(name, self._select(results[name])).double() - truth).abs().max().item()
            largest = truth.abs().max().item() or 1.0
            right = error <= self._bounds[name]  # False for NaN
            verdicts.append(Verdict(right, error / largest, self._bounds[name] / largest, name))
        return max(verdicts, key=lambda v: math.inf if math.isnan(v.error) else v.error / (v.bound or 1e-300))

    def _decided(self, name: str, t: Tensor) -> Tensor:
        """The tensor, with 0 where the sign of a score hangs on rounding if it is a gradient that jumps there."""
        return t.masked_fill(self._undecided[..., None], 0) if name in ("dq", "dk") else t

    def _linear(self, case, inputs, dout, gradients):
        truth, plain, undecided = [], [], []
        for first in range(0, case.H, HEADS_AT_ONCE):
            heads = slice(first, first + HEADS_AT_ONCE)
            part = {n: t[:, heads] for n, t in inputs.items()}
            truth.append(_linear_with_gradients(part, dout[:, heads], torch.float64, gradients))
            plain.append(_linear_with_gradients(part, dout[:, heads], case.dtype, gradients))
            undecided.append(_undecided_keys(part))
        return _joined(truth, torch.cat, 1), _joined(plain, torch.cat, 1), torch.cat(undecided, 1)

    def _pure(self, case, inputs, dout, gradients):
        N = case.N
        per_head = (4 if gradients else 2) * N * N * case.d
        generator = torch.Generator().manual_seed(N)
        heads = torch.randperm(case.H, generator=generator)[: max(1, int(FLOPS / per_head))].sort().values
        rows = torch.randperm(N, generator=generator)[:ROWS].sort().values.to(dout.device)
        if len(heads) < case.H or len(rows) < N:
            self.checked = f"{len(rows)} of {N} rows in {len(heads)} of {case.H} heads"
        self._select = lambda t: t[0, heads.to(t.device)][:, rows]
        truth, plain, undecided = [], [], []
        for head in heads.tolist():
            part = {n: t[0, head] for n, t in inputs.items()}
            for dtype, found in ((torch.float64, truth), (case.dtype, plain)):
                decided, values = pure_rows(part, dout[0, head], rows, dtype, gradients)
                found.append(values)
                if dtype == torch.float64:
                    undecided.append(~decided)
        return _joined(truth, torch.stack), _joined(plain, torch.stack), torch.stack(undecided)


def _joined(parts: list[dict[str, Tensor]], join, *dim) -> dict[str, Tensor]:
    return {name: join([part[name] for part in parts], *dim) for name in parts[0]}


def _linear_with_gradients(inputs, dout, dtype, gradients) -> dict[str, Tensor]:
    leaves = {n: t.to(dtype).detach().requires_grad_(gradients) for n, t in inputs.items()}
    out = reference.linear(leaves["q"], leaves.get("k", leaves["q"]), leaves["v"], RHO, EPS)
    grads = torch.autograd.grad(out, list(leaves.values()), dout.to(dtype)) if gradients else ()
    return {"out": out.detach(), **{f"d{n}": g for n, g in zip(leaves, grads)}}


def _undecided_keys(inputs) -> Tensor:
    """(1, H, N): the tokens whose score has a sign that hangs on rounding."""
    q = inputs["q"].double()
    k = inputs.get("k", inputs["q"]).double()
    energy = torch.linalg.vector_norm(q, dim=-1, keepdim=True)
    central_query = (energy * q).sum(-2, keepdim=True)  # but for its length
    return torch.nn.functional.cosine_similarity(central_query, k, dim=-1).abs() <= KINK["linear"]


def pure_rows(inputs, dout, rows, dtype, gradients) -> tuple[Tensor, dict[str, Tensor]]:
    """Rows of out, dq, dk and dv of one head (N, d), computed in ``dtype`` with sums over all N x N in blocks.

    Also returns which rows have no score whose sign hangs on rounding.
    """
    s = inputs["q"].shape[-1] ** -0.5
    u = inputs["q"].to(dtype) * s
    kappa = inputs.get("k", inputs["q"]).to(dtype) * s
    v, dout = inputs["v"].to(dtype), dout.to(dtype)

    # F^2 = sum P^2 and <dO, P v>, of which the norm's gradient is made.
    squares = dout_p_v = 0.0
    for i in torch.arange(len(u), device=u.device).split(max(1, BLOCK_SCORES // len(kappa))):
        scores = torch.relu_(u[i] @ kappa.T)
        squares += scores.flatten().dot(scores.flatten()).item()
        if gradients:
            dout_p_v += (dout[i] * (scores @ v)).sum().item()
    norm = squares**0.5
    gain = RHO / (norm + EPS)
    c = gain * dout_p_v / (norm * (norm + EPS)) if norm else 0.0

    row_scores = u[rows] @ kappa.T  # (R, M)
    found = {"out": gain * torch.relu(row_scores) @ v}
    lengths = torch.linalg.vector_norm(u, dim=-1), torch.linalg.vector_norm(kappa, dim=-1)
    decided = (row_scores.abs() > KINK["pure"] * lengths[0][rows, None] * lengths[1]).all(1)
    if not gradients:
        return decided, found

    dscores = gain * dout[rows] @ v.T - c * row_scores
    found["dq"] = s * dscores.masked_fill(row_scores <= 0, 0) @ kappa
    column_scores = u @ kappa[rows].T  # (N, R)
    dscores = gain * dout @ v[rows].T - c * column_scores
    dk = s * dscores.masked_fill(column_scores <= 0, 0).T @ u
    found["dv"] = gain * torch.relu(column_scores).T @ dout
    if "k" in inputs:
        found["dk"] = dk
        decided &= (column_scores.abs() > KINK["pure"] * lengths[0][:, None] * lengths[1][rows]).all(0)
    else:
        found["dq"] = found["dq"] + dk
    return decided, found

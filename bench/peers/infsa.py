"""The operators of this package: tied (K = Q, the paper's) and untied; Linear as the pooled layer and as a layer per token.

"Plain" is the paper's equations in torch operations, infsa_kernels.reference, with autograd's gradients.
"""

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import infsa_kernels
from infsa_kernels import reference

from .machine import GEMM_SIZE
from .mechanism import DTYPES, Mechanism

RHO, EPS, FLOOR = 0.95, 1e-6, 0.1

# A score this small beside |u| |kappa| may have either sign in float32. Linear's central query carries the rounding of
# a sum over all tokens, Pure's scores that of one product.
KINK_LINEAR, KINK_PURE = 1e-5, 1e-6

# float64 operations that checking one case of Pure may take, beyond one head, and scores that it holds; of Linear, tokens in
# all heads that are compared.
FLOPS, BLOCK_SCORES, HEAD_TOKENS = 1e10, 1 << 21, 1 << 18


class InfSA(Mechanism):
    SOURCE, PROJECTIONS, COMPILES, BY_ROWS = "2603.00175", "qv", False, True
    OP: str  # its operator
    KEYS = ""  # "_qkv" with keys of their own: the machine's limits of that name move them too

    def keys(self, q, k):
        return k if self.KEYS else q

    def layer_flops(self) -> tuple[float, float]:
        """Operations that the layer's forward and backward pass need at least, for one picture."""
        raise NotImplementedError

    def limits(self, case, which):
        if case["level"] == "operator" and self.OP == "linear":
            return {
                move + self.KEYS: 1.0 for move in {"fwd": ("read",), "bwd": ("copy",), "train": ("read", "copy")}[which]
            }
        # Of layers with keys of their own the forward pass alone is counted.
        if case["level"] == "layer" and self.KEYS and which != "fwd":
            return {}
        return {"gemm": self.work(case, which)["flops"] / (2 * GEMM_SIZE[case["device"]] ** 3)}

    def work(self, case, which):
        if case["level"] == "layer":
            return {"flops": case["batch"] * of_pass(which, *self.layer_flops())}
        row = case["batch"] * self.dim * DTYPES[case["dtype"]].itemsize  # bytes of a token
        moved = traffic(self.OP, which, not self.KEYS, self.tokens * row, row)
        count = flops(self.OP, which, case["batch"], self.num_heads, self.tokens, self.head_dim)
        return {"bytes": moved, "flops": count}


class Untied:
    PROJECTIONS, KEYS = "qkv", "_qkv"


class Plain:
    PLAIN = COMPILES = True
    LEVELS, NOTE = ("operator",), "the equations in torch operations"

    def core(self, q, k, v):
        return self.truth(q, k, v, slice(None))


class LinearInfSA(InfSA):
    NAME, LABEL, OP, POOLED, FUSED = "linear_infsa", "Linear-InfSA", "linear", True, True
    TIME, STATE, HEADS = "N D", "2 * (d + 1)", 64
    NOTE = "the pooled layer: exact, one product of N tokens and a D x D matrix"

    def core(self, q, k, v):
        return torch.ops.infsa.linear(q, self.keys(q, k), v, EPS, RHO).unsqueeze(2)

    def truth(self, q, k, v, rows):
        return reference.linear(q, self.keys(q, k), v, RHO, EPS).unsqueeze(2)

    def undecided(self, q, k, v):
        q, k = q.double(), self.keys(q, k).double()
        energy = torch.linalg.vector_norm(q, dim=-1, keepdim=True)
        central_query = (energy * q).sum(-2, keepdim=True)  # but for its length
        return torch.nn.functional.cosine_similarity(central_query, k, dim=-1).abs() <= KINK_LINEAR

    def head_groups(self, gradients):
        chosen = drawn(self.num_heads, max(8, HEAD_TOKENS // self.tokens), self.tokens)
        return [chosen[i : i + 8] for i in range(0, len(chosen), 8)]

    def layer_flops(self):
        # The query projection, and two products of N x D and D x H; backward again, and their gradients.
        size = self.tokens * self.dim
        return size * (2 * self.dim + 4 * self.num_heads), size * (6 * self.dim + 10 * self.num_heads)

    def forward(self, x, norm: nn.LayerNorm | None = None):
        """(B, 1, D): the row that every token gets."""
        tensors = {"norm_weight": norm.weight, "norm_bias": norm.bias, "norm_eps": norm.eps} if norm is not None else {}
        if self.KEYS:
            tensors |= {"k_weight": self.k_proj.weight, "k_bias": self.k_proj.bias}
        return infsa_kernels.pooled_linear_infsa(
            x, self.num_heads, self.q_proj.weight, self.v_proj.weight, self.out_proj.weight, rho=RHO, eps=EPS,
            q_bias=self.q_proj.bias, v_bias=self.v_proj.bias, out_bias=self.out_proj.bias, **tensors,
        ).unsqueeze(1)  # fmt: skip

    def sublayer(self, x, norm):
        return x + self(x, norm)


class LinearInfSAUntied(Untied, LinearInfSA):
    NAME, LABEL = "linear_infsa_untied", "Linear-InfSA, untied"


class LinearInfSAFloor(LinearInfSA):
    NAME, LABEL, LEVELS = "linear_infsa_floor", "Linear-InfSA, floor", ("operator",)
    NOTE = f"score_floor = {FLOOR}"

    def core(self, q, k, v):
        return torch.ops.infsa.linear(q, self.keys(q, k), v, EPS, RHO, score_floor=FLOOR).unsqueeze(2)

    def truth(self, q, k, v, rows):
        return reference.linear(q, self.keys(q, k), v, RHO, EPS, score_floor=FLOOR).unsqueeze(2)


class LinearInfSAPerToken(LinearInfSA):
    NAME, LABEL, LEVELS, FUSED = "linear_infsa_per_token", "Linear-InfSA, per token", ("layer",), False
    NOTE = "the authors' order: q, v and the output projected for every token; only the operator is fused"

    def limits(self, case, which):
        return {}

    def forward(self, x):
        q, k, v = self.project(x)
        return self.finish(x, self.core(q, k, v).expand_as(v), q, v)

    def sublayer(self, x, norm):
        return Mechanism.sublayer(self, x, norm)


class LinearPlain(Plain, LinearInfSA):
    NAME, LABEL = "linear_plain", "Linear-InfSA, plain torch"


class LinearPlainUntied(Untied, LinearPlain):
    NAME, LABEL = "linear_plain_untied", "Linear-InfSA, plain torch, untied"


class PureInfSA(InfSA):
    NAME, LABEL, OP = "pure_infsa", "Pure InfSA", "pure"
    TIME, STATE, QUADRATIC = "N^2 D", "2 * N * d + 1", True

    def core(self, q, k, v):
        return torch.ops.infsa.pure(q, self.keys(q, k), v, EPS, RHO)

    def truth(self, q, k, v, rows):
        return reference.pure(q, self.keys(q, k), v, RHO, EPS)[:, :, rows]

    def results(self, q, k, v, dout, rows, gradients):
        parts = []
        for h in range(q.shape[1]):
            inputs = {n: t[0, h] for n, t in zip("qkv", (q, k, v)) if n != "k" or self.KEYS}
            decided, found = pure_rows(inputs, dout[0, h], rows, q.dtype, gradients)
            parts.append(found | {"undecided": ~decided})
        return {name: torch.stack([part[name] for part in parts])[None] for name in parts[0]}

    def undecided(self, q, k, v):
        u, kappa = (torch.nn.functional.normalize(t.double(), dim=-1) for t in (q, self.keys(q, k)))
        near = torch.cat([(u[:, h] @ kappa[:, h].mT).abs()[:, None] <= KINK_PURE for h in range(q.shape[1])], 1)
        return near.any(-1) | near.any(-2)

    def head_groups(self, gradients):
        per_head = (4 if gradients else 2) * self.tokens**2 * self.head_dim
        return [drawn(self.num_heads, max(1, int(FLOPS / per_head)), self.tokens)]

    def layer_flops(self):
        # 6 N D^2 for the three projections and 4 N^2 D forward; backward twice and two and a half times that.
        projections, products = 6 * self.tokens * self.dim**2, 4 * self.tokens**2 * self.dim
        return projections + products, 2 * projections + 2.5 * products


class PureInfSAUntied(Untied, PureInfSA):
    NAME, LABEL = "pure_infsa_untied", "Pure InfSA, untied"


class PurePlain(Plain, PureInfSA):
    NAME, LABEL = "pure_plain", "Pure InfSA, plain torch"
    NOTE = f"{Plain.NOTE}: holds N x N scores"


class PurePlainUntied(Untied, PurePlain):
    NAME, LABEL = "pure_plain_untied", "Pure InfSA, plain torch, untied"


def flops(op: str, which: str, B: int, H: int, N: int, d: int) -> int:
    """Operations of a pass by the operator's registered formula: the paper's N x N products, none saved by symmetry."""
    q, v = (torch.empty(B, H, N, d, device="meta", requires_grad=True) for _ in range(2))
    with FlopCounterMode(display=False) as counter:
        out = getattr(torch.ops.infsa, op)(q, q, v)
        fwd = counter.get_total_flops()
        torch.autograd.grad(out, [q, v], torch.empty_like(out))
    return of_pass(which, fwd, counter.get_total_flops() - fwd)


def traffic(op: str, which: str, tied: bool, tokens: int, heads: int) -> int:
    """Bytes that must move at least: every input of a pass read once, every result written once.

    Args:
        tokens, heads: bytes of a tensor of all tokens, as q, and of one row per head, as Linear's result.
    """
    out = tokens if op == "pure" else heads
    inputs = tokens * (2 if tied else 3)
    fwd = inputs + out
    # Pure's backward reads out as well as dout: its norm's gradient needs <dout, out>.
    bwd = 2 * inputs + out * (2 if op == "pure" else 1)
    return of_pass(which, fwd, bwd)


def drawn(heads: int, count: int, seed: int) -> list[int]:
    """Some of the heads, at random."""
    return torch.randperm(heads, generator=torch.Generator().manual_seed(seed))[:count].sort().values.tolist()


def of_pass(which: str, fwd: float, bwd: float) -> float:
    return {"fwd": fwd, "bwd": bwd, "train": fwd + bwd}[which]


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
    decided = (row_scores.abs() > KINK_PURE * lengths[0][rows, None] * lengths[1]).all(1)
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
        decided &= (column_scores.abs() > KINK_PURE * lengths[0][:, None] * lengths[1][rows]).all(0)
    else:
        found["dq"] = found["dq"] + dk
    return decided, found

"""The operators of this package: tied (K = Q, the paper's) and untied; Linear as the pooled layer and as a layer per token."""

import torch
from torch import nn

import infsa_kernels
from infsa_kernels import reference

from ..truth import pure_rows
from .mechanism import Mechanism

RHO, EPS = 0.95, 1e-6

# Tokens up to which float64 scores are held whole to check against.
MATERIALISED = 2048


class LinearInfSA(Mechanism):
    LABEL, SOURCE = "Linear-InfSA", "2603.00175"
    TIME, STATE, HEADS = "N D", "d + 1, twice", 64
    NOTE = "the pooled layer: exact, one product of N tokens and a D x D matrix"
    PROJECTIONS = "qv"

    def state_size(self):
        return 2 * (self.dim + self.num_heads)

    def core(self, q, k, v):
        return torch.ops.infsa.linear(q, self._keys(q, k), v, EPS, RHO).unsqueeze(2).expand_as(v)

    def truth(self, q, k, v, rows):
        return reference.linear(q, self._keys(q, k), v, RHO, EPS).unsqueeze(2).expand(-1, -1, len(rows), -1)

    def layer_flops(self, train):
        # The query projection, and two products of N x D and D x H; in training again, and their gradients.
        return self.tokens * self.dim * ((8 if train else 2) * self.dim + (14 if train else 4) * self.num_heads)

    def _keys(self, q, k):
        return k if "k" in self.PROJECTIONS else q

    def forward(self, x, norm: nn.LayerNorm | None = None):
        """(B, 1, D): the row that every token gets."""
        if norm is None:
            return self._pooled(x)
        return self._pooled(x, norm_weight=norm.weight, norm_bias=norm.bias, norm_eps=norm.eps)

    def sublayer(self, x, norm):
        return x + self(x, norm)

    def _pooled(self, x, **norm):
        keys = {"k_weight": self.k_proj.weight, "k_bias": self.k_proj.bias} if "k" in self.PROJECTIONS else {}
        return infsa_kernels.pooled_linear_infsa(
            x, self.num_heads, self.q_proj.weight, self.v_proj.weight, self.out_proj.weight,
            q_bias=self.q_proj.bias, v_bias=self.v_proj.bias, out_bias=self.out_proj.bias, rho=RHO, eps=EPS, **keys, **norm,
        ).unsqueeze(1)  # fmt: skip


class LinearInfSAUntied(LinearInfSA):
    LABEL, PROJECTIONS = "Linear-InfSA, untied", "qkv"

    def layer_flops(self, train):
        return None if train else super().layer_flops(train)


class LinearInfSAPerToken(LinearInfSA):
    LABEL = "Linear-InfSA, per token"
    NOTE = "the authors' order: q, v and the output projected for every token; only the operator is fused"

    def layer_flops(self, train):
        return None

    def forward(self, x):
        return Mechanism.forward(self, x)

    def sublayer(self, x, norm):
        return Mechanism.sublayer(self, x, norm)


class PureInfSA(Mechanism):
    LABEL, SOURCE = "Pure InfSA", "2603.00175"
    TIME, STATE, QUADRATIC = "N^2 D", "2 N d (keys and values), 1 norm", True
    PROJECTIONS = "qv"

    def state_size(self):
        return 2 * self.tokens * self.dim + self.num_heads

    def core(self, q, k, v):
        return torch.ops.infsa.pure(q, k if "k" in self.PROJECTIONS else q, v, EPS, RHO)

    def truth(self, q, k, v, rows):
        k = k if "k" in self.PROJECTIONS else q
        heads = [tuple(t[:, h : h + 1] for t in (q, k, v)) for h in range(q.shape[1])]
        if torch.is_grad_enabled() or self.tokens <= MATERIALISED or len(q) > 1:
            return torch.cat([reference.pure(*head, RHO, EPS)[:, :, rows] for head in heads], 1)
        parts = [{n: t[0, 0] for n, t in zip("qkv", head)} for head in heads]
        found = [pure_rows(part, part["v"], rows, q.dtype, gradients=False)[1]["out"] for part in parts]
        return torch.stack(found)[None]

    def layer_flops(self, train):
        # 6 N D^2 for the three projections and 4 N^2 D forward; backward twice and two and a half times that.
        projections, products = 6 * self.tokens * self.dim**2, 4 * self.tokens**2 * self.dim
        return (3 * projections + 3.5 * products) if train else projections + products


class PureInfSAUntied(PureInfSA):
    LABEL, PROJECTIONS = "Pure InfSA, untied", "qkv"

    def layer_flops(self, train):
        return None

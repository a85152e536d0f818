"""LUNA: linear attention with learned features, psi a scalar MLP 1 -> 64 -> ReLU -> L -> ReLU in float32.

phi(x) = m^(-1/2) [psi_l(w_i . x + b_i)] in R^(m L),   O = phi_q (phi_k^T v) / (phi_q sum phi_k)
"""

import torch
from torch import nn

from .mechanism import Mechanism, wide

PROJECTIONS, LEARNED, HIDDEN = 16, 8, 64


class LUNA(Mechanism):
    NAME, LABEL, SOURCE = "luna", "LUNA", "2512.08061"
    TIME, STATE = "N m L (D + 64 H)", "16 * 8 * (d + 1)"
    NOTE = "m and L are this benchmark's choice"

    def setup(self, dim, num_heads, grid):
        self.W = nn.Parameter(torch.randn(PROJECTIONS, self.head_dim) / self.head_dim**0.5)
        self.b = nn.Parameter(torch.zeros(PROJECTIONS))
        self.psi = nn.Sequential(nn.Linear(1, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, LEARNED), nn.ReLU())

    def core(self, q, k, v):
        phi_q, phi_k = self._phi(q), self._phi(k)
        context = phi_k.to(v.dtype).mT @ v
        return ((phi_q.to(v.dtype) @ context) / (phi_q @ phi_k.sum(-2)[..., None])).to(v.dtype)

    def _phi(self, x):
        p = wide(x) @ wide(self.W).mT + wide(self.b)  # (B, H, N, m)
        for layer in self.psi:
            p = (
                nn.functional.linear(p if p.shape[-1] == HIDDEN else p[..., None], wide(layer.weight), wide(layer.bias))
                if isinstance(layer, nn.Linear)
                else layer(p)
            )
        return PROJECTIONS**-0.5 * p.flatten(-2)

"""Performer (FAVOR+): softmax by random positive features, W (m, d) block-orthogonal.

    u = x d^(-1/4),   phi(x) = m^(-1/2) (exp(u W^T - ||u||^2 / 2 - c) + eps),   O = phi_q (phi_k^T v) / (phi_q sum phi_k)

c: for queries the token's largest feature, for keys the largest of all tokens, both without gradient.
"""

import math

import torch

from .mechanism import Mechanism, wide

EPS = 1e-4


class Performer(Mechanism):
    NAME, LABEL, SOURCE = "performer", "Performer", "2009.14794"
    TIME, STATE = "N m D", "int(d * log(d)) * (d + 1)"

    def setup(self, dim, num_heads, grid):
        self.features = math.floor(self.head_dim * math.log(self.head_dim))
        self.register_buffer("W", orthogonal(self.features, self.head_dim))

    def core(self, q, k, v):
        phi_q, phi_k = self._phi(q, -1), self._phi(k, (-2, -1))
        total = phi_k.sum(-2)  # (B, H, m)
        context = phi_k.to(v.dtype).mT @ v
        return ((phi_q.to(v.dtype) @ context) / (phi_q @ total[..., None])).to(v.dtype)

    def _phi(self, x, dims):
        u = wide(x) * x.shape[-1] ** -0.25
        p = u @ wide(self.W).mT
        c = p.detach().amax(dims, keepdim=True)
        return self.features**-0.5 * (torch.exp(p - u.square().sum(-1, keepdim=True) / 2 - c) + EPS)


def orthogonal(rows: int, columns: int) -> torch.Tensor:
    """Rows orthogonal in blocks of ``columns``, each as long as a normal vector."""
    blocks = [torch.linalg.qr(torch.randn(columns, columns)).Q.mT for _ in range(-(-rows // columns))]
    return torch.cat(blocks)[:rows] * torch.randn(rows, columns).norm(dim=1, keepdim=True)

"""QT-ViT: linear attention with a compact quadratic Taylor map, phi(u) = [u^2 / ||u^2||_2 ; c], c learned.

O = phi_q (phi_k^T v) / (phi_q . sum phi_k + 1e-15) + GELU(BatchNorm_d(v))
"""

import torch
import torch.nn.functional as F
from torch import nn

from .mechanism import Mechanism, flat, wide


class QTViT(Mechanism):
    NAME, LABEL, SOURCE = "qt_vit", "QT-ViT", "NeurIPS 2024"
    TIME, STATE = "N D d", "(d + 1) ** 2"
    HAS_LOCAL = True

    def setup(self, dim, num_heads, grid):
        self.constant = nn.Parameter(torch.ones(1))
        if self.local:
            self.norm = nn.BatchNorm1d(self.head_dim)

    def core(self, q, k, v):
        # The constant feature apart: its part of the sums is c^2 sum v and c^2 N.
        q, k = (F.normalize(wide(t).square(), dim=-1, eps=1e-30) for t in (q, k))
        c2 = wide(self.constant).square()
        context = k.to(v.dtype).mT @ v
        numerator = q.to(v.dtype) @ context + (c2 * wide(v).sum(-2, keepdim=True)).to(v.dtype)
        weight = q @ k.sum(-2)[..., None] + c2 * v.shape[-2] + 1e-15
        return (numerator / weight).to(v.dtype)

    def local_part(self, x, v):
        B, H, N, d = v.shape
        return flat(F.gelu(self.norm(v.reshape(-1, d))).view(B, H, N, d))

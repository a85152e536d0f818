"""SOFT: a Gaussian kernel of queries, kappa(a, b) = exp(-||a - b||^2 / 2), through landmarks on the grid; no key projection.

    q^ = q / d^(1/4),   q~ = GELU(LN(Conv_r(q^))),   O = kappa(q^, q~) pinv(kappa(q~, q~)) (kappa(q~, q^) v) + DWConv(v)

pinv: 20 Newton steps V <- 2 V - V P V on P = kappa + 0.01 I from V = 1.8 / (max_i sum_j kappa_ij)^2 P.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .mechanism import Mechanism, flat, wide

LANDMARKS = 7  # per side, at any resolution
STEPS = 20


class SOFT(Mechanism):
    NAME, LABEL, SOURCE = "soft", "SOFT", "2110.11945"
    TIME, STATE = "N m D", "49 * (49 + 2 * d)"
    HAS_LOCAL = True
    NOTE = "stride chosen so that m = 49 at every resolution"
    PROJECTIONS = "qv"

    def setup(self, dim, num_heads, grid):
        self.stride = r = max(1, min(grid) // LANDMARKS)
        self.landmarks = (grid[0] // r) * (grid[1] // r)
        self.conv = nn.Conv2d(self.head_dim, self.head_dim, r, r, bias=False)
        self.norm = nn.LayerNorm(self.head_dim)
        if self.local:
            # One filter per head, larger where the stride is.
            c = 9 if r >= 8 else 5 if r >= 4 else 3
            self.filters = nn.Conv2d(num_heads, num_heads, c, padding=c // 2, groups=num_heads, bias=False)

    def core(self, q, k, v):
        q = q * q.shape[-1] ** -0.25
        B, H, N, d = q.shape
        picture = q.reshape(B * H, N, d).mT.unflatten(-1, self.grid)
        landmarks = F.gelu(self.norm(self.conv(picture).flatten(2).mT)).unflatten(0, (B, H))  # (B, H, m, d)
        near = gaussian(q, landmarks)  # (B, H, N, m)
        inverse = newton_inverse(gaussian(landmarks, landmarks))
        context = inverse @ wide(near.to(v.dtype).mT @ v)
        return near.to(v.dtype) @ context.to(v.dtype)

    def local_part(self, x, v):
        B, H, N, d = v.shape
        pictures = v.permute(0, 3, 1, 2).reshape(B * d, H, *self.grid)
        return flat(self.filters(pictures).reshape(B, d, H, N).permute(0, 2, 3, 1))


def gaussian(a, b):
    a, b = wide(a), wide(b)
    squares = a.square().sum(-1)[..., :, None] + b.square().sum(-1)[..., None, :]
    return torch.exp(a @ b.mT - squares / 2)


def newton_inverse(kappa):
    P = kappa + 0.01 * torch.eye(kappa.shape[-1], dtype=kappa.dtype, device=kappa.device)
    V = 1.8 / kappa.sum(-1).amax(-1)[..., None, None].square() * P
    for _ in range(STEPS):
        V = 2 * V - V @ P @ V
    return V

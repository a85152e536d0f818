"""InLine: linear attention whose weights are shifted to sum to 1, which keeps it injective.

    O = s q (k^T v / N) + (1 - s q . mean k) mean v

Local: a 3x3 depthwise convolution of v whose weights come from the mean token, GConv(GELU(GConv(mean_n x))), groups = heads.
"""

import torch.nn.functional as F
from torch import nn

from .mechanism import Mechanism, flat, scale, wide


class InLine(Mechanism):
    NAME, LABEL, SOURCE = "inline", "InLine", "2412.06590"
    TIME, STATE = "N D d", "d * (d + 2)"
    HAS_LOCAL = True

    def setup(self, dim, num_heads, grid):
        if self.local:
            self.weights = nn.Sequential(
                nn.Conv1d(dim, dim, 1, groups=num_heads), nn.GELU(), nn.Conv1d(dim, 9 * dim, 1, groups=num_heads)
            )

    def core(self, q, k, v):
        q = q * scale(q)
        mean_k, mean_v = (wide(t).mean(-2, keepdim=True) for t in (k, v))
        rest = 1 - wide(q) @ mean_k.mT
        return q @ (k.mT @ (v / v.shape[-2])) + (rest * mean_v).to(v.dtype)

    def local_part(self, x, v):
        B, N, D = x.shape
        weights = self.weights(x.mean(1)[..., None]).view(B * D, 1, 3, 3)
        pictures = flat(v).mT.reshape(1, B * D, *self.grid)
        return F.conv2d(pictures, weights, padding=1, groups=B * D).view(B, D, N).mT

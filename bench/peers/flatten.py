"""FLatten: linear attention with focused features, norms over all D channels before the heads part.

t = (ReLU(x) + 1e-6) / softplus(scale),   f(t) = t^3 / ||t^3|| ||t||,   q <- f(q), k <- f(k + PE)
O = q (k^T v / N) / (q . mean_n k + 1e-6) + DWConv5x5(v)
"""

import torch
import torch.nn.functional as F
from torch import nn

from .grid_parts import depthwise, on_grid_per_head
from .mechanism import Mechanism, flat, wide


class FLatten(Mechanism):
    NAME, LABEL, SOURCE = "flatten", "FLatten", "2308.00442"
    TIME, STATE = "N D d", "d * (d + 1)"
    HAS_LOCAL = True
    NOTE = "learned positions on the keys: parameters grow with N"

    def setup(self, dim, num_heads, grid):
        self.positions = nn.Parameter(torch.zeros(1, self.tokens, dim))
        self.scale = nn.Parameter(torch.zeros(1, 1, dim))
        if self.local:
            self.dwc = depthwise(self.head_dim, 5)

    def core(self, q, k, v):
        q, k = self._focus(flat(q)), self._focus(flat(k) + self.positions)
        return normalised_linear_attention(self.heads(q), self.heads(k), v)

    def _focus(self, x):
        t = (F.relu(wide(x)) + 1e-6) / F.softplus(wide(self.scale))
        cube = t**3
        return (cube * (t.norm(dim=-1, keepdim=True) / cube.norm(dim=-1, keepdim=True))).to(x.dtype)

    def local_part(self, x, v):
        return on_grid_per_head(self.dwc, v, self.grid)


def normalised_linear_attention(q, k, v, rotated_q=None, rotated_k=None):
    """q (k^T v / N) / (q . mean_n k + 1e-6); where rotations are given, the numerator takes them."""
    context = (k if rotated_k is None else rotated_k).mT @ (v / v.shape[-2])
    weight = wide(q) @ wide(k).mean(-2)[..., None] + 1e-6
    return (((q if rotated_q is None else rotated_q) @ context) / weight).to(v.dtype)

"""MLLA (MILA): linear attention in the block of Mamba. Core: q, k = ELU + 1, rotated in the numerator.

    O = R(q) (R(k)^T v / N) / (q . mean k + 1e-6) + DWConv3x3(v)

With local parts, the block around it: positional 3x3 convolutions before and after, a convolution and SiLU on the input, a gate.
"""

import torch.nn.functional as F
from torch import nn

from .flatten import normalised_linear_attention
from .grid_parts import Rotary, depthwise, on_grid
from .mechanism import Mechanism, flat


class MLLA(Mechanism):
    NAME, LABEL, SOURCE = "mlla", "MLLA", "2405.16605"
    TIME, STATE = "N D d", "d * (d + 1)"
    HAS_LOCAL = True
    NOTE = "a block, not a layer, with its local parts: gate, convolutions; v is the projected input itself"

    def setup(self, dim, num_heads, grid):
        self.rotary = Rotary(dim, grid)
        if self.local:
            self.before, self.inner, self.values, self.after = (depthwise(dim, 3) for _ in range(4))
            self.gate = nn.Linear(dim, dim)

    def core(self, q, k, v):
        q, k = (F.elu(t) + 1 for t in (q, k))
        return normalised_linear_attention(q, k, v, *(self.heads(self.rotary(flat(t)).to(v.dtype)) for t in (q, k)))

    def forward(self, x):
        v = self.v_proj(x)
        if self.local:
            v = F.silu(on_grid(self.inner, v, self.grid))
        out = flat(self.core(self.heads(self.q_proj(v)), self.heads(self.k_proj(v)), self.heads(v)))
        if self.local:
            out = (out + on_grid(self.values, v, self.grid)) * F.silu(self.gate(x))
        return self.out_proj(out)

    def sublayer(self, x, norm):
        if not self.local:
            return super().sublayer(x, norm)
        x = x + on_grid(self.before, x, self.grid)
        x = x + self(norm(x))
        return x + on_grid(self.after, x, self.grid)

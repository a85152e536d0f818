"""RALA (RAVLT): linear attention whose keys are weighed by a global query to raise its rank, times a gate.

q, k = ELU + 1,   alpha = softmax_n(s qbar . k_n),   k_n <- N alpha_n k_n
O = W_o ((R(q) (R(k)^T v / N) / (q . mean k + 1e-6) + DWConv5x5(v)) * (W_g x))
"""

import torch.nn.functional as F
from torch import nn

from .flatten import normalised_linear_attention
from .grid_parts import Rotary, depthwise, on_grid
from .mechanism import Mechanism, flat, scale, wide


class RALA(Mechanism):
    NAME, LABEL, SOURCE = "rala", "RALA", "2411.07635"
    TIME, STATE = "N D d", "d * (d + 2)"
    HAS_LOCAL = True

    def setup(self, dim, num_heads, grid):
        self.rotary = Rotary(dim, grid)
        self.gate = nn.Linear(dim, dim)
        if self.local:
            self.lepe = depthwise(dim, 5)

    def core(self, q, k, v):
        q, k = (F.elu(t) + 1 for t in (q, k))
        mean = wide(q).mean(-2, keepdim=True)  # (B, H, 1, d)
        alpha = (scale(q) * wide(k) @ mean.mT).softmax(-2)  # (B, H, N, 1)
        k = (k.shape[-2] * alpha * k).to(v.dtype)
        return normalised_linear_attention(q, k, v, *(self.heads(self.rotary(flat(t)).to(v.dtype)) for t in (q, k)))

    def finish(self, x, out, q, v):
        out = flat(out)
        if self.local:
            out = out + on_grid(self.lepe, flat(v), self.grid)
        return self.out_proj(out * self.gate(x))

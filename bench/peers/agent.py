"""Agent attention: n agents, pooled from the queries on the grid, gather from all tokens and give back to all.

    V_a = softmax(s A k^T + B_1) v,   O = softmax(s q A^T + B_2) V_a + DWConv3x3(v)

B_1, B_2: learned, a bilinearly resized 7 x 7 map plus a row's and a column's term.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .grid_parts import depthwise, on_grid
from .mechanism import Mechanism, flat

SIDE = 7


class Agent(Mechanism):
    NAME, LABEL, SOURCE = "agent", "Agent Attention", "2312.08874"
    TIME, STATE = "N n D", "2 * 49 * d"
    HAS_LOCAL = True
    NOTE = "learned biases on rows and columns: parameters grow with the picture's side"

    def setup(self, dim, num_heads, grid):
        n, (rows, columns) = SIDE**2, grid
        self.maps, self.rows, self.columns = (
            nn.ParameterList(nn.Parameter(torch.empty(num_heads, n, *shape)) for _ in range(2))
            for shape in ((SIDE, SIDE), (rows, 1), (1, columns))
        )
        for parameter in (*self.maps, *self.rows, *self.columns):
            nn.init.trunc_normal_(parameter, std=0.02)
        if self.local:
            self.dwc = depthwise(dim, 3)

    def core(self, q, k, v):
        B, H, N, d = q.shape
        agents = F.adaptive_avg_pool2d(flat(q).mT.unflatten(-1, self.grid), SIDE).flatten(2).mT
        agents = self.heads(agents)  # (B, H, n, d)
        to_agents, from_agents = (self._bias(i).to(q.dtype) for i in range(2))  # (H, n, N)
        gathered = F.scaled_dot_product_attention(agents, k, v, attn_mask=to_agents)
        return F.scaled_dot_product_attention(q, agents, gathered, attn_mask=from_agents.mT)

    def _bias(self, i):
        resized = F.interpolate(self.maps[i], self.grid, mode="bilinear")
        return (resized + self.rows[i] + self.columns[i]).flatten(2)

    def local_part(self, x, v):
        return on_grid(self.dwc, flat(v), self.grid)

"""FRWKV's recurrence, of the kind of RWKV-7: a forecasting block, whose tokens are the variates of a series. Causal.

    kh = m_r k / ||m_r k||,   kt = k (1 + (a - 1) m_x)
    S <- S diag(w) - (S kh) (a kh)^T + v kt^T,   o = S r + 0.2 (r . kt) beta v

The block takes a rFFT over time, this recurrence on the real and on the imaginary part, and the inverse; given r, k, v, w and a,
what is measured is the recurrence alone, a token at a time, as no image block stands around it.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .mechanism import Mechanism, wide


class FRWKV(Mechanism):
    NAME, LABEL, SOURCE = "frwkv", "FRWKV (forecasting block, causal)", "2512.07539"
    TIME, STATE, CAUSAL, LEVELS = "N D d", "d * d", True, ("operator",)
    COMPILES = False
    NOTE = "its recurrence alone, token by token in plain torch; w and a as learned per channel"

    def setup(self, dim, num_heads, grid):
        shape = num_heads, self.head_dim
        self.m_r, self.m_x, self.beta = (nn.Parameter(torch.ones(shape)) for _ in range(3))
        self.w, self.a = (nn.Parameter(torch.zeros(shape)) for _ in range(2))

    def core(self, q, k, v):
        dtype = v.dtype
        r, k, v = (wide(t) for t in (q, k, v))
        m_r, m_x, beta, w, a = (
            wide(t)[:, None] for t in (self.m_r, self.m_x, self.beta, self.w.sigmoid(), self.a.sigmoid())
        )
        kh = F.normalize(m_r * k, dim=-1)
        kt = k * (1 + (a - 1) * m_x)
        # A token's state, given what the one before it forgets: S kh is a second column of the product with r.
        reads = torch.stack([r, F.pad(kh, (0, 0, 0, 1))[:, :, 1:]], -1).flatten(0, 1)  # (B H, N, d, 2)
        writes = torch.stack([a * kh, kt], -2).flatten(0, 1)  # (B H, N, 2, d)
        w = w.expand(*r.shape[:2], 1, -1).flatten(0, 1)
        S = r.new_zeros(len(w), v.shape[-1], r.shape[-1])
        erased, out = S[:, :, 0], []
        for read, write, value in zip(*(t.unbind(1) for t in (reads, writes, v.flatten(0, 1)))):
            S = torch.baddbmm(S * w, torch.stack([-erased, value], -1), write)
            found, erased = (S @ read).unbind(-1)
            out.append(found)
        bonus = 0.2 * (r * kt).sum(-1, keepdim=True) * (beta * v)
        return (torch.stack(out, 1).unflatten(0, r.shape[:2]) + bonus).to(dtype)

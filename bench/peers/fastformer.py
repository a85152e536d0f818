"""Fastformer: additive attention, a global query and then a global key; values are the queries.

    alpha = softmax_n(s w_a . q_n), gq = sum alpha q;   p = k * gq;   beta = softmax_n(s w_b . p_n), gk = sum beta p
    out = W_t (gk * q) + q

The closest structural peer of Linear-InfSA. Its core is gk * q.
"""

import torch
from torch import nn

from .mechanism import Mechanism, flat, scale, wide


class Fastformer(Mechanism):
    NAME, LABEL, SOURCE = "fastformer", "Fastformer", "2108.09084"
    TIME, STATE = "N D", "2 * d"
    PROJECTIONS = "qk"

    def setup(self, dim, num_heads, grid):
        self.w_a, self.w_b = (nn.Parameter(torch.randn(num_heads, self.head_dim, 1)) for _ in range(2))

    def project(self, x):
        q = self.heads(self.q_proj(x))
        return q, self.heads(self.k_proj(x)), q

    def core(self, q, k, v):
        # beta's scores are w_b . (k * gq) = k . (w_b * gq), and gk = gq * sum beta k: p is never formed.
        gq = _pooled(q, self.w_a)  # (B, H, d, 1)
        gk = gq * _pooled(k, self.w_b.to(gq.dtype) * gq)
        return q * gk.mT.to(q.dtype)

    def finish(self, x, out, q, v):
        return self.out_proj(flat(out)) + flat(q)


def _pooled(tokens, w):
    """sum_n softmax_n(s w . t_n) t_n: (B, H, d, 1)."""
    weights = (scale(tokens) * wide(tokens @ w.to(tokens.dtype))).softmax(-2)
    return wide(tokens.mT @ weights.to(tokens.dtype))

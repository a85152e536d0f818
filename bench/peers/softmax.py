"""Softmax attention through torch's fused kernels: O = softmax(s q k^T) v."""

import torch.nn.functional as F

from .mechanism import Mechanism


class Softmax(Mechanism):
    LABEL, SOURCE = "Softmax (SDPA)", "1706.03762"
    TIME, STATE, QUADRATIC = "N^2 D", "2 N d (keys and values)", True

    def state_size(self):
        return 2 * self.tokens * self.dim

    def core(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)

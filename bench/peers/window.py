"""Softmax within a sliding window, InfiniteVL's other half beside Gated DeltaNet. Causal: a token sees itself and w - 1 before.

O_i = softmax_{i - w < j <= i} (s q_i . k_j) v_j, a block of w queries at a time, which sees its own and the previous block.
"""

import torch
import torch.nn.functional as F

from .mechanism import Mechanism

WIDTH = 512


class Window(Mechanism):
    NAME, LABEL, SOURCE = "window", "Softmax in a window (causal)", "2512.08829"
    TIME, STATE, CAUSAL = "N w D", "2 * 512 * d", True
    NOTE = "w is this benchmark's choice"

    def core(self, q, k, v):
        N = q.shape[2]
        w = min(WIDTH, N)
        blocks = -(-N // w)
        q, k, v = (F.pad(t, (0, 0, 0, blocks * w - N)) for t in (q, k, v))
        q = q.unflatten(2, (blocks, w))  # (B, H, blocks, w, d)
        k, v = (F.pad(t, (0, 0, w, 0)).unfold(2, 2 * w, w).mT for t in (k, v))  # (B, H, blocks, 2 w, d)
        i, j = torch.arange(w, device=q.device)[:, None], torch.arange(-w, w, device=q.device)
        first = torch.arange(blocks, device=q.device)[:, None, None] == 0  # has no block before it
        mask = (j <= i) & (j > i - w) & ((j >= 0) | ~first)  # (blocks, w, 2 w)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).flatten(2, 3)[:, :, :N]

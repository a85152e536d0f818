"""Nystromformer: softmax attention through m landmarks, the means of segments of the sequence.

    F1 = sm(s q k~^T), A = sm(s q~ k~^T), F3 = sm(s q~ k^T),   O = F1 Z (F3 v) + Conv33x1(v),   Z ~ pinv(A)

Z: 6 steps Z <- Z (13 I - A Z (15 I - A Z (7 I - A Z))) / 4 from A^T / (||A||_1 ||A||_inf).
"""

import torch
import torch.nn.functional as F
from torch import nn

from .mechanism import Mechanism, flat, scale, wide

LANDMARKS, STEPS, KERNEL = 64, 6, 33


class Nystromformer(Mechanism):
    NAME, LABEL, SOURCE = "nystromformer", "Nyströmformer", "2102.03902"
    TIME, STATE = "N m D", "min(64, N) * (min(64, N) + 2 * d)"
    HAS_LOCAL = True
    NOTE = "where m does not divide N, segments overlap"

    def setup(self, dim, num_heads, grid):
        self.landmarks = min(LANDMARKS, self.tokens)
        if self.local:
            self.conv = nn.Conv2d(
                num_heads, num_heads, (KERNEL, 1), padding=(KERNEL // 2, 0), groups=num_heads, bias=False
            )

    def core(self, q, k, v):
        q_marks, k_marks = (self.heads(F.adaptive_avg_pool1d(flat(t).mT, self.landmarks).mT) for t in (q, k))
        A = (scale(q) * wide(q_marks) @ wide(k_marks).mT).softmax(-1)
        context = pseudo_inverse(A) @ wide(F.scaled_dot_product_attention(q_marks, k, v))
        return F.scaled_dot_product_attention(q, k_marks, context.to(v.dtype))

    def local_part(self, x, v):
        return flat(self.conv(v))


def pseudo_inverse(A):
    one = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    Z = A.mT / (A.sum(-2).amax(-1) * A.sum(-1).amax(-1))[..., None, None]
    for _ in range(STEPS):
        AZ = A @ Z
        Z = Z @ (13 * one - AZ @ (15 * one - AZ @ (7 * one - AZ))) / 4
    return Z

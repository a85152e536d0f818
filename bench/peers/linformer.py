"""Linformer: keys and values projected along the tokens, K' = E^T k and V' = G^T v with E, G (N, k) shared by the heads.

O = softmax(s q K'^T) V'
"""

import torch
import torch.nn.functional as F
from torch import nn

from .mechanism import Mechanism, flat

LENGTH = 256


class Linformer(Mechanism):
    NAME, LABEL, SOURCE = "linformer", "Linformer", "2006.04768"
    TIME, STATE = "N k D", "2 * 256 * d"
    NOTE = "parameters grow with N: a model is bound to its resolution"
    PROJECTION_BIAS = False

    def setup(self, dim, num_heads, grid):
        self.E, self.G = (nn.Parameter(torch.empty(self.tokens, LENGTH)) for _ in range(2))
        for matrix in (self.E, self.G):
            nn.init.uniform_(matrix, -(LENGTH**-0.5), LENGTH**-0.5)

    def core(self, q, k, v):
        keys, values = (self.heads(matrix.mT @ flat(t)) for matrix, t in ((self.E, k), (self.G, v)))
        return F.scaled_dot_product_attention(q, keys, values)

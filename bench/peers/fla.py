"""Gated DeltaNet and simple linear attention through flash-linear-attention, where it is installed. Both are causal.

S <- e^g S,  S += k (beta (v - S^T k))^T,  o = S^T q          O_i = sum_{j <= i} (q_i . k_j) v_j
"""

import importlib.util

import torch
import torch.nn.functional as F
from torch import nn

from .mechanism import Mechanism, scale


class Fla(Mechanism):
    TIME, STATE, CAUSAL = "N D d", "d^2", True

    @classmethod
    def unavailable(cls, device):
        if device.type != "cuda":
            return "flash-linear-attention's kernels need a GPU"
        return None if importlib.util.find_spec("fla") else "flash-linear-attention is not installed"

    def state_size(self):
        return self.dim * self.head_dim


class GatedDeltaNet(Fla):
    LABEL, SOURCE = "Gated DeltaNet (causal)", "2412.06464"
    NOTE = "beta and g as learned per head, the short convolution left out"

    def __init__(self, dim, num_heads, grid, local=False):
        super().__init__(dim, num_heads, grid, local)
        self.beta, self.g = (nn.Parameter(torch.zeros(num_heads)) for _ in range(2))

    def core(self, q, k, v):
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        tokens = [
            t.transpose(1, 2).contiguous() for t in (q, F.normalize(k.float(), dim=-1).to(k.dtype), v)
        ]  # (B, N, H, d)
        beta = self.beta.sigmoid().to(q.dtype).expand(tokens[0].shape[:3]).contiguous()
        g = F.logsigmoid(self.g.float()).expand(tokens[0].shape[:3]).contiguous()
        return chunk_gated_delta_rule(*tokens, g=g, beta=beta, scale=scale(q))[0].transpose(1, 2)

    def truth(self, q, k, v, rows):
        q, k = q * scale(q), F.normalize(k, dim=-1)
        beta, decay = self.beta.sigmoid(), self.g.sigmoid()
        S, out = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1]), torch.empty_like(v)
        for n in range(q.shape[2]):
            S = decay[:, None, None] * S
            error = beta[:, None] * (v[:, :, n] - torch.einsum("bhk,bhkv->bhv", k[:, :, n], S))
            S = S + k[:, :, n, :, None] * error[..., None, :]
            out[:, :, n] = torch.einsum("bhk,bhkv->bhv", q[:, :, n], S)
        return out[:, :, rows]


class SimpleLinear(Fla):
    LABEL, SOURCE = "Linear attention (causal)", "2006.16236"
    NOTE = "no feature map, no normaliser"

    def core(self, q, k, v):
        from fla.ops.linear_attn import chunk_linear_attn

        tokens = [t.transpose(1, 2).contiguous() for t in (q, k, v)]
        return chunk_linear_attn(*tokens, scale=scale(q), normalize=False)[0].transpose(1, 2)

    def truth(self, q, k, v, rows):
        states = torch.cumsum(k[..., :, None] * v[..., None, :], 2)[:, :, rows]
        return scale(q) * torch.einsum("bhnk,bhnkv->bhnv", q[:, :, rows], states)

"""Gated DeltaNet, InfiniteVL's long-range half: a state that decays and is corrected by the delta rule. Causal.

S <- e^g S,   S += k (beta (v - S^T k))^T,   o = s S^T q,   |k| = 1

In chunks of C tokens, with A_ij = beta_i e^(G_i - G_j) k_i . k_j below the diagonal and G = cumsum g within the chunk:

    (I + A) U = beta (V - e^G K S),   O = s (e^G Q S + (e^(G_i - G_j) q_i . k_j)_{j <= i} U)
    S <- e^(G_C) S + (e^(G_C - G) K)^T U

"fla": the same by flash-linear-attention's kernels.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .mechanism import Mechanism, scale, wide

CHUNK = 64


class GatedDeltaNet(Mechanism):
    NAME, LABEL, SOURCE = "gated_deltanet", "Gated DeltaNet (causal)", "2412.06464"
    TIME, STATE, CAUSAL = "N D (d + C)", "d * d", True
    NOTE = "plain torch in chunks of 64; beta and g as learned per head, the short convolution left out"

    def setup(self, dim, num_heads, grid):
        self.beta, self.g = (nn.Parameter(torch.zeros(num_heads)) for _ in range(2))

    def core(self, q, k, v):
        dtype, N = v.dtype, q.shape[2]
        q, k, v = wide(q) * scale(q), F.normalize(wide(k), dim=-1), wide(v)
        q, k, v = (F.pad(t, (0, 0, 0, -N % CHUNK)).unflatten(2, (-1, CHUNK)) for t in (q, k, v))  # (B, H, chunks, C, d)
        beta, g = wide(self.beta).sigmoid()[:, None, None, None], F.logsigmoid(wide(self.g))
        decay = g[:, None] * torch.arange(1, CHUNK + 1, device=q.device)  # G: (H, C)
        between = (decay[:, :, None] - decay[:, None]).tril().exp().tril()[:, None]  # (H, 1, C, C)
        decay, last = decay.exp()[:, None, :, None], decay[:, -1:, None].exp()
        A = torch.eye(CHUNK, dtype=q.dtype, device=q.device) + beta * (between * (k @ k.mT)).tril(-1)
        # Both right-hand sides that do not need the state, for all chunks at once.
        U, W = torch.linalg.solve_triangular(
            A, torch.cat([beta * v, beta * decay * k], -1), upper=False, unitriangular=True
        ).split([v.shape[-1], k.shape[-1]], -1)
        inside, q, k = between * (q @ k.mT), decay * q, between[..., -1:, :].mT * k
        S, out = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1]), []
        for c in range(q.shape[2]):
            u = U[:, :, c] - W[:, :, c] @ S
            out.append(q[:, :, c] @ S + inside[:, :, c] @ u)
            S = last * S + k[:, :, c].mT @ u
        return torch.cat(out, 2)[:, :, :N].to(dtype)


class GatedDeltaNetFla(GatedDeltaNet):
    COMPILES = False
    NAME, LABEL = "gated_deltanet_fla", "Gated DeltaNet (causal, fla)"
    NOTE = "flash-linear-attention's kernels"
    NEEDS = "fla", "flash-linear-attention"

    def core(self, q, k, v):
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        tokens = [t.transpose(1, 2).contiguous() for t in (q, F.normalize(k.float(), dim=-1).to(k.dtype), v)]
        beta = self.beta.sigmoid().to(q.dtype).expand(tokens[0].shape[:3]).contiguous()
        g = F.logsigmoid(self.g.float()).expand(tokens[0].shape[:3]).contiguous()
        return chunk_gated_delta_rule(*tokens, g=g, beta=beta, scale=scale(q))[0].transpose(1, 2)

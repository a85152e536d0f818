"""Linear attention: causal as a sum of outer products, and bidirectional with ELU + 1 and a normaliser.

    O_i = s sum_{j <= i} (q_i . k_j) v_j            O = phi_q (phi_k^T v / N) / (phi_q . mean phi_k + 1e-6),  phi = ELU + 1

"fla", "flash_bla": the same by the kernels of flash-linear-attention and flash-bidirectional-linear-attention.
"""

import torch.nn.functional as F

from .flatten import normalised_linear_attention
from .mechanism import Mechanism, scale, wide

CHUNK = 128


class SimpleLinear(Mechanism):
    NAME, LABEL, SOURCE = "simple_linear", "Linear attention (causal)", "2006.16236"
    TIME, STATE, CAUSAL = "N D (d + C)", "d * d", True
    NOTE = "plain torch in chunks of 128; no feature map, no normaliser"

    def core(self, q, k, v):
        dtype, N = v.dtype, q.shape[2]
        q, k, v = (F.pad(t, (0, 0, 0, -N % CHUNK)).unflatten(2, (-1, CHUNK)) for t in (scale(q) * q, k, v))
        states = wide(k.mT @ v).cumsum(2)  # after each chunk
        before = F.pad(states, (0, 0, 0, 0, 1, 0))[:, :, :-1].to(dtype)
        return (q @ before + (q @ k.mT).tril() @ v).flatten(2, 3)[:, :, :N]


class SimpleLinearFla(SimpleLinear):
    COMPILES = False
    NAME, LABEL, NOTE = "simple_linear_fla", "Linear attention (causal, fla)", "flash-linear-attention's kernels"
    NEEDS = "fla", "flash-linear-attention"

    def core(self, q, k, v):
        from fla.ops.linear_attn import chunk_linear_attn

        tokens = [t.transpose(1, 2).contiguous() for t in (q, k, v)]
        return chunk_linear_attn(*tokens, scale=scale(q), normalize=False)[0].transpose(1, 2)


class Bidirectional(Mechanism):
    NAME, LABEL, SOURCE = "linear_attention", "Linear attention", "2006.16236"
    TIME, STATE = "N D d", "d * (d + 1)"

    def core(self, q, k, v):
        return normalised_linear_attention(F.elu(q) + 1, F.elu(k) + 1, v)


class BidirectionalFlash(Bidirectional):
    COMPILES = False
    NAME, LABEL = "linear_attention_flash", "Linear attention (flash_bla)"
    NOTE = "the kernels of flash-bidirectional-linear-attention"
    NEEDS = "flash_bla", "flash-bidirectional-linear-attention"

    def core(self, q, k, v):
        from flash_bla.ops.linear_attn.fused import linear_attention

        return linear_attention(F.elu(q) + 1, F.elu(k) + 1, v, eps=1e-6)

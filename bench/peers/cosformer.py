"""cosFormer: linear attention with ReLU features, weighed by cos(theta_i - theta_j), theta_i = pi i / (2 N).

Q' = [q sin, q cos], K' likewise,   O = Q' (K'^T v) / max(Q' sum K', 1e-6)
"""

import math

import torch
import torch.nn.functional as F

from .mechanism import Mechanism, wide


class CosFormer(Mechanism):
    NAME, LABEL, SOURCE = "cosformer", "cosFormer", "2202.08791"
    TIME, STATE = "N D d", "2 * d * (d + 1)"

    def core(self, q, k, v):
        N = q.shape[-2]
        theta = math.pi / (2 * N) * torch.arange(1, N + 1, device=q.device, dtype=wide(q).dtype)[:, None]
        weights = theta.sin().to(q.dtype), theta.cos().to(q.dtype)
        q, k = (torch.cat([F.relu(t) * w for w in weights], -1) for t in (q, k))
        weight = wide(q) @ wide(k).sum(-2)[..., None]
        return ((q @ (k.mT @ v)) / weight.clamp_min(1e-6)).to(v.dtype)

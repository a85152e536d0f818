"""The scaffold of the model level: InfViT with any mechanism in the place of its attention, pooled by the mean of its tokens.

No class token: half of the mechanisms need tokens on a grid.
"""

from torch import nn

from infsa_kernels.nn.vit import Block, InfViT

from . import peers
from .image import PATCH, D

# The paper's two depths, with the heads that its Linear-InfSA has there.
HEADS = {4: 64, 24: 16}


class PeerBlock(Block):
    """A block whose attention is a mechanism."""

    def __init__(self, mechanism: peers.Mechanism):
        super().__init__(mechanism.dim, mechanism.num_heads, 4.0, "softmax")
        self.attn = mechanism

    def _attend(self, x, first_only):
        return self.attn(self.norm1(x))


def model(name: str, depth: int, pixels: int, dim: int = D) -> InfViT:
    """4 or 24 layers of a mechanism for pictures of a size; its head starts at random, so that outputs can be compared."""
    if name in ("linear_infsa", "pure_infsa"):
        heads = max(1, (HEADS[depth] if name == "linear_infsa" else 16) * dim // D)
        net = InfViT(pixels, depth=depth, embed_dim=dim, num_heads=heads, variant=name, tied=True, pool="mean")
    else:
        net = InfViT(pixels, depth=0, embed_dim=dim, variant="softmax", pool="mean")
        grid = (pixels // PATCH,) * 2
        net.blocks = nn.ModuleList(PeerBlock(peers.build(name, dim, grid)) for _ in range(depth))
    nn.init.normal_(net.head.weight, std=dim**-0.5)
    return net

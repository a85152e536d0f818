"""`InfViT`: a pre-LN Vision Transformer whose layers mix tokens by InfSA, at any resolution.

    x <- x + Attention(LN(x)),   x <- x + MLP(LN(x))

Without gradients, tokens go through patch embedding and MLP in chunks: beyond the picture, memory is a layer's input and output,
two N x D tensors (linear variant), never one of N x 4D. Neither is ever written to once somebody has seen it.

A recorded graph (torch.compile, torch.export, torch.jit.trace, torch.fx) is one for all sizes, and takes all tokens at once.
"""

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy
from torch.utils.checkpoint import checkpoint

from ..distributed import tokens as shards
from .attention import InfSAAttention
from .checks import integer, number
from .functional import check_activation, check_score_floor
from .fx import Leaf
from .neumann import NeumannSum
from .patches import PatchEmbed, resized_positions, whole_patches
from .plain import is_plain
from .state import demand_same_keys

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Tokens that patch embedding and MLP take at a time without gradients: enough to fill a GPU with matrix products.
CHUNK_TOKENS = 4096

# The paper's sizes of a head.
HEAD_DIM = {"linear_infsa": 16, "pure_infsa": 64, "multi_hop_infsa": 64, "softmax": 64}


class InfViT(nn.Module):
    """Vision Transformer over InfSA, or over softmax attention as its twin for comparison.

    Args:
        img_size: side or (height, width) in pixels for which positions are learned; pictures may have any other.
        patch_size: side of a patch in pixels.
        in_chans: channels of a picture.
        num_classes: size of the output; 0 for the pooled features themselves.
        embed_dim: size D of a token.
        depth: number of layers.
        num_heads: heads of a layer (default: of size 16 if linear, else 64).
        mlp_ratio: hidden size of the MLP over D.
        variant: "linear_infsa", "pure_infsa", "multi_hop_infsa" or "softmax" (scaled_dot_product_attention).
        tied: whether keys share the projection of the queries (the paper's symmetric operator). Default: as the paper has it,
            True for linear_infsa and False else.
        pool: "cls", an extra token that the head reads, or "mean" over all tokens and no extra one.
        pos_embed: whether positions are learned. They are resized bicubically to the picture's patches.
        neumann: None, or "layer" or "head": the attention's outputs of all layers, discounted (:class:`NeumannSum`), join the
            last layer's tokens.
        hops, rho_init, rho_trainable, rho_per_head, score_floor, activation: as in :class:`InfSAAttention`.

    Raises:
        ValueError: an argument out of range. TypeError: one of another type. NotImplementedError: another activation than ReLU
        with a variant that has none.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 1024,
        depth: int = 4,
        num_heads: int | None = None,
        mlp_ratio: float = 4.0,
        *,
        variant: str = "linear_infsa",
        tied: bool | None = None,
        pool: str = "cls",
        pos_embed: bool = True,
        neumann: str | None = None,
        hops: int | None = None,
        rho_init: float = 0.95,
        rho_trainable: bool = True,
        rho_per_head: bool = False,
        score_floor: float = 0.0,
        activation: str = "relu",
        device=None,
        dtype=None,
    ):
        super().__init__()
        _one_of("variant", variant, HEAD_DIM)
        _one_of("pool", pool, ("cls", "mean"))
        _one_of("neumann", neumann, (None, "layer", "head"))
        if variant == "softmax" and tied:
            raise ValueError(
                "InfViT: tied is True, expected False with variant='softmax': its keys have their own projection"
            )
        if variant == "softmax" and hops is not None:
            raise ValueError(f"InfViT: hops is {hops!r}, expected None with variant='softmax', which has one")
        check_score_floor("InfViT", variant, score_floor)
        check_activation("InfViT", variant, activation)
        height, width = (img_size, img_size) if not isinstance(img_size, (tuple, list)) else img_size
        for name, size in (("img_size", height), ("img_size", width), ("patch_size", patch_size), ("in_chans", in_chans),
                           ("embed_dim", embed_dim), ("num_heads", 1 if num_heads is None else num_heads)):  # fmt: skip
            integer("InfViT", name, size)
        for name, size in (("num_classes", num_classes), ("depth", depth)):
            integer("InfViT", name, size, at_least=0)
        number("InfViT", "mlp_ratio", mlp_ratio)
        if height % patch_size or width % patch_size:
            raise ValueError(f"InfViT: img_size is {img_size}, expected a multiple of patch_size = {patch_size}")
        self.variant, self.pool, self.patch_size, self.embed_dim = variant, pool, patch_size, embed_dim
        self.num_heads = num_heads or max(1, embed_dim // HEAD_DIM[variant])
        self.grid = height // patch_size, width // patch_size
        self.grad_checkpointing = False
        # The ranks that have the other strips of a picture: infsa_kernels.distributed.parallelize.
        self.sequence_group: str | None = None

        factory = {"device": device, "dtype": dtype}
        tied = variant == "linear_infsa" if tied is None else tied
        infsa = dict(tied=tied, hops=hops, rho_init=rho_init, rho_trainable=rho_trainable, rho_per_head=rho_per_head)
        infsa |= dict(score_floor=score_floor, activation=activation)
        self.patch_embed = PatchEmbed(in_chans, embed_dim, patch_size, patch_size, **factory)
        extra = int(pool == "cls")
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim, **factory)) if extra else None
        positions = extra + math.prod(self.grid)
        self.pos_embed = nn.Parameter(torch.empty(1, positions, embed_dim, **factory)) if pos_embed else None
        self.blocks = nn.ModuleList(
            Block(embed_dim, self.num_heads, mlp_ratio, variant, **infsa, **factory) for _ in range(depth)
        )
        heads = self.num_heads if neumann == "head" else None
        self.neumann = NeumannSum(depth, heads, **factory) if neumann else None
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6, **factory)
        self.head = nn.Linear(embed_dim, num_classes, **factory) if num_classes else nn.Identity()
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initial values, of all parts: what a model made on the meta device needs after ``to_empty``."""
        # As torchvision's ViT: patches by fan-in, small positions, a head that starts at 0.
        self.patch_embed.reset_parameters()
        if self.cls_token is not None:
            nn.init.zeros_(self.cls_token)
        if self.pos_embed is not None:
            nn.init.normal_(self.pos_embed, std=0.02)
        for block in self.blocks:
            for part in block.children():
                part.reset_parameters()
        if self.neumann is not None:
            self.neumann.reset_parameters()
        self.norm.reset_parameters()
        if isinstance(self.head, nn.Linear):
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):
        """As nn.Module's; strict, a checkpoint that is tied where the model is not, or the other way round, says so."""
        demand_same_keys(self, state_dict, strict)
        return super().load_state_dict(state_dict, strict, assign)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether training keeps only the input of every block and computes the rest again in the backward pass."""
        self.grad_checkpointing = enable

    def forward(self, images: Tensor) -> Tensor:
        """Class scores (B, num_classes) of images (B, in_chans, height, width).

        Sides that are no multiple of the patch size are padded with zeros, at the right and at the bottom. Parallelized, images
        are this rank's strips, whole rows of patches, and the class scores those of the whole pictures, on every rank.
        """
        if self.pool == "cls":
            # Nothing reads the other tokens of the last layer: they are not computed.
            first = self._tokens(images, cls_only=True)
            if self.sequence_group is not None:
                first = shards.first_of(first, self.sequence_group)
            return self.head(self.norm(first)[:, 0])
        tokens = self.norm(self._tokens(images))
        mean = tokens.mean(1) if self.sequence_group is None else shards.mean_of(tokens, self.sequence_group)
        return self.head(mean)

    def forward_features(self, images: Tensor) -> Tensor:
        """All tokens after the last norm: (B, N, D), the extra one of pool="cls" first. Parallelized, this rank's."""
        return self.norm(self._tokens(images))

    def predict_file(
        self,
        path: str | os.PathLike[str],
        *,
        work_dir: str | os.PathLike[str] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        attention_map: str | os.PathLike[str] | None = None,
        map_layer: int = -1,
        chunk_tokens: int | None = None,
        group: "ProcessGroup | None" = None,
        progress: bool = True,
    ) -> Tensor:
        """Class scores (1, num_classes) of the picture in a file: read in strips, its tokens in a file too (docs/streaming.md).

        Linear-InfSA only, without gradients. The picture is uint8 or uint16, brought to [0, 1], or float32, taken as it is.

        Args:
            path: a .npy file, TIFF, OME-TIFF, Zarr or OME-Zarr: (height, width, in_chans) or (in_chans, height, width).
            work_dir: folder for the tokens and the state. A run that was interrupted goes on when it is called again with the
                same arguments. None: tokens stay in memory, pinned or on the GPU, and nothing can be resumed.
            mean, std: per channel; (picture - mean) / std is what the model gets.
            attention_map: a file, written as a tiled TIFF: the weight that the layer gives to each patch, mean over the heads.
            map_layer: index of its layer; -1 is the last.
            chunk_tokens: tokens that are worked on at a time, whole rows of patches (default: 4096, on a GPU 32768).
            group: processes that share the picture, each with rows of its own; default: this process alone.
            progress: whether a bar shows how far it is and how long it will take.

        Raises:
            NotImplementedError: another variant; adapters or hooks on attention; autocast. ValueError: a file that is cut off,
            corrupt, of another dtype or number of channels; a state of another run. OSError: the disk is too small.
            MemoryError: the memory is. ImportError: the file's format needs a package.
        """
        from ..streaming import predict_file

        arguments = dict(
            mean=mean, std=std, attention_map=attention_map, map_layer=map_layer, chunk_tokens=chunk_tokens
        )
        return predict_file(self, path, work_dir=work_dir, group=group, progress=progress, **arguments).scores

    def _tokens(self, images: Tensor, cls_only: bool = False) -> Tensor:
        """Tokens before the last norm: (B, N, D), or (B, 1, D) if ``cls_only``."""
        x = self._embed(images)

        def attentions():
            nonlocal x
            for block in self.blocks:
                first_only = cls_only and block is self.blocks[-1]
                if self.grad_checkpointing and torch.is_grad_enabled():
                    x, attention = checkpoint(block, x, first_only, use_reentrant=False)
                else:
                    x, attention = block(x, first_only)
                yield attention[:, :1] if cls_only else attention

        if self.neumann is not None:
            # A layer at a time: the sum never holds the outputs of two.
            total = self.neumann(attentions())
            return x + total
        for _ in attentions():
            pass
        return x

    def _embed(self, images: Tensor) -> Tensor:
        """Images as tokens with their positions, (B, N, D)."""
        p, given_height = self.patch_size, images.shape[2]
        images = whole_patches(images, self.patch_embed.in_channels, p)
        B, rows, columns = images.shape[0], images.shape[2] // p, images.shape[3] // p
        grid, above, has_first = (rows, columns), 0, True
        if self.sequence_group is not None:
            total, above, has_first = shards.place_of_strip(
                rows, columns, given_height % p, self.sequence_group, images.device
            )
            grid = total, columns
        first = self._first_token(images)
        if not has_first:
            first = first[:, :0]
        if _all_at_once(images) or B * rows * columns <= CHUNK_TOKENS:
            patches = self._patches(images, grid, slice(above, above + rows))
            return torch.cat([first.to(patches.dtype), patches], 1)
        x, end = None, first.shape[1]
        step = max(1, CHUNK_TOKENS // (B * columns))
        for row in range(0, rows, step):
            strip = slice(above + row, above + min(row + step, rows))
            patches = self._patches(images[:, :, row * p : (row + step) * p], grid, strip)
            if x is None:
                x = patches.new_empty(B, end + rows * columns, self.embed_dim)
                x[:, :end] = first
            x[:, end : end + patches.shape[1]] = patches
            end += patches.shape[1]
        return x

    def _patches(self, images: Tensor, grid: tuple[int, int], rows: slice) -> Tensor:
        """The tokens of some rows of patches, (B, rows * columns, D), from those rows of the images."""
        patches = self.patch_embed(images)
        if self.pos_embed is None:
            return patches
        learned = self.pos_embed[0, int(self.cls_token is not None) :].unflatten(0, self.grid)
        return patches + resized_positions(learned, self.grid, grid, rows)

    def _first_token(self, images: Tensor) -> Tensor:
        """The token before the patches, (B, 1, D), or (B, 0, D) if there is none."""
        if self.cls_token is None:
            return images.new_empty(images.shape[0], 0, self.embed_dim)
        token = self.cls_token if self.pos_embed is None else self.cls_token + self.pos_embed[:, :1]
        return token.expand(images.shape[0], -1, -1)


class Block(nn.Module):
    """One pre-LN layer of :class:`InfViT`."""

    def __init__(self, embed_dim, num_heads, mlp_ratio, variant, device=None, dtype=None, **infsa):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.norm1 = nn.LayerNorm(embed_dim, eps=1e-6, **factory)
        if variant == "softmax":
            self.attn = SoftmaxAttention(embed_dim, num_heads, **factory)
        else:
            self.attn = InfSAAttention(embed_dim, num_heads, batch_first=True, variant=variant, **infsa, **factory)
        self.norm2 = nn.LayerNorm(embed_dim, eps=1e-6, **factory)
        self.mlp = Mlp(embed_dim, int(embed_dim * mlp_ratio), **factory)

    def forward(self, x: Tensor, first_only: bool = False) -> tuple[Tensor, Tensor]:
        """The layer's tokens (B, N, D), or the first only, and what its attention added to them."""
        attention = self._attend(x, first_only)
        if first_only:
            x = x[:, :1]
        if _all_at_once(x) or x.shape[0] * x.shape[1] <= CHUNK_TOKENS:
            return self._add_mlp(x + attention), attention
        # Hooks, here and on the parts, may keep whatever they see: x and every chunk stay as they are.
        out, step = None, max(1, CHUNK_TOKENS // x.shape[0])
        for tokens in (slice(begin, begin + step) for begin in range(0, x.shape[1], step)):
            chunk = self._add_mlp(x[:, tokens] + attention[:, tokens])
            out = chunk.new_empty(x.shape) if out is None else out
            out[:, tokens] = chunk
        return out, attention

    def _add_mlp(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm2(x))

    def _attend(self, x: Tensor, first_only: bool) -> Tensor:
        if isinstance(self.attn, SoftmaxAttention):
            return self.attn(self.norm1(x), queries=1 if first_only else None)
        norm = self.norm1
        if isinstance(x, Proxy) or not is_plain(norm, nn.LayerNorm, x.device):
            # Called here, not handed over: what tools hook onto attn may move or look into its arguments, and torch.fx has no
            # node for a module that is one.
            x, norm = norm(x), None
        attention = self.attn(x, norm=norm, expanded=True)[0]
        return attention[:, :1] if first_only else attention


class Mlp(Leaf, nn.Module):
    def __init__(self, embed_dim, hidden, device=None, dtype=None):
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, hidden, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden, embed_dim, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        for layer in (self.fc1, self.fc2):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return _project(F.gelu(_project(x, self.fc1)), self.fc2)


class SoftmaxAttention(nn.Module):
    """The twin of InfSAAttention: the same parameters but rho, through scaled_dot_product_attention."""

    def __init__(self, embed_dim, num_heads, device=None, dtype=None):
        super().__init__()
        self.num_heads = num_heads
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(self, name, nn.Linear(embed_dim, embed_dim, device=device, dtype=dtype))

        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The initial values of nn.MultiheadAttention."""
        self.out_proj.reset_parameters()
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.xavier_uniform_(projection.weight, math.sqrt(0.5))
        for projection in self.children():
            nn.init.zeros_(projection.bias)

    def forward(self, x: Tensor, queries: int | None = None) -> Tensor:
        """Attention of the first ``queries`` tokens of x (B, N, D), or of all, to all."""
        q, k, v = self.q_proj(x[:, :queries]), self.k_proj(x), self.v_proj(x)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def _project(x: Tensor, layer: nn.Linear) -> Tensor:
    """``layer(x)``. Inference on a CPU in float32 makes it a convolution of single pixels, as which torch leaves it to oneDNN.

    nn.Linear is MKL's there, on AMD's processors at half the speed.
    """
    if (
        x.device.type != "cpu"
        or x.dtype != torch.float32
        or x.numel() == 0
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or not is_plain(layer, nn.Linear, x.device)
    ):
        return layer(x)
    row_of_pixels = x.flatten(0, -2)[None].mT.unsqueeze(-2)
    out = F.conv2d(row_of_pixels, layer.weight[:, :, None, None], layer.bias)
    return out.squeeze(-2).mT.contiguous().view(*x.shape[:-1], -1)


def _all_at_once(x: Tensor) -> bool:
    """Whether tokens must not go in chunks: for gradients they are kept anyway, and a recorded graph is for any number."""
    recorded = torch.compiler.is_compiling() or torch.jit.is_tracing() or isinstance(x, Proxy)
    return torch.is_grad_enabled() or recorded


def _one_of(name: str, value, expected) -> None:
    if value not in expected:
        raise ValueError(f"InfViT: {name} is {value!r}, expected {' or '.join(map(repr, expected))}")


def infvit_linear_4l(**kwargs) -> InfViT:
    """4 layers of Linear-InfSA, D = 1024, 64 heads. Arguments of :class:`InfViT` replace any of these."""
    return InfViT(**{"variant": "linear_infsa", "depth": 4} | kwargs)


def infvit_pure_4l(**kwargs) -> InfViT:
    """4 layers of Pure InfSA, D = 1024, 16 heads."""
    return InfViT(**{"variant": "pure_infsa", "depth": 4} | kwargs)


def infvit_softmax_4l(**kwargs) -> InfViT:
    """The softmax twin of the 4-layer models: D = 1024, 16 heads."""
    return InfViT(**{"variant": "softmax", "depth": 4} | kwargs)


def infvit_linear_24l(**kwargs) -> InfViT:
    """24 layers of Linear-InfSA, D = 1024, 64 heads."""
    return InfViT(**{"variant": "linear_infsa", "depth": 24} | kwargs)


def infvit_pure_24l(**kwargs) -> InfViT:
    """24 layers of Pure InfSA, D = 1024, 16 heads."""
    return InfViT(**{"variant": "pure_infsa", "depth": 24} | kwargs)


def infvit_softmax_24l(**kwargs) -> InfViT:
    """The softmax twin of the 24-layer models: D = 1024, 16 heads."""
    return InfViT(**{"variant": "softmax", "depth": 24} | kwargs)


FACTORIES = (
    infvit_linear_4l, infvit_pure_4l, infvit_softmax_4l, infvit_linear_24l, infvit_pure_24l, infvit_softmax_24l,
)  # fmt: skip

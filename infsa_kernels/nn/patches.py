"""Pictures of any size as tokens: patches, and positions that were learned for a picture of another size.

Under torch.compile and torch.export all of it is one graph for all heights and widths.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.register import overridable
from .fx import Leaf


class PatchEmbed(Leaf, nn.Conv2d):
    """A convolution whose stride is its kernel, as one matrix product: (B, C, h, w) to (B, N, D).

    As a convolution of dynamic height and width, torch.compile does not take it.
    """

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.weight, std=self.weight[0].numel() ** -0.5)
        nn.init.zeros_(self.bias)

    def forward(self, images: Tensor) -> Tensor:
        p, _ = self.kernel_size
        rows, columns = images.shape[2] // p, images.shape[3] // p
        patches = images.unflatten(3, (columns, p)).unflatten(2, (rows, p)).permute(0, 2, 4, 1, 3, 5)
        return F.linear(patches.flatten(3).flatten(1, 2), self.weight.flatten(1), self.bias)


@overridable
def whole_patches(images: Tensor, channels: int, p: int) -> Tensor:
    """Images of the expected shape, padded with zeros to a whole number of patches of p x p pixels."""
    if images.dim() != 4 or images.shape[1] != channels:
        raise ValueError(
            f"InfViT: images has shape {list(images.shape)}, expected (B, {channels}, height, width), channels first"
        )
    height, width = images.shape[2:]
    if _certainly(height % p == 0) and _certainly(width % p == 0):
        return images
    rows, columns = (height + p - 1) // p, (width + p - 1) // p
    if not torch.compiler.is_compiling():
        return F.pad(images, (0, columns * p - width, 0, rows * p - height))
    # A padded side, as a sum, would not be known to be a multiple of p: it would be made a condition on the picture.
    y, x = (torch.arange(n * p, device=images.device) for n in (rows, columns))
    outside = (y >= height)[:, None] | (x >= width)
    return images[:, :, y.clamp(max=height - 1)[:, None], x.clamp(max=width - 1)].masked_fill(outside, 0)


@overridable
def resized_positions(learned: Tensor, learned_grid: tuple[int, int], grid: tuple[int, int], rows: slice) -> Tensor:
    """Positions (h, w, D) resized to a grid of patches: some of its rows, (1, rows * columns, D).

    The bicubic resize is a matrix per side. It is applied as the nearest position plus the rest, which vanishes where the
    grids are equal: there a graph for many sizes gives what was learned to the last bit, whatever the products round to.
    """
    if all(_certainly(size == to) for size, to in zip(learned_grid, grid)):
        return learned[rows].flatten(0, 1)[None]
    (down, above), (across, left) = (_resize(size, to, learned) for size, to in zip(learned_grid, grid))
    x = learned[above[rows]] + (down[rows] @ learned.flatten(1)).unflatten(1, learned.shape[1:])  # (rows, w, D)
    x = x[:, left] + across @ x
    return x.flatten(0, 1)[None]


def _resize(size: int, to: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """One side of F.interpolate(mode="bicubic", antialias=True), which torch.compile has no dynamic sizes for.

    Returns the resize less the nearest positions, (to, size), and the indices of these, (to,).
    """
    index = torch.arange(to, device=like.device)
    points = torch.arange(size, device=like.device)
    x = (points + 0.5 - (index.double()[:, None] + 0.5) * (size / to)).abs() / torch.sym_max(1.0, size / to)
    # Keys' cubic kernel with a = -0.5.
    weights = torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2).masked_fill(x >= 2, 0)
    nearest = (2 * index + 1) * size // (2 * to)
    rest = weights / weights.sum(1, keepdim=True) - (points == nearest[:, None]).double()
    return rest.to(like.dtype), nearest


def _certainly(condition: bool) -> bool:
    """Whether a condition on sizes holds; in a graph for many sizes, whether it holds for all of them."""
    if not torch.compiler.is_compiling():
        return condition
    # Slow to import, and imported where anything compiles.
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)

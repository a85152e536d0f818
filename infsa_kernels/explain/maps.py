"""Attention maps: what a model's tokens look at, on the grid of its patches."""

import math

import torch
from torch import Tensor, nn

from ..graph import eigenvector_centrality
from .layers import attention_graphs, check_layer, observe
from .weights import Graph, katz

KINDS = ("class_token", "in", "out", "katz", "eigenvector", "rollout")


def attention_maps(
    model: nn.Module,
    images: Tensor,
    layer: int = -1,
    kind: str = "class_token",
    heads: str | int | None = "mean",
    *,
    gamma: float = 0.9,
    grid: tuple[int, int] | None = None,
) -> Tensor:
    """What the attention of a layer looks at, for every patch of every picture.

    The model is any whose attention is InfSA, torch's scaled_dot_product_attention or nn.MultiheadAttention: InfViT, what
    :func:`infsa_kernels.nn.convert` made, or a ViT of timm, torchvision or transformers as it is. It runs once, in evaluation
    mode and without gradients; see :func:`attention_graphs`. With W the layer's attention weights, the value of patch j is

        "class_token"  W_cj, c the first token: what the class token reads.
        "in"           sum_i W_ij: what all tokens read there.
        "out"          sum_j' W_jj': how much this patch reads, 1 for softmax and Linear-InfSA.
        "katz"         sum_i (I - gamma W)^-1_ij: the same over walks of every length (paper eq 15).
        "eigenvector"  the left eigenvector of W of the largest eigenvalue, of norm 1.
        "rollout"      the class token's row (without one, the mean row) of the product over all layers up to this one of
                       (I + W') / 2, W' the mean of W over the heads with its rows divided by their sums.

    All are exact and hold no N x N matrix. Linear-InfSA's W has equal rows: there all kinds but "out" and "rollout" show the
    same weights.

    Args:
        model: takes (B, C, height, width).
        images: (B, C, height, width).
        layer: index of an attention layer in the order in which they run; -1 is the last.
        kind: as above. "class_token" needs a model with a class token.
        heads: "mean" over the heads, the index of one, or None for each; "rollout" has "mean" only.
        gamma: discount of a step of "katz", between 0 and 1.
        grid: (h, w) of the patches; default: the picture's size over the stride of the model's patch embedding, rounded up.

    Returns:
        (B, h, w), or (B, H, h, w) for heads=None; float32 or float64, not normalised.

    Raises:
        ValueError: a wrong argument, a model without attention, tokens that are no grid of patches. RuntimeError: a
        centrality does not converge.

    Example::

        >>> model = infvit_pure_4l(img_size=224)
        >>> attention_maps(model, torch.randn(1, 3, 224, 224), kind="in").shape
        torch.Size([1, 14, 14])
    """
    _check_arguments(images, layer, kind, heads, gamma)
    grid = patch_grid(model, images) if grid is None else _checked_grid(grid)
    if kind == "rollout":
        graphs = attention_graphs(model, images)
        check_layer(layer, len(graphs))
        graphs = graphs[: layer % len(graphs) + 1]
        extra = [_extra_tokens(graph, images, grid, kind) for graph in graphs][-1]
        values = _rollout(graphs, extra)[:, None]
    else:
        (graph,) = observe(model, images, layer)
        extra = _extra_tokens(graph, images, grid, kind)
        values = _values(graph, kind, gamma)
    values = values[..., extra : extra + math.prod(grid)].unflatten(-1, grid)
    if heads is None:
        return values
    if heads == "mean":
        return values.mean(1)
    H = values.shape[1]
    if not -H <= heads < H:
        raise ValueError(
            f"attention_maps: heads is {heads}, expected {-H} to {H - 1}, 'mean' or None: the layer has {H}"
        )
    return values[:, heads]


def patch_grid(model: nn.Module, images: Tensor) -> tuple[int, int]:
    """(h, w) of the patches: the picture's size over the stride of the first convolution, rounded up.

    Raises:
        ValueError: the model has no convolution that cuts into patches.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            if module.stride == module.kernel_size:
                return tuple(math.ceil(size / step) for size, step in zip(images.shape[2:], module.stride))
            break
    raise ValueError(
        "attention_maps: the model's first nn.Conv2d does not cut its picture into patches, expected one whose stride is its "
        "kernel; give grid=(h, w)"
    )


def _values(graph: Graph, kind: str, gamma: float) -> Tensor:
    """(B, H, N), class token and all."""
    if kind == "class_token":
        return graph.scores([0])[:, :, 0]
    if kind == "in":
        return graph.column_sums()
    if kind == "out":
        return graph.row_sums()
    return katz(graph, gamma) if kind == "katz" else eigenvector_centrality(graph)


def _rollout(graphs: list[Graph], extra: int) -> Tensor:
    """A row of the product of all layers, last layer first: (B, N)."""
    B, _, N, _ = graphs[-1].shape
    row = graphs[-1].q.new_zeros(B, N)
    row[:, 0] = 1
    if not extra:
        row.fill_(1 / N)
    for graph in reversed(graphs):
        H = graph.shape[1]
        sums = graph.row_sums().mean(1)
        share = torch.where(sums > 0, row / sums, 0)  # (B, N)
        read = graph.rmatmul(share[:, None, :, None].expand(-1, H, -1, -1)).mean(1).squeeze(-1)
        # A token that reads nothing keeps what it has.
        row = (row + read + torch.where(sums > 0, 0, row)) / 2
    return row


def _extra_tokens(graph: Graph, images: Tensor, grid: tuple[int, int], kind: str) -> int:
    """How many tokens stand before the patches."""
    B, _, N, M = graph.shape
    if len(images) != B or (N != M and not (N == 1 and kind == "class_token")):
        raise ValueError(
            f"attention_maps: the layer has {B} x {N} queries and {B} x {M} keys, expected {len(images)} pictures whose keys are "
            "the tokens of their queries: windows and cross-attention have no map"
        )
    extra = M - math.prod(grid)
    if extra < 0:
        raise ValueError(
            f"attention_maps: the layer has {M} tokens, expected at least h x w = {grid[0]} x {grid[1]}; give the grid=(h, w) "
            "of the model's patches"
        )
    if kind == "class_token" and not extra:
        raise ValueError(
            "attention_maps: kind is 'class_token', expected another one: the model has a token for every patch and none more; "
            "'in' is what all of them read"
        )
    return extra


def _check_arguments(images, layer, kind, heads, gamma) -> None:
    if not isinstance(images, Tensor) or images.dim() != 4:
        got = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"attention_maps: images is {got}, expected a Tensor (B, C, height, width)")
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise TypeError(f"attention_maps: layer is {layer!r}, expected an int")
    if kind not in KINDS:
        raise ValueError(f"attention_maps: kind is {kind!r}, expected one of {', '.join(map(repr, KINDS))}")
    if not (heads is None or heads == "mean" or (isinstance(heads, int) and not isinstance(heads, bool))):
        raise ValueError(f"attention_maps: heads is {heads!r}, expected 'mean', the index of a head or None")
    if kind == "rollout" and heads != "mean":
        raise ValueError(
            f"attention_maps: heads is {heads!r}, expected 'mean' with kind='rollout', which mixes the heads of every layer"
        )
    if not 0 < gamma < 1:
        raise ValueError(f"attention_maps: gamma is {gamma}, expected between 0 and 1, both excluded")


def _checked_grid(grid) -> tuple[int, int]:
    if len(grid) != 2 or not all(isinstance(n, int) and n > 0 for n in grid):
        raise ValueError(f"attention_maps: grid is {grid!r}, expected (h, w), numbers of patches above 0")
    return tuple(grid)

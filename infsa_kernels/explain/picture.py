"""One picture of what a model looks at: the photograph, and for every kind of map the heat map, its overlay and single heads."""

import math

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from .maps import attention_maps
from .measures import upsampled

COLOURS = "inferno"
INK, MUTED = "#1f2933", "#6b7785"
TITLES = {
    "class_token": "class token reads",
    "in": "all tokens read here",
    "out": "this token reads",
    "katz": "Katz: walks of any length",
    "eigenvector": "eigenvector",
    "rollout": "rollout over the layers",
}


def draw(
    model: nn.Module,
    images: Tensor,
    photograph: np.ndarray,
    kinds: list[str],
    layer: int = -1,
    heads: int = 6,
    title: str = "",
) -> Figure:
    """A row for each kind: heat map and overlay of the mean over the heads, then overlays of single heads.

    Args:
        images: (1, C, height, width), as the model takes it.
        photograph: the same picture to look at, (height, width, 3) in [0, 1].
        heads: how many single heads to show, taken at equal distances.
    """
    size = photograph.shape[:2]
    rows = [_maps(model, images, kind, layer, heads) for kind in kinds]
    columns = 2 + max(len(singles) for _, singles in rows)
    height, width = 1.9 * size[0] / size[1], 1.9
    figure = plt.figure(
        figsize=(width * (columns + 1.9) + 0.2, (height + 0.34) * max(len(rows), 2) + 0.75), facecolor="white"
    )
    grid = figure.add_gridspec(len(rows), columns + 2, wspace=0.05, hspace=0.2, left=0.01, right=0.99, bottom=0.02,
                               top=1 - 0.75 / figure.get_figheight())  # fmt: skip
    first = figure.add_subplot(grid[: max(1, math.ceil(len(rows) / 2)), :2], anchor="NW")
    _show(first, photograph, "the picture")
    for row, (kind, (mean, singles)) in enumerate(zip(kinds, rows)):
        axes = figure.add_subplot(grid[row, 2])
        axes.imshow(mean, cmap=COLOURS, extent=(0, size[1], size[0], 0), interpolation="nearest")
        _bare(axes, TITLES[kind])
        _show(figure.add_subplot(grid[row, 3]), overlaid(photograph, mean), "mean over heads")
        for column, (head, values) in enumerate(singles):
            _show(figure.add_subplot(grid[row, 4 + column]), overlaid(photograph, values), f"head {head}")
    figure.text(
        0.01, 1 - 0.12 / figure.get_figheight(), title, ha="left", va="top", fontsize=12, weight="bold", color=INK
    )
    return figure


def overlaid(photograph: np.ndarray, values: np.ndarray) -> np.ndarray:
    """A map over a picture: where nobody looks the picture is grey and dark, elsewhere it has the map's colour on top."""
    strength = upsampled(torch.from_numpy(values)[None], photograph.shape[:2])[0].numpy()
    strength = _between_0_and_1(strength)[..., None]
    colour = plt.get_cmap(COLOURS)(strength[..., 0])[..., :3]
    faded = 0.75 * photograph.mean(-1, keepdims=True) + 0.25 * photograph
    dimmed = faded * (0.25 + 0.75 * strength)
    return np.clip((1 - 0.45 * strength) * dimmed + 0.55 * strength * colour, 0, 1)


def _maps(model, images, kind, layer, heads) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    if kind == "rollout":
        return attention_maps(model, images, layer, kind)[0].double().cpu().numpy(), []
    each = attention_maps(model, images, layer, kind, heads=None)[0].double().cpu()
    chosen = torch.linspace(0, len(each) - 1, min(heads, len(each))).round().long().tolist()
    return each.mean(0).numpy(), [(head, each[head].numpy()) for head in chosen]


def _between_0_and_1(values: np.ndarray) -> np.ndarray:
    """From the least to the 99.5th percentile, so that one outlier does not hide the rest."""
    low, high = values.min(), np.quantile(values, 0.995)
    return np.clip((values - low) / (high - low), 0, 1) if high > low else np.zeros_like(values)


def _show(axes, picture: np.ndarray, title: str) -> None:
    axes.imshow(picture)
    _bare(axes, title)


def _bare(axes, title: str) -> None:
    axes.set_title(title, fontsize=8.5, color=MUTED, pad=3, loc="left")
    axes.set_axis_off()

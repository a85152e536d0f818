"""How the plots look: one colour per candidate, labels at the lines instead of legends."""

from itertools import pairwise

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from .ways import WAYS

COLOURS = {"infsa": "#0f62a8", "eager": "#9a8c7c", "compile": "#d9822b", "sdpa": "#8a4fa3"}
LIMIT_COLOUR = "#2f8f5b"
INK, MUTED, GRID = "#1f2933", "#6b7785", "#e3e7eb"

SETTINGS = {
    "figure.facecolor": "white",
    "savefig.dpi": 130,
    "font.size": 10.5,
    "text.color": INK,
    "axes.edgecolor": "#b8c0c8",
    "axes.labelcolor": MUTED,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.minor.visible": False,
    "ytick.minor.visible": False,
}

# Height of a label as a part of the axes' height: labels closer than this move apart.
LABEL_HEIGHT = 0.062

# Labels above lengths that are closer than this part of the width stand on each other.
NEIGHBOURS = 0.25


def label(name: str) -> str:
    return WAYS[name].LABEL if name in WAYS else name


def line(ax: Axes, points: list[tuple[int, float]], name: str) -> None:
    own = name == "infsa"
    N, values = zip(*points)
    ax.plot(
        N, values, color=COLOURS[name], linewidth=2.8 if own else 1.8, marker="o", markersize=6.5 if own else 4.5,
        zorder=4 if own else 3, markeredgecolor="white", markeredgewidth=0.8,
    )  # fmt: skip


def label_ends(ax: Axes, ends: list[tuple[float, float, str, str]]) -> None:
    """Writes each (x, y, text, colour) right of its point, or above it where other lines go on.

    Labels that would overlap make way for each other. The axes' limits must be final.
    """
    to_axes = ax.transData + ax.transAxes.inverted()
    last = max((x for x, _, _, _ in ends), default=0)
    right, above = [], []
    for x, y, text, colour in ends:
        (right if x == last else above).append((*to_axes.transform((x, y)), text, colour))
    _label_column(ax, right)
    _label_stacks(ax, above)


def _label_column(ax, labels) -> None:
    labels = sorted(labels, key=lambda label: label[1])
    heights = [label[1] for label in labels]
    rows = [1 + label[2].count("\n") for label in labels]
    for _ in range(200):
        for i, j in pairwise(range(len(labels))):
            overlap = LABEL_HEIGHT * (rows[i] + rows[j]) / 2 - (heights[j] - heights[i])
            if overlap > 0:
                heights[i] -= overlap / 2
                heights[j] += overlap / 2
    for (x, _, text, colour), height in zip(labels, heights):
        weight = "bold" if colour == COLOURS["infsa"] else "normal"
        ax.text(x + 0.02, height, text, color=colour, transform=ax.transAxes, va="center", fontsize=9.5, weight=weight)


def _label_stacks(ax, labels) -> None:
    """Labels of neighbouring lengths stand on each other, above the highest of their points."""
    stacks = []
    for label in sorted(labels):
        if stacks and label[0] - stacks[-1][-1][0] < NEIGHBOURS:
            stacks[-1].append(label)
        else:
            stacks.append([label])
    for stack in stacks:
        height = max(y for _, y, _, _ in stack) + 0.035
        for x, _, text, colour in sorted(stack, key=lambda label: label[1]):
            text = text.replace("\n", "  ")
            ax.text(x, height, text, color=colour, transform=ax.transAxes, ha="center", va="bottom", fontsize=9)
            height += LABEL_HEIGHT


def axis_of_lengths(ax: Axes, lengths: list[int], pixels: list[int], label_share: float) -> None:
    """Logarithmic N, with the picture's side below it, and a share of the width left for labels at the right."""
    decades = np.log10(max(lengths) / min(lengths)) or 1.0
    ax.set_xscale("log")
    left, right = 10 ** (-0.04 * decades), 10 ** (decades * label_share / (1 - label_share))
    ax.set_xlim(min(lengths) * left, max(lengths) * right)
    ax.xaxis.set_major_locator(FixedLocator(lengths))
    ax.xaxis.set_minor_locator(NullLocator())
    names = {N: f"{N:,}\n{p}²" for N, p in zip(lengths, pixels)}
    ax.xaxis.set_major_formatter(FuncFormatter(lambda N, _: names.get(round(N), "")))
    ax.grid(axis="x", visible=False)


def seconds(value: float, _=None) -> str:
    unit, factor = next((u for u in (("s", 1), ("ms", 1e3), ("µs", 1e6)) if value * u[1] >= 0.9995), ("ns", 1e9))
    return f"{value * factor:g} {unit}"


def megabytes(value: float, _=None) -> str:
    return f"{value / 1e9:g} GB" if value >= 1e9 else f"{value / 1e6:g} MB"


def caption(figure, results: dict) -> None:
    e = results["environment"]
    machine = f"{e['device']}, {e['threads']} threads, {e['isa'] or 'no extension'}"
    text = f"{machine} · torch {e['torch']} · {e['commit']} · {e['date'][:10]}"
    figure.text(0.995, 0.005, text, ha="right", va="bottom", fontsize=7.5, color=MUTED)


def use() -> None:
    mpl.use("agg")
    mpl.rcParams.update(SETTINGS)

"""The plots of the rows: latency over N with slopes, memory, speed-ups, shares of the limit, errors, energy; an overview.

One colour per mechanism, and labels at the lines instead of legends.
"""

from itertools import pairwise
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator, PercentFormatter

from . import machine, peers
from .image import PATCH, photograph
from .rows import FINAL, best, over_linear, select, slope, usual

# The lines of a plot over N: the operators beside their equations and softmax; the paper's nine, the floor, the closest peer.
KERNELS = ("linear_infsa", "pure_infsa", "linear_plain", "pure_plain", "softmax")
LINES = (*peers.PAPER, "linear_plain", "pure_plain", "mean", "fastformer")
COLOURS = {
    "linear_infsa": "#0f62a8", "pure_infsa": "#0a9396", "softmax": "#8a4fa3", "linformer": "#c0843d", "performer": "#b5533c",
    "soft": "#7a8b3b", "flatten": "#c2699d", "agent": "#d9822b", "mlla": "#5b7a99", "mean": "#9aa3ab", "fastformer": "#a6761d",
    "linear_infsa_untied": "#86b3dc", "linear_infsa_per_token": "#86b3dc", "pure_infsa_untied": "#84cbc5",
    "linear_plain": "#9a8c7c", "pure_plain": "#9a8c7c", "read": "#2f8f5b",
}  # fmt: skip
OTHERS = "#b9c2cb"
PASSES = {"fwd": "forward", "bwd": "backward", "train": "forward + backward"}
TITLES = {"operator": "operator: q, k, v given", "layer": "attention sub-layer, D = 1024", "model": "model"}
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


def draw_all(rows: list[dict], out: Path) -> list[Path]:
    """Every plot that the rows have points for, as OUT/overview.png and OUT/LEVEL_*.png."""
    mpl.use("agg")
    mpl.rcParams.update(SETTINGS)
    every, rows, written = rows, usual(rows), []
    figures = {"overview": overview(rows)}
    for level in TITLES:
        here = select(rows, level=level)
        for depth in sorted({r["depth"] for r in here}, key=lambda depth: depth or 0):
            figures |= _of_level(level, depth, [r for r in here if r["depth"] == depth])
    graphs = select(every, way="graph")
    for name, figure in figures.items() if not graphs else (figures | {"operator_roofline": floors(graphs)}).items():
        if figure is not None:
            where = machine.describe(every[-1]["environment"])[:170]
            figure.text(0.995, 0.005, where, ha="right", va="bottom", fontsize=6.5, color=MUTED)
            written.append(out / f"{name}.png")
            figure.savefig(written[-1])
            plt.close(figure)
    return written


def _of_level(level: str, depth: int | None, rows: list[dict]) -> dict:
    tag = f"{level}_{depth}" if depth else level
    title = TITLES[level] + (f" of {depth} layers" if depth else "")
    figures = {
        "latency": over_N(rows, "median_s", f"Time of one call, {title}", seconds, slopes=True),
        "memory": over_N(rows, "peak_bytes", f"Peak memory beyond weights and inputs, {title}", megabytes),
        "speed_up": speed_ups(rows, title),
        "accuracy": errors(rows, title),
        "limit": shares(rows, title),
    }
    if level == "model":
        figures["throughput"] = over_N(rows, "images_per_s", f"Pictures per second, {title}", lambda x, _: f"{x:g}")
        figures["energy"] = energies(rows, title)
    return {f"{tag}_{name}": figure for name, figure in figures.items()}


def points(rows: list[dict], name: str, which: str, field: str) -> list[tuple[int, float]]:
    """(N, value) of the mechanism's fastest rows."""
    found = []
    for N in sorted({r["N"] for r in rows}):
        row = best(rows, N=N, which=which).get(name, {})
        value = 1 / row["median_s"] if field == "images_per_s" and "median_s" in row else row.get(field)
        if row.get("status") == "ok" and value:
            found.append((N, max(value, 1e5) if field == "peak_bytes" else value))
    return found


def overview(rows: list[dict]):
    """The picture, and the time of both operators beside their equations, softmax and what the machine needs at least."""
    rows = select(rows, level="operator")
    panels = [op for op in ("linear", "pure") if len(points(rows, f"{op}_infsa", "fwd", "median_s")) > 1]
    if not panels:
        return None
    figure = plt.figure(figsize=(3.4 + 5.0 * len(panels), 4.3))
    axes = figure.subplots(1, 1 + len(panels), width_ratios=[0.62, *[1] * len(panels)])
    axes[0].imshow(photograph(512), extent=(0, 32, 32, 0))
    axes[0].set_xticks(np.arange(512 // PATCH + 1), [])
    axes[0].set_yticks(np.arange(512 // PATCH + 1), [])
    axes[0].grid(color="white", linewidth=0.3, alpha=0.75)
    axes[0].set_axisbelow(False)
    axes[0].tick_params(length=0)
    axes[0].spines[:].set_visible(False)
    axes[0].set_title("The input: a photograph", fontsize=11)
    axes[0].set_xlabel("patches of 16 × 16 pixels", fontsize=9)
    for ax, op in zip(axes[1:], panels):
        names = (f"{op}_infsa", f"{op}_plain", "softmax")
        times = dict(points(rows, names[0], "fwd", "median_s"))
        least = [(N, share * times[N]) for N, share in points(rows, names[0], "fwd", "share_of_limit")]
        limit = "a read of Q, V" if op == "linear" else "fastest matrix product"
        _lines(ax, rows, names, "fwd", "median_s", seconds, slopes=True, extra=(limit, least))
        ax.set_title(f"{peers.label(names[0])}, forward", fontsize=11)
        ax.tick_params(labelsize=8.5)
        ax.set_xlabel(f"tokens N, from a picture of so many pixels · {peers.of(names[0]).HEADS} heads", fontsize=9)
    figure.tight_layout(w_pad=1.5, rect=(0, 0.02, 1, 1))
    return figure


def over_N(rows, field, title, formatter, slopes=False):
    """One panel per pass: lines, their names at the end, and the exponent of their growth."""
    drawn = [p for p in PASSES if p != "bwd" or rows[0]["level"] == "operator"]
    passes = [p for p in drawn if any(len(points(rows, n, p, field)) > 1 for n in LINES)]
    if not passes:
        return None
    figure, axes = _panels(len(passes), 5.6, title)
    for ax, which in zip(axes, passes):
        _lines(ax, rows, LINES, which, field, formatter, slopes)
        ax.set_title(PASSES[which])
    return figure


def _lines(ax, rows, names, which, field, formatter, slopes, extra=("", ())) -> None:
    """Lines over N, log-log, each with its name at its end and, if it ends early, why."""
    curves = {name: found for name in names if len(found := points(rows, name, which, field)) > 1}
    lengths = sorted({N for found in curves.values() for N, _ in found})
    pixels = {r["N"]: r["pixels"] for r in rows}
    axis_of_lengths(ax, lengths, [pixels[N] for N in lengths], label_share=0.3)
    ax.set_yscale("log")
    ends, least = [], [p for p in extra[1] if p[0] in lengths]
    if least:
        ax.plot(*zip(*least), color=LIMIT_COLOUR, linewidth=1.5, linestyle=(0, (5, 3)), zorder=2)
        ends.append((*least[-1], extra[0], LIMIT_COLOUR))
    for name, found in curves.items():
        own = name in ("linear_infsa", "pure_infsa")
        ax.plot(*zip(*found), color=COLOURS[name], linewidth=2.8 if own else 1.5, marker="o", markersize=6 if own else 4,
                zorder=4 if own else 3)  # fmt: skip
        text = (
            peers.label(name)
            + (f"  $N^{{{growth:.2f}}}$" if slopes and (growth := slope(found)) else "")
            + _why_it_ends(rows, name, which, found[-1][0])
        )
        ends.append((*found[-1], text, COLOURS[name]))
    values = [v for found in (*curves.values(), least) for _, v in found]
    span = max(1.5, max(values) / min(values))
    early = sum(x < max(end[0] for end in ends) for x, *_ in ends)
    ax.set_ylim(min(values) / span**0.08, max(values) * span ** (0.12 + 0.07 * early))
    ax.yaxis.set_major_locator(LogLocator(subs=(1,) if span > 1e3 else (1, 2, 5)))
    ax.yaxis.set_major_formatter(FuncFormatter(formatter))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.figure.canvas.draw()
    label_ends(ax, ends)


def _panels(count: int, height: float, title: str):
    """A figure of panels beside each other, with room for its caption below, and their axes."""
    figure = plt.figure(figsize=(7.4 * count, height), layout="constrained")
    _leave_room(figure)
    figure.suptitle(title, x=0.008, ha="left", fontsize=14, weight="bold")
    return figure, figure.subplots(1, count, squeeze=False)[0]


def _leave_room(figure) -> None:
    below = 0.22 / figure.get_figheight()
    figure.get_layout_engine().set(rect=(0, below, 1, 1 - below), w_pad=0.12, h_pad=0.1)


def _why_it_ends(rows, name, which, last) -> str:
    later = [best(rows, N=N, which=which).get(name) for N in sorted({r["N"] for r in rows}) if last < N]
    return next((f"\n✕ {row['status']}" for row in later if row and row["status"] in FINAL), "")


def headline(rows: list[dict]) -> int:
    """The largest picture at which most mechanisms have a time."""
    counts = {
        N: sum(r["status"] == "ok" for r in best(rows, N=N, which="fwd").values()) for N in {r["N"] for r in rows}
    }
    return max(N for N, count in counts.items() if 2 * count >= max(counts.values()))


def speed_ups(rows, title):
    """How many times longer each mechanism takes than Linear-InfSA, calls in turn with it where the level has that."""
    rows = [r for r in rows if r["name"] not in peers.LIMITS]
    if not rows:
        return None
    N = headline(rows)
    panels = {}
    for which in PASSES:
        chosen = {n: r for n, r in best(rows, N=N, which=which).items() if r["status"] == "ok"}
        times = {n: over for n, r in chosen.items() if n != "linear_infsa" and (over := over_linear(r, chosen))}
        if times and (which != "bwd" or rows[0]["level"] == "operator"):
            panels[which] = sorted(times.items(), key=lambda item: item[1])
    if not panels:
        return None
    most = max(map(len, panels.values()))
    pixels = next(r["pixels"] for r in rows if r["N"] == N)
    figure, axes = _panels(len(panels), 1.6 + 0.27 * most, f"Time over Linear-InfSA's, {pixels}², {title}")
    for ax, (which, bars) in zip(axes, panels.items()):
        names, times = zip(*bars)
        ax.set_xscale("log")
        # From 1, where Linear-InfSA stands: a log axis has no zero for bars to begin at.
        drawn = ax.barh([peers.label(n) for n in names], [t - 1 for t in times], left=1, height=0.72,
                        color=[COLOURS.get(n, OTHERS) for n in names])  # fmt: skip
        ax.bar_label(drawn, [f"{t:.2g}×" if t < 10 else f"{t:.0f}×" for t in times], padding=3, fontsize=8.5)
        ax.axvline(1, color=COLOURS["linear_infsa"], linewidth=1.6)
        span = max(2.0, *times) / min(0.5, *times)
        ax.set_xlim(min(0.5, *times) / span**0.15, max(2.0, *times) * span**0.1)
        ax.margins(y=0.01)
        ax.xaxis.set_major_locator(LogLocator(subs=(1,) if span > 1e2 else (1, 2, 5)))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}×"))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.invert_yaxis()
        ax.tick_params(axis="y", labelsize=9, length=0)
        ax.grid(axis="y", visible=False)
        ax.set_title(PASSES[which])
    return figure


def errors(rows, title):
    """The largest error of every mechanism's output against float64 beside what is allowed, at each length."""
    found = [r for N in sorted({r["N"] for r in rows}) for r in best(rows, N=N, which="fwd").values()]
    found = [r for r in found if r["status"] in ("ok", "wrong") and r.get("error")]
    if not found:
        return None
    names = list(dict.fromkeys(r["name"] for r in sorted(found, key=lambda r: r["error"])))
    lengths = sorted({r["N"] for r in found})
    figure, ax = plt.subplots(figsize=(9.6, 1.6 + 0.27 * len(names)), layout="constrained")
    _leave_room(figure)
    for N, shade in zip(lengths, np.linspace(0.3, 1, len(lengths))):
        mine = [r for r in found if r["N"] == N]
        rows_ = [names.index(r["name"]) for r in mine]
        ax.scatter(
            [r["error"] for r in mine], rows_, alpha=shade, color=COLOURS["linear_infsa"], label=f"N = {N:,}", s=34
        )
        ax.scatter([r["bound"] for r in mine], rows_, alpha=shade, color=LIMIT_COLOUR, marker="|", s=60,
                   label="allowed" if lengths[-1] == N else None)  # fmt: skip
    ax.set_yticks(range(len(names)), [peers.label(n) for n in names], fontsize=9)
    ax.invert_yaxis()
    ax.set_xscale("log")
    ax.set_title(f"Largest error against float64, {title}")
    ax.set_xlabel("as a part of the largest entry")
    ax.margins(y=0.02)
    ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1), fontsize=9)
    return figure


def shares(rows, title):
    """How near our operators and layers come to what the machine needs for them at least."""
    curves = {
        (n, p): found
        for n in ("linear_infsa", "pure_infsa")
        for p in PASSES
        if (found := points(rows, n, p, "share_of_limit"))
    }
    lengths = sorted({N for found in curves.values() for N, _ in found})
    if not lengths:
        return None
    figure, ax = plt.subplots(figsize=(8.4, 4.6), layout="constrained")
    _leave_room(figure)
    pixels = {r["N"]: r["pixels"] for r in rows}
    axis_of_lengths(ax, lengths, [pixels[N] for N in lengths], label_share=0.34)
    ends = []
    for (name, which), found in curves.items():
        dashes = {"fwd": "-", "bwd": "--", "train": ":"}[which]
        ax.plot(*zip(*found), color=COLOURS[name], linestyle=dashes, linewidth=2.4, marker="o", markersize=5)
        ends.append((*found[-1], f"{peers.label(name)}, {PASSES[which]}", COLOURS[name]))
    ax.axhline(1, color=LIMIT_COLOUR, linestyle=(0, (5, 3)))
    ax.set_ylim(0, max(1.15, ax.get_ylim()[1]))
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    ax.set_title(f"Least time of bytes or matrix products over the time, {title}", fontsize=11)
    figure.canvas.draw()
    label_ends(ax, ends)
    return figure


def energies(rows, title):
    """Pictures per second over joules per picture, where they were measured."""
    found = [r for r in rows if r.get("joules") and r["pass"] == "fwd"]
    if not found:
        return None
    figure, ax = plt.subplots(figsize=(8.4, 5.2), layout="constrained")
    _leave_room(figure)
    for name in dict.fromkeys(r["name"] for r in found):
        mine = [(r["joules"], 1 / r["median_s"]) for r in found if r["name"] == name]
        ax.plot(*zip(*mine), marker="o", color=COLOURS.get(name, OTHERS), label=peers.label(name))
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("joules per picture")
    ax.set_ylabel("pictures per second")
    ax.legend(frameon=False, fontsize=9)
    ax.set_title(f"Throughput against energy, {title}")
    return figure


def floors(rows):
    """Every time of ours in a CUDA graph: the least time of its bytes or products over it."""
    rows = [r for r in rows if "share_of_limit" in r]
    bars = {f"{r['label']} N={r['N']} x{r['batch']} {r['pass']}": r["share_of_limit"] for r in rows}
    return share_bars(bars, "least time of bytes or products / measured time")


def share_bars(bars: dict[str, float], label: str):
    """A bar for each share, 1 = reached."""
    if not bars:
        return None
    figure, ax = plt.subplots(figsize=(9, 0.3 * len(bars) + 1), layout="constrained")
    ax.barh(list(bars), list(bars.values()), color=["#2a7" if value >= 1 else "#c63" for value in bars.values()])
    ax.axvline(1, color="black", linewidth=1)
    ax.invert_yaxis()
    ax.set_xlabel(label)
    return figure


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
        if labels:
            heights[0], heights[-1] = max(heights[0], 0.02), min(heights[-1], 0.98)
    for (x, _, text, colour), height in zip(labels, heights):
        weight = "bold" if colour in (COLOURS["linear_infsa"], COLOURS["pure_infsa"]) else "normal"
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

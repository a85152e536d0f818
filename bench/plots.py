"""The plots of the rows: latency over N with slopes, memory, speed-ups, shares of the limit, errors, energy; an overview.

One colour per mechanism, and labels at the lines instead of legends.
"""

from itertools import pairwise
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator, PercentFormatter

from . import machine, peers
from .image import PATCH, photograph
from .rows import FINAL, PASSES, TITLES, best, over_linear, select, slope, usual

# The lines of a plot over N: the paper's nine, the operators beside their equations, the floor, the closest peer.
LINES = (*peers.PAPER, "linear_plain", "pure_plain", "mean", "fastformer")
OURS = ("linear_infsa", "pure_infsa")
COLOURS = {
    "linear_infsa": "#0f62a8", "pure_infsa": "#0a9396", "softmax": "#8a4fa3", "linformer": "#c0843d", "performer": "#b5533c",
    "soft": "#7a8b3b", "flatten": "#c2699d", "agent": "#d9822b", "mlla": "#5b7a99", "mean": "#9aa3ab", "fastformer": "#a6761d",
    "linear_infsa_untied": "#86b3dc", "linear_infsa_floor": "#86b3dc", "linear_infsa_per_token": "#86b3dc",
    "pure_infsa_untied": "#84cbc5",
    "linear_plain": "#9a8c7c", "pure_plain": "#9a8c7c",
}  # fmt: skip
OTHERS, LIMIT, MUTED = "#b9c2cb", "#2f8f5b", "#6b7785"
DASHED = (0, (5, 3))
SECONDS, BYTES = EngFormatter("s"), EngFormatter("B")

SETTINGS = {
    "figure.facecolor": "white", "savefig.dpi": 130, "font.size": 10.5, "text.color": "#1f2933", "axes.edgecolor": "#b8c0c8",
    "axes.labelcolor": MUTED, "axes.titlesize": 12, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.titlepad": 10,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True, "grid.color": "#e3e7eb",
    "xtick.color": MUTED, "ytick.color": MUTED, "xtick.minor.visible": False, "ytick.minor.visible": False,
    "figure.titlesize": 14, "figure.titleweight": "bold", "legend.frameon": False, "legend.fontsize": 9,
}  # fmt: skip

# Height of a line of a label as a part of the axes' height, and the part of a plot's width that labels have.
LABEL_HEIGHT, LABEL_SHARE = 0.062, 0.36


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
    graphs = [r for r in select(every, way="graph") if "share_of_limit" in r]
    floors = {f"{r['label']} N={r['N']} x{r['batch']} {r['pass']}": r["share_of_limit"] for r in graphs}
    figures["operator_roofline"] = share_bars(floors, "least time of bytes or products / measured time")
    for name, figure in figures.items():
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
        "latency": over_N(rows, "median_s", f"Time of one call, {title}", SECONDS, slopes=True),
        "memory": over_N(rows, "peak_bytes", f"Peak memory beyond weights and inputs, {title}", BYTES),
        "speed_up": speed_ups(rows, title),
        "accuracy": errors(rows, title),
        "limit": shares(rows, title),
    }
    if level == "model":
        figures["throughput"] = over_N(rows, "images_per_s", f"Pictures per second, {title}", "{x:g}")
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
    picture, *axes = figure.subplots(1, 1 + len(panels), width_ratios=[0.62, *[1] * len(panels)])
    picture.imshow(photograph(512), extent=(0, 32, 32, 0))
    picture.set(xticks=range(33), xticklabels=[], yticks=range(33), yticklabels=[])
    picture.grid(color="white", linewidth=0.3, alpha=0.75)
    picture.set_axisbelow(False)
    picture.tick_params(length=0)
    picture.spines[:].set_visible(False)
    picture.set_title("The input: a photograph", fontsize=11)
    picture.set_xlabel(f"patches of {PATCH} × {PATCH} pixels", fontsize=9)
    for ax, op in zip(axes, panels):
        name, limit = f"{op}_infsa", "a read of Q, V" if op == "linear" else "fastest matrix product"
        times = dict(points(rows, name, "fwd", "median_s"))
        least = [(N, share * times[N]) for N, share in points(rows, name, "fwd", "share_of_limit")]
        lines(ax, rows, (name, f"{op}_plain", "softmax"), "fwd", "median_s", SECONDS, slopes=True, limit=(limit, least))
        ax.set_title(f"{peers.label(name)}, forward", fontsize=11)
        ax.tick_params(labelsize=8.5)
        ax.set_xlabel(f"tokens N, from a picture of so many pixels · {peers.of(name).HEADS} heads", fontsize=9)
    figure.tight_layout(w_pad=1.5, rect=(0, 0.02, 1, 1))
    return figure


def over_N(rows, field, title, formatter, slopes=False):
    """One panel per pass: lines, their names at the end, and the exponent of their growth."""
    drawn = [p for p in PASSES if p != "bwd" or rows[0]["level"] == "operator"]
    passes = [p for p in drawn if any(len(points(rows, n, p, field)) > 1 for n in LINES)]
    if not passes:
        return None
    figure, axes = panels(len(passes), 6.0, 4.6, title)
    for ax, which in zip(axes, passes):
        lines(ax, rows, LINES, which, field, formatter, slopes)
        ax.set_title(PASSES[which])
    return figure


def lines(ax, rows, names, which, field, formatter, slopes=False, limit=("", ())) -> None:
    """Lines over N, log-log, each with its name at the right and, if it ends early, why."""
    curves = {name: found for name in names if len(found := points(rows, name, which, field)) > 1}
    lengths = sorted({N for found in curves.values() for N, _ in found})
    axis_of_lengths(ax, rows, lengths)
    ends, least = [], [point for point in limit[1] if point[0] in lengths]
    if least:
        ax.plot(*zip(*least), color=LIMIT, linewidth=1.5, linestyle=DASHED, zorder=2)
        ends.append((*least[-1], limit[0], LIMIT))
    for name, found in curves.items():
        size = {"linewidth": 2.8, "markersize": 6, "zorder": 4} if name in OURS else {"linewidth": 1.5, "markersize": 4}
        ax.plot(*zip(*found), color=COLOURS[name], marker="o", **size)
        growth = f"  $N^{{{slope(found):.2f}}}$" if slopes and slope(found) else ""
        why = _why_it_ends(rows, name, which, found[-1][0])
        ends.append((*found[-1], peers.label(name) + growth + why, COLOURS[name]))
    values = [v for found in (*curves.values(), least) for _, v in found]
    span = max(1.5, max(values) / min(values))
    ax.set_ylim(min(values) / span**0.08, max(values) * span**0.12)
    ax.set_yscale("log")
    log_axis(ax.yaxis, span, formatter)
    label_ends(ax, ends)


def _why_it_ends(rows, name, which, last) -> str:
    later = [best(rows, N=N, which=which).get(name) for N in sorted({r["N"] for r in rows}) if last < N]
    return next((f"\n✕ then: {row['status']}" for row in later if row and row["status"] in FINAL), "")


def headline(rows: list[dict]) -> int:
    """The largest picture at which most mechanisms have a time."""
    timed = {(r["N"], r["name"]) for r in select(rows, which="fwd", status="ok")}
    counts = {N: sum(at == N for at, _ in timed) for N in {r["N"] for r in rows}}
    return max(N for N, count in counts.items() if 2 * count >= max(counts.values()))


def speed_ups(rows, title):
    """How many times longer each mechanism takes than Linear-InfSA, calls in turn with it where the level has that."""
    rows = [r for r in rows if r["name"] not in peers.LIMITS]
    bars, N = {}, headline(rows) if rows else 0
    for which in PASSES:
        chosen = best(rows, N=N, which=which, status="ok")
        times = {n: over for n, r in chosen.items() if n != "linear_infsa" and (over := over_linear(r, chosen))}
        if times and (which != "bwd" or rows[0]["level"] == "operator"):
            bars[which] = sorted(times.items(), key=lambda item: item[1])
    if not bars:
        return None
    pixels = next(r["pixels"] for r in rows if r["N"] == N)
    height = 1.6 + 0.27 * max(map(len, bars.values()))
    figure, axes = panels(len(bars), 6.0, height, f"Time over Linear-InfSA's, {pixels}², {title}")
    for ax, (which, found) in zip(axes, bars.items()):
        names, times = zip(*found)
        # From 1, where Linear-InfSA stands: a log axis has no zero for bars to begin at.
        drawn = ax.barh([peers.label(n) for n in names], [t - 1 for t in times], left=1, height=0.72,
                        color=[COLOURS.get(n, OTHERS) for n in names])  # fmt: skip
        ax.bar_label(drawn, [f"{t:.2g}×" if t < 10 else f"{t:.0f}×" for t in times], padding=3, fontsize=8.5)
        ax.axvline(1, color=COLOURS["linear_infsa"], linewidth=1.6)
        low, high = min(0.5, *times), max(2.0, *times)
        ax.set(xscale="log", xlim=(low / (high / low) ** 0.15, high * (high / low) ** 0.1), title=PASSES[which])
        log_axis(ax.xaxis, high / low, "{x:g}×")
        ax.margins(y=0.01)
        ax.invert_yaxis()
        ax.tick_params(axis="y", labelsize=9, length=0)
        ax.grid(axis="y", visible=False)
    return figure


def errors(rows, title):
    """The largest error of every mechanism's output against float64 beside what is allowed, at each length."""
    lengths = sorted({r["N"] for r in rows})
    found = [r for N in lengths for r in best(rows, N=N, which="fwd").values() if r.get("error")]
    names = list(dict.fromkeys(r["name"] for r in sorted(found, key=lambda r: r["error"])))
    if not names:
        return None
    figure, (ax,) = panels(1, 9.6, 1.6 + 0.27 * len(names), f"Largest error against float64, {title}")
    for N, shade in zip(lengths, np.linspace(0.3, 1, len(lengths))):
        mine = [r for r in found if r["N"] == N]
        heights = [names.index(r["name"]) for r in mine]
        allowed = "allowed" if lengths[-1] == N else None
        ax.scatter([r["error"] for r in mine], heights, 34, COLOURS["linear_infsa"], alpha=shade, label=f"N = {N:,}")
        ax.scatter([r["bound"] for r in mine], heights, 60, LIMIT, marker="|", alpha=shade, label=allowed)
    ax.set_yticks(range(len(names)), [peers.label(n) for n in names], fontsize=9)
    ax.invert_yaxis()
    ax.set(xscale="log", xlabel="as a part of the largest entry")
    ax.margins(y=0.02)
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def shares(rows, title):
    """How near our operators and layers come to what the machine needs for them at least."""
    curves = {(n, p): found for n in OURS for p in PASSES if (found := points(rows, n, p, "share_of_limit"))}
    if not curves:
        return None
    figure, (ax,) = panels(1, 8.4, 4.6, f"Least time of bytes or products over the time, {title}")
    axis_of_lengths(ax, rows, sorted({N for found in curves.values() for N, _ in found}))
    for (name, which), found in curves.items():
        dashes = {"fwd": "-", "bwd": "--", "train": ":"}[which]
        ax.plot(*zip(*found), color=COLOURS[name], linestyle=dashes, linewidth=2.4, marker="o", markersize=5)
    ax.axhline(1, color=LIMIT, linestyle=DASHED)
    ax.set_ylim(0, max(1.15, ax.get_ylim()[1]))
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    label_ends(ax, [(*f[-1], f"{peers.label(n)}, {PASSES[p]}", COLOURS[n]) for (n, p), f in curves.items()])
    return figure


def energies(rows, title):
    """Pictures per second over joules per picture, where they were measured."""
    found = [r for r in rows if r.get("joules") and r["pass"] == "fwd"]
    if not found:
        return None
    figure, (ax,) = panels(1, 8.4, 5.2, f"Throughput against energy, {title}")
    for name in dict.fromkeys(r["name"] for r in found):
        mine = [(r["joules"], 1 / r["median_s"]) for r in found if r["name"] == name]
        ax.plot(*zip(*mine), marker="o", color=COLOURS.get(name, OTHERS), label=peers.label(name))
    ax.set(xscale="log", yscale="log", xlabel="joules per picture", ylabel="pictures per second")
    ax.legend()
    return figure


def share_bars(bars: dict[str, float], title: str):
    """A bar for each share, 1 = reached."""
    if not bars:
        return None
    figure, (ax,) = panels(1, 9, 0.3 * len(bars) + 1, title)
    ax.barh(list(bars), list(bars.values()), color=["#2a7" if value >= 1 else "#c63" for value in bars.values()])
    ax.axvline(1, color="black", linewidth=1)
    ax.invert_yaxis()
    return figure


def panels(count: int, width: float, height: float, title: str):
    """A figure of panels beside each other, with room for its caption below, and their axes."""
    figure = plt.figure(figsize=(width * count, height), layout="constrained")
    below = 0.22 / height
    figure.get_layout_engine().set(rect=(0, below, 1, 1 - below), w_pad=0.12, h_pad=0.1)
    figure.suptitle(title, x=0.008, ha="left")
    return figure, figure.subplots(1, count, squeeze=False)[0]


def label_ends(ax: Axes, ends: list[tuple[float, float, str, str]]) -> None:
    """Writes each (x, y, text, colour) at the right, joined to its point. The axes' limits must be final.

    Labels that would overlap make way for each other.
    """
    to_axes = ax.transData + ax.transAxes.inverted()
    ends = sorted(ends, key=lambda end: end[1])
    heights = [to_axes.transform(end[:2])[1] for end in ends]
    rows = [1 + text.count("\n") for _, _, text, _ in ends]
    for _ in range(200):
        for i, j in pairwise(range(len(ends))):
            overlap = max(0, LABEL_HEIGHT * (rows[i] + rows[j]) / 2 - (heights[j] - heights[i]))
            heights[i] -= overlap / 2
            heights[j] += overlap / 2
        heights[0], heights[-1] = max(heights[0], 0.02), min(heights[-1], 0.98)
    for (x, y, text, colour), height in zip(ends, heights):
        weight = "bold" if colour in (COLOURS[name] for name in OURS) else "normal"
        place = {"xytext": (1.03 - LABEL_SHARE, height), "textcoords": "axes fraction", "va": "center"}
        leader = {"arrowstyle": "-", "relpos": (0, 0.5), "color": colour, "alpha": 0.4, "linewidth": 0.7}
        ax.annotate(text, (x, y), **place, color=colour, fontsize=9.5, weight=weight, arrowprops=leader)


def axis_of_lengths(ax: Axes, rows: list[dict], lengths: list[int]) -> None:
    """Logarithmic N, with the picture's side below it, and room for labels at the right."""
    decades = np.log10(max(lengths) / min(lengths)) or 1.0
    ax.set_xscale("log")
    beyond = 10 ** (decades * LABEL_SHARE / (1 - LABEL_SHARE))
    ax.set_xlim(min(lengths) * 10 ** (-0.04 * decades), max(lengths) * beyond)
    sides = {r["N"]: r["pixels"] for r in rows}
    ax.set_xticks(lengths, [f"{N:,}\n{sides[N]}²" for N in lengths])
    ax.minorticks_off()
    ax.grid(axis="x", visible=False)


def log_axis(axis, span: float, formatter) -> None:
    """Few numbers on a logarithmic axis."""
    axis.set_major_locator(LogLocator(subs=(1,) if span > 1e3 else (1, 2, 5)))
    axis.set_major_formatter(formatter)
    axis.set_minor_locator(NullLocator())

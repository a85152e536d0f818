"""The plots over N: latency, speed-up, memory, share of the machine's limit, accuracy; an overview for the README."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter

from . import style
from .cases import HEADS
from .curves import curve
from .image import PATCH, photograph
from .report import NAMES
from .ways import WAYS

PASSES = {"fwd": "forward", "bwd": "backward"}
STEP = {"fwd": "forward", "fwd+bwd": "forward + backward"}
WHY_IT_ENDS = {"out of memory": "out of memory", "skipped": "too slow", "unsupported": "unsupported", "wrong": "WRONG"}

# What the machine's limit is for each operator and direction.
LIMITS = {
    ("linear", "fwd"): "a read of Q, V",
    ("linear", "bwd"): "a copy of Q, V",
    ("pure", "fwd"): "fastest GEMM",
    ("pure", "bwd"): "fastest GEMM",
}

# A peak below this is noise of the kernel's page counters.
LEAST_BYTES = 1e6


def draw_all(results: dict, out: Path) -> list[Path]:
    style.use()
    written = []
    for draw in (overview, latency, speed_up, memory, limit, accuracy):
        figure = draw(results)
        style.caption(figure, results)
        written.append(out / f"{draw.__name__}.png")
        figure.savefig(written[-1])
        plt.close(figure)
    return written


def latency(results: dict):
    figure, grid = _grid(results, PASSES, "Time of one call")
    for op, direction, ax in grid:
        _latency_panel(ax, results, op, direction)
        ax.set_title(f"{NAMES[op]}, {PASSES[direction]}")
    return figure


def _latency_panel(ax, results, op, direction):
    rows = results["rows"]
    curves = {name: curve(rows, op, direction, name) for name in WAYS}
    limit = [(r["N"], r["share_of_limit"] * r["median_s"]) for r in _own(rows, op, direction)]
    _curves(ax, rows, op, direction, curves, extra=(LIMITS[op, direction], sorted(limit)), slopes=results["slopes"])
    ax.yaxis.set_major_formatter(FuncFormatter(style.seconds))


def memory(results: dict):
    figure, grid = _grid(results, STEP, "Peak memory beyond the inputs")
    for op, direction, ax in grid:
        rows = results["rows"]
        curves = {name: curve(rows, op, direction, name, "peak_bytes") for name in WAYS}
        curves = {name: [(N, max(b, LEAST_BYTES)) for N, b in points] for name, points in curves.items()}
        results_only = [(r["N"], max(r.get("result_bytes", 0), LEAST_BYTES)) for r in _own(rows, op, direction)]
        _curves(ax, rows, op, direction, curves, extra=("the results alone", sorted(results_only)))
        ax.yaxis.set_major_formatter(FuncFormatter(style.megabytes))
        ax.set_title(f"{NAMES[op]}, {STEP[direction]}")
    return figure


def accuracy(results: dict):
    figure, grid = _grid(results, STEP, "Largest error against float64, as a part of the largest entry")
    for op, direction, ax in grid:
        rows = results["rows"]
        curves = {name: curve(rows, op, direction, name, "error") for name in WAYS if WAYS[name].SAME_FUNCTION}
        _curves(ax, rows, op, direction, curves, extra=("allowed", curve(rows, op, direction, "infsa", "bound")))
        what = "result" if direction == "fwd" else "result and gradients"
        ax.set_title(f"{NAMES[op]}, {what}")
    return figure


def speed_up(results: dict):
    figure, grid = _grid(results, PASSES, "Times faster than …")
    for op, direction, ax in grid:
        rows = results["rows"]
        own = dict(curve(rows, op, direction, "infsa"))
        names = [name for name in WAYS if name != "infsa" and curve(rows, op, direction, name)]
        lengths = sorted(own)
        highest = 1.0
        for i, name in enumerate(names):
            peer = dict(curve(rows, op, direction, name))
            common = [N for N in lengths if N in peer]
            heights = [peer[N] / own[N] for N in common]
            places = [lengths.index(N) + (i - (len(names) - 1) / 2) * 0.27 for N in common]
            bars = ax.bar(places, heights, width=0.25, color=style.COLOURS[name], label=style.label(name), bottom=0)
            ax.bar_label(bars, [_short(h) for h in heights], fontsize=7.5, padding=2, color=style.INK)
            highest = max([highest, *heights])
        ax.axhline(1, color=style.COLOURS["infsa"], linewidth=1.6)
        ax.set_yscale("log")
        ax.set_ylim(0.6, highest * 2.2)
        ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}×"))
        ax.yaxis.set_minor_locator(NullLocator())
        pixels = {r["N"]: r["pixels"] for r in rows}
        ax.set_xlim(-0.6, len(lengths) - 0.4)
        ax.set_xticks(range(len(lengths)), [f"{N:,}\n{pixels[N]}²" for N in lengths])
        ax.grid(axis="x", visible=False)
        ax.set_title(f"{NAMES[op]}, {PASSES[direction]}")
    grid[0][2].legend(frameon=False, loc="upper left", ncols=3, fontsize=9)
    return figure


def limit(results: dict):
    figure, grid = _grid(results, None, "Share of what the machine can do at most")
    for op, _, ax in grid:
        for direction, shade in (("fwd", 1.0), ("bwd", 0.5)):
            points = curve(results["rows"], op, direction, "infsa", "share_of_limit")
            if points:
                N, share = zip(*points)
                ax.plot(N, share, color=style.COLOURS["infsa"], alpha=shade, linewidth=2.6, marker="o", markersize=6.5)
        ax.axhline(1, color=style.LIMIT_COLOUR, linewidth=1.4, linestyle=(0, (5, 3)))
        lengths, pixels = _lengths(results["rows"], op)
        style.axis_of_lengths(ax, lengths, pixels, label_share=0.14)
        ax.set_ylim(0, max(1.15, ax.get_ylim()[1]))
        ax.yaxis.set_major_formatter(PercentFormatter(1.0))
        ends = []
        for direction, word in PASSES.items():
            points = curve(results["rows"], op, direction, "infsa", "share_of_limit")
            if points:
                ends.append((*points[-1], word, style.COLOURS["infsa"]))
        style.label_ends(ax, ends)
        what = (
            "beside reading (backward: copying) the same bytes"
            if op == "linear"
            else "beside the fastest matrix product"
        )
        ax.set_title(f"{NAMES[op]}, {what}", fontsize=11)
    return figure


def overview(results: dict):
    ops = _operators(results["rows"])
    figure = plt.figure(figsize=(3.4 + 5.0 * len(ops), 4.3))
    axes = figure.subplots(1, 1 + len(ops), width_ratios=[0.62, *[1] * len(ops)])
    picture = photograph(512)
    axes[0].imshow(picture, extent=(0, 32, 32, 0))
    axes[0].set_xticks(np.arange(512 // PATCH + 1), [])
    axes[0].set_yticks(np.arange(512 // PATCH + 1), [])
    axes[0].grid(color="white", linewidth=0.3, alpha=0.75)
    axes[0].set_axisbelow(False)
    axes[0].tick_params(length=0)
    axes[0].spines[:].set_visible(False)
    axes[0].set_title("The input: a photograph", fontsize=11)
    axes[0].set_xlabel("patches of 16 × 16 pixels → D = 1024", fontsize=9)
    for ax, op in zip(axes[1:], ops):
        _latency_panel(ax, results, op, "fwd")
        H, d = HEADS[op]
        ax.set_title(f"{NAMES[op]}, forward", fontsize=11)
        ax.set_xlabel(f"tokens N, from a picture of so many pixels · {H} heads of {d}", fontsize=9)
    figure.tight_layout(w_pad=1.5, rect=(0, 0.02, 1, 1))
    return figure


def _grid(results, directions, title):
    """A figure of one column per operator and one row per direction, and (op, direction, axes) for each place."""
    ops = _operators(results["rows"])
    directions = directions or {None: ""}
    figure = plt.figure(figsize=(6.4 * len(ops), 0.9 + 3.7 * len(directions)), layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0.02, 1, 0.97), w_pad=0.12, h_pad=0.1)
    figure.suptitle(title, x=0.008, ha="left", fontsize=14, weight="bold")
    axes = figure.subplots(len(directions), len(ops), squeeze=False)
    return figure, [(op, d, axes[i][j]) for i, d in enumerate(directions) for j, op in enumerate(ops)]


def _curves(ax, rows, op, direction, curves, extra, slopes=()):
    """Lines over N, log-log, each with its name at its end and, if it ends early, why."""
    lengths, pixels = _lengths(rows, op)
    style.axis_of_lengths(ax, lengths, pixels, label_share=0.3)
    ax.set_yscale("log")
    ax.yaxis.set_minor_locator(NullLocator())
    ends = []
    name, points = extra
    if points:
        ax.plot(*zip(*points), color=style.LIMIT_COLOUR, linewidth=1.5, linestyle=(0, (5, 3)), zorder=2)
        ends.append((*points[-1], name, style.LIMIT_COLOUR))
    for name, points in curves.items():
        if points:
            style.line(ax, points, name)
            text = style.label(name) + _slope(slopes, op, direction, name)
            if why := _why_it_ends(rows, op, direction, name, points[-1][0]):
                text += f"\n✕ {why}"
            ends.append((*points[-1], text, style.COLOURS[name]))
    low, high = ax.get_ylim()
    early = sum(x < max(end[0] for end in ends) for x, *_ in ends)
    ax.set_ylim(low, high * (high / low) ** (0.04 + 0.08 * early))  # room for the labels above the highest points
    ax.figure.canvas.draw()
    style.label_ends(ax, ends)


def _slope(slopes, op, direction, name) -> str:
    mine = {"op": op, "direction": direction, "candidate": name}
    return next((f"  $N^{{{s['exponent']:.2f}}}$" for s in slopes if mine.items() <= s.items()), "")


def _why_it_ends(rows, op, direction, name, last) -> str | None:
    mine = {"op": op, "direction": direction, "candidate": name, "sweep": True}
    later = sorted((r for r in rows if mine.items() <= r.items() and r["N"] > last), key=lambda r: r["N"])
    return WHY_IT_ENDS[later[0]["status"]] if later else None


def _own(rows, op, direction) -> list[dict]:
    mine = {"op": op, "direction": direction, "candidate": "infsa", "sweep": True, "status": "ok"}
    return [r for r in rows if mine.items() <= r.items()]


def _operators(rows) -> list[str]:
    return [op for op in HEADS if any(r["op"] == op for r in rows)]


def _lengths(rows, op) -> tuple[list[int], list[int]]:
    return tuple(zip(*sorted({(r["N"], r["pixels"]) for r in rows if r["op"] == op and r["sweep"]})))


def _short(factor: float) -> str:
    return f"{factor:.1f}" if factor < 10 else f"{factor:.0f}"

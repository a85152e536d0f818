"""The plots of the field's rows: curves over N with their slopes, speed-ups, shares of the limit, errors, energy."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter

from . import peers, style
from .curves import SLOPE_FROM_N, fit
from .field import best

# The lines of a plot over N: the paper's nine, the floor, and the closest structural peer.
LINES = (*peers.PAPER, "mean", "fastformer")
COLOURS = {
    "linear_infsa": "#0f62a8", "pure_infsa": "#0a9396", "softmax": "#8a4fa3", "linformer": "#c0843d", "performer": "#b5533c",
    "soft": "#7a8b3b", "flatten": "#c2699d", "agent": "#d9822b", "mlla": "#5b7a99", "mean": "#9aa3ab", "fastformer": "#a6761d",
}  # fmt: skip
OTHERS = "#b9c2cb"
PHASES = {"fwd": "forward", "train": "forward + backward"}
TITLES = {"operator": "operator: q, k, v given", "layer": "attention sub-layer, D = 1024", "model": "model"}


def draw_all(rows: list[dict], out: Path) -> list[Path]:
    """Every plot that the rows have points for, as OUT/field_*.png."""
    style.use()
    written = []
    for level in TITLES:
        mine = [r for r in rows if r["level"] == level]
        depths = sorted({r.get("depth") for r in mine}, key=lambda depth: depth or 0)
        for depth in depths:
            tag = f"{level}_{depth}" if depth else level
            title = TITLES[level] + (f" of {depth} layers" if depth else "")
            here = [r for r in mine if r.get("depth") == depth]
            figures = {
                "latency": over_N(here, "median_s", f"Time of one call, {title}", style.seconds, slopes=True),
                "memory": over_N(here, "peak_bytes", f"Peak memory beyond weights and inputs, {title}", style.megabytes),
                "speed_up": speed_ups(here, title),
            }
            if level == "model":
                figures["throughput"] = over_N(here, "images_per_s", f"Pictures per second, {title}", _plain)
                figures["energy"] = energies(here, title)
            else:
                figures["accuracy"] = errors(here, title)
            if level == "layer":
                figures["limit"] = shares(here)
            for name, figure in figures.items():
                if figure is not None:
                    style.caption(figure, {"environment": here[-1]["environment"]})
                    written.append(out / f"field_{tag}_{name}.png")
                    figure.savefig(written[-1])
                    plt.close(figure)
    return written


def points(rows: list[dict], name: str, phase: str, field: str) -> list[tuple[int, float]]:
    """(N, value) of the mechanism's fastest rows."""
    found = []
    for N in sorted({r["N"] for r in rows}):
        row = best(rows, N=N, phase=phase).get(name, {})
        value = 1 / row["median_s"] if field == "images_per_s" and "median_s" in row else row.get(field)
        if row.get("status") == "ok" and value:
            found.append((N, max(value, 1e5) if field == "peak_bytes" else value))
    return found


def over_N(rows, field, title, formatter, slopes=False):
    """One panel per phase: lines, their names at the end, and the exponent of their growth."""
    phases = [p for p in PHASES if any(len(points(rows, n, p, field)) for n in LINES)]
    if not phases:
        return None
    figure = plt.figure(figsize=(7.4 * len(phases), 5.6), layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0.03, 1, 0.97), w_pad=0.12)
    figure.suptitle(title, x=0.008, ha="left", fontsize=14, weight="bold")
    for ax, phase in zip(figure.subplots(1, len(phases), squeeze=False)[0], phases):
        curves = {name: found for name in LINES if (found := points(rows, name, phase, field))}
        lengths = sorted({N for found in curves.values() for N, _ in found})
        pixels = {r["N"]: r["pixels"] for r in rows}
        style.axis_of_lengths(ax, lengths, [pixels[N] for N in lengths], label_share=0.3)
        ax.set_yscale("log")
        ends = []
        for name, found in curves.items():
            own = name in peers.OWN
            ax.plot(*zip(*found), color=COLOURS[name], linewidth=2.8 if own else 1.5, marker="o", markersize=6 if own else 4,
                    zorder=4 if own else 3)  # fmt: skip
            ends.append((*found[-1], peers.label(name) + (_slope(found) if slopes else ""), COLOURS[name]))
        values = [v for found in curves.values() for _, v in found]
        span = max(values) / min(values)
        ax.set_ylim(min(values) / span**0.08, max(values) * span**0.12)
        ax.yaxis.set_major_formatter(FuncFormatter(formatter))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.set_title(PHASES[phase])
        figure.canvas.draw()
        style.label_ends(ax, ends)
    return figure


def _slope(found) -> str:
    found = [p for p in found if p[0] >= SLOPE_FROM_N] or found
    return f"  $N^{{{fit(found)[0]:.2f}}}$" if len(found) > 1 else ""


def headline(rows: list[dict]) -> int:
    """The largest picture at which most mechanisms have a time."""
    counts = {N: sum(r["status"] == "ok" for r in best(rows, N=N, phase="fwd").values()) for N in {r["N"] for r in rows}}
    return max(N for N, count in counts.items() if 2 * count >= max(counts.values()))


def speed_ups(rows, title):
    """How many times longer each mechanism takes than Linear-InfSA, calls in turn with it where the level has that."""
    N = headline(rows)
    panels = {}
    for phase in PHASES:
        chosen = {n: r for n, r in best(rows, N=N, phase=phase).items() if r["status"] == "ok"}
        own = chosen.get("linear_infsa", {}).get("median_s")
        if own and len(chosen) > 1:
            times = {n: r["median_s"] / (r.get("baseline_s") or own) for n, r in chosen.items() if n != "linear_infsa"}
            panels[phase] = sorted(times.items(), key=lambda item: item[1])
    if not panels:
        return None
    most = max(map(len, panels.values()))
    figure = plt.figure(figsize=(7.4 * len(panels), 1.6 + 0.27 * most), layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0.03, 1, 0.97), w_pad=0.12)
    pixels = next(r["pixels"] for r in rows if r["N"] == N)
    figure.suptitle(f"Time over Linear-InfSA's, {pixels}², {title}", x=0.008, ha="left", fontsize=14, weight="bold")
    for ax, (phase, bars) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        names, heights = zip(*bars)
        drawn = ax.barh([peers.label(n) for n in names], heights, color=[COLOURS.get(n, OTHERS) for n in names], height=0.72)
        ax.bar_label(drawn, [f"{h:.2g}×" if h < 10 else f"{h:.0f}×" for h in heights], padding=3, fontsize=8.5)
        ax.axvline(1, color=COLOURS["linear_infsa"], linewidth=1.6)
        ax.set_xscale("log")
        ax.set_xlim(min(0.5, *heights) / 1.3, max(2.0, *heights) * 2)
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}×"))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.invert_yaxis()
        ax.tick_params(axis="y", labelsize=9, length=0)
        ax.grid(axis="y", visible=False)
        ax.set_title(PHASES[phase])
    return figure


def errors(rows, title):
    """The largest error of every mechanism's output against float64, at each length."""
    found = [r for r in best_of_each(rows) if r["status"] in ("ok", "wrong") and r.get("error")]
    if not found:
        return None
    names = list(dict.fromkeys(r["name"] for r in sorted(found, key=lambda r: r["error"])))
    lengths = sorted({r["N"] for r in found})
    figure, ax = plt.subplots(figsize=(9, 1.6 + 0.27 * len(names)), layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0.03, 1, 0.97))
    for N, shade in zip(lengths, np.linspace(0.25, 1, len(lengths))):
        mine = [r for r in found if r["N"] == N]
        ax.scatter([r["error"] for r in mine], [names.index(r["name"]) for r in mine], alpha=shade, color=COLOURS["linear_infsa"],
                   label=f"N = {N:,}", s=34)  # fmt: skip
    ax.axvline(found[0]["bound"], color=style.LIMIT_COLOUR, linestyle=(0, (5, 3)), label="allowed")
    ax.set_yticks(range(len(names)), [peers.label(n) for n in names], fontsize=9)
    ax.invert_yaxis()
    ax.set_xscale("log")
    ax.set_title(f"Largest error against float64 over the largest entry, {title}")
    ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1), fontsize=9)
    return figure


def best_of_each(rows) -> list[dict]:
    return [r for N in sorted({r["N"] for r in rows}) for r in best(rows, N=N, phase="fwd").values()]


def shares(rows):
    """How fast a layer's least operations run beside the machine's fastest matrix product."""
    names = [n for n in peers.OWN if points(rows, n, "fwd", "share_of_limit")]
    if not names:
        return None
    figure, ax = plt.subplots(figsize=(8.4, 4.6), layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0.03, 1, 0.97))
    lengths = sorted({N for n in names for p in PHASES for N, _ in points(rows, n, p, "share_of_limit")})
    pixels = {r["N"]: r["pixels"] for r in rows}
    style.axis_of_lengths(ax, lengths, [pixels[N] for N in lengths], label_share=0.34)
    ends = []
    for name in names:
        for phase, dashes in (("fwd", "-"), ("train", ":")):
            if found := points(rows, name, phase, "share_of_limit"):
                colour = COLOURS.get(name, style.MUTED)
                ax.plot(*zip(*found), color=colour, linestyle=dashes, linewidth=2.4, marker="o", markersize=5)
                ends.append((*found[-1], f"{peers.label(name)}, {PHASES[phase]}", colour))
    ax.axhline(1, color=style.LIMIT_COLOUR, linestyle=(0, (5, 3)))
    ax.set_ylim(0, 1.15)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    ax.set_title("Layer's least operations beside the fastest matrix product")
    figure.canvas.draw()
    style.label_ends(ax, ends)
    return figure


def energies(rows, title):
    """Pictures per second over joules per picture, where they were measured."""
    found = [r for r in best_of_each(rows) if r.get("joules")]
    if not found:
        return None
    figure, ax = plt.subplots(figsize=(8.4, 5.2), layout="constrained")
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


def _plain(value: float, _=None) -> str:
    return f"{value:g}"

"""Rows of results, a line of JSON each: which of them are one measurement, which count, and what is read from them."""

import json
import math
import statistics
from pathlib import Path

from .engine import IDENTITY

PASSES = {"fwd": "forward", "bwd": "backward", "train": "forward + backward"}
TITLES = {"operator": "operator: q, k, v given", "layer": "attention sub-layer, D = 1024", "model": "model"}

# Rows that are results; the rest are tried again by the next run.
FINAL = ("ok", "wrong", "out of memory", "time limit", "unsupported")

# Below this length a call is launch and dispatch more than work.
SLOPE_FROM_N = 1024


def key(row: dict) -> tuple:
    """What makes two rows the same measurement."""
    return (*(row.get(f) for f in IDENTITY), *_machine(row), row.get("environment", {}).get("commit"))


def _machine(row: dict) -> tuple:
    return tuple(row.get("environment", {}).get(f) for f in ("device", "threads", "torch"))


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def load(path: Path) -> list[dict]:
    """The rows of a file, the last of each measurement."""
    return list({key(row): row for row in (read(path) if path.exists() else ())}.values())


def latest(rows: list[dict]) -> list[dict]:
    """Rows that may stand in one table: of the machine that measured last, and of each level's last commit there."""
    rows = [r for r in rows if _machine(r) == _machine(rows[-1])]
    commits = {r["level"]: r["environment"].get("commit") for r in rows}
    return [r for r in rows if r["environment"].get("commit") == commits[r["level"]]]


def select(rows: list[dict], **fields) -> list[dict]:
    """Those that have these values."""
    wanted = {"pass" if f == "which" else f: v for f, v in fields.items() if v is not None}
    return [r for r in rows if all(r.get(f) == v for f, v in wanted.items())]


def usual(rows: list[dict]) -> list[dict]:
    """Those in the layout, batch and dtype that most have: what makes curves and tables."""
    if not rows:
        return []
    dtype = statistics.mode(r["dtype"] for r in rows)
    return [r for r in rows if (r["layout"], r["batch"], r["dtype"]) == ("bnhd", 1, dtype) and r["way"] != "graph"]


def best(rows: list[dict], **fields) -> dict[str, dict]:
    """The fastest row of every mechanism among those that fit, or its first that tells why there is none; fastest first."""
    chosen = {}
    for row in sorted(select(rows, **fields), key=lambda r: r.get("median_s", math.inf)):
        chosen.setdefault(row["name"], row)
    return chosen


def over_linear(row: dict, chosen: dict[str, dict]) -> float | None:
    """Its time over that of Linear-InfSA: of calls in turn with it, or else of its own row."""
    reference = row.get("beside", {}).get("linear_infsa") or chosen.get("linear_infsa", {}).get("median_s")
    return row["median_s"] / reference if reference and "median_s" in row else None


def slope(points: list[tuple[int, float]]) -> float | None:
    """The exponent at which values grow with N, by least squares of the logarithms: 1 is linear, 2 quadratic."""
    points = [p for p in points if p[0] >= SLOPE_FROM_N] or points
    if len(points) < 2:
        return None
    x, y = zip(*((math.log(N), math.log(value)) for N, value in points))
    return statistics.linear_regression(x, y).slope


def durations(median: float, low: float | None = None, high: float | None = None) -> tuple[str, str]:
    """The median with the unit in which it is a number from 1 on, and the interval in the same unit."""
    units = ("s", 1), ("ms", 1e3), ("us", 1e6)
    name, factor = next((u for u in units if median * u[1] >= 0.9995), units[-1])

    def shown(seconds: float) -> str:
        value = seconds * factor
        return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"

    return f"{shown(median)} {name}", "" if low is None or high is None else f"[{shown(low)}, {shown(high)}]"


def columns(lines: list[list[str]], left: int) -> list[str]:
    """Cells as lines of text, all but the first columns to the right; the last cell of a shorter line may be longer."""
    widths = [max(len(line[i]) for line in lines if len(line) == len(lines[0])) for i in range(len(lines[0]))]
    return [
        "  ".join(c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths))).rstrip()
        for line in lines
    ]

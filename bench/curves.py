"""Curves over N from the rows, and the exponents at which they grow."""

import numpy as np

from .cases import DIRECTIONS, HEADS
from .ways import WAYS

# Below this length a call is launch and dispatch more than work.
SLOPE_FROM_N = 1024


def slopes(rows: list[dict]) -> list[dict]:
    """The exponent of time over N for every candidate: 1 is linear, 2 quadratic."""
    found = []
    for op in HEADS:
        for direction in DIRECTIONS:
            for name in WAYS:
                points = curve(rows, op, direction, name)
                points = [p for p in points if p[0] >= SLOPE_FROM_N] or points
                if len(points) >= 2:
                    exponent, offset = fit(points)
                    found.append(
                        {"op": op, "direction": direction, "candidate": name, "exponent": exponent, "offset": offset}
                        | {"from_N": points[0][0], "to_N": points[-1][0]}
                    )
    return found


def curve(
    rows: list[dict], op: str, direction: str, candidate: str, field: str = "median_s"
) -> list[tuple[int, float]]:
    """(N, value) of the rows that belong to the sweep over N and have that value."""
    mine = {"op": op, "direction": direction, "candidate": candidate, "sweep": True, "status": "ok"}
    return sorted((r["N"], r[field]) for r in rows if mine.items() <= r.items() and r.get(field) is not None)


def fit(points: list[tuple[int, float]]) -> tuple[float, float]:
    """exponent and offset of log time = exponent * log N + offset, by least squares."""
    N, seconds = np.array(points, dtype=float).T
    exponent, offset = np.polyfit(np.log(N), np.log(seconds), 1)
    return float(exponent), float(offset)

"""`python -m bench.compare A B`: how the times of B stand to those of A, row by row, and which changes exceed the noise.

A and B are results.json of bench.run or rows.jsonl of bench.field. The noise of a row is the interval of its calls from the
20th to the 80th percentile; of a row that was measured several times, the interval of the medians. A change counts where the
intervals of A and B do not meet. The exit status is 1 if something became slower or has no time any more.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

# What names a measurement, in the rows of bench.field, of bench.run and of its layer.
IDENTITY = {
    "field": ("level", "device", "dtype", "name", "depth", "pixels", "phase", "way"),
    "run": ("op", "candidate", "variant", "N", "direction"),
    "layer": ("candidate", "dtype", "N", "direction"),
}
MACHINE = ("device", "threads", "torch", "infsa_kernels", "commit", "isa")

# Rows that say nothing of the code.
NO_RESULT = ("not reached", "skipped")

# Fewer calls have no interval.
LEAST_SAMPLES = 3


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("a", type=Path, help="results.json or rows.jsonl")
    parser.add_argument("b", type=Path, help="the same, of what is to be judged")
    args = parser.parse_args(arguments)
    return show(load(args.a), load(args.b))


def show(a: dict[tuple, dict], b: dict[tuple, dict]) -> int:
    """Prints the comparison; returns the exit status."""
    changes = compare(a, b)
    print(text(changes, a, b))
    return int(any(c["change"] in ("slower", "lost") for c in changes))


def load(path: Path) -> dict[tuple, dict]:
    """The rows of a file by measurement; repetitions in one environment are one row, of an older one are left out."""
    if path.suffix == ".jsonl":
        return merge([json.loads(line) for line in path.read_text().splitlines() if line.strip()])
    found = json.loads(path.read_text())
    return merge([{**r, "environment": found["environment"]} for r in [*found["rows"], *found.get("layer", [])]])


def merge(rows: list[dict]) -> dict[tuple, dict]:
    """One row per measurement, with ``low_s`` and ``high_s``, None where the calls were too few to tell."""
    groups = {}
    for row in rows:
        if row["status"] not in NO_RESULT:
            groups.setdefault(identity(row), []).append(row)
    return {key: _one([r for r in group if _machine(r) == _machine(group[-1])]) for key, group in groups.items()}


def identity(row: dict) -> tuple:
    kind = "field" if "level" in row else "run" if "op" in row else "layer"
    return kind, *(row.get(f) for f in IDENTITY[kind])


def compare(a: dict[tuple, dict], b: dict[tuple, dict]) -> list[dict]:
    """What became of every measurement of A that B has too."""
    return [{"what": _name(key), **_change(a[key], b[key])} for key in a if key in b]


def text(changes: list[dict], a: dict[tuple, dict], b: dict[tuple, dict]) -> str:
    lines = [f"{side}: {_describe(rows)}" for side, rows in (("A", a), ("B", b))]
    if {_hardware(r) for r in a.values()} != {_hardware(r) for r in b.values()}:
        lines.append("WARNING: the machines or their settings differ: the ratios are not those of the code")
    width = max([len(c["what"]) for c in changes], default=10)
    lines.append(f"\n{'':<{width}}{'A':>14}{'B':>14}{'B / A':>8}  noise")
    for c in changes:
        noise = "[{:.2f}, {:.2f}]".format(*c["noise"]) if c.get("noise") else "few calls" if "ratio" in c else ""
        times = [_milliseconds(c[side]) if isinstance(c[side], float) else c[side] for side in "ab"]
        ratio = f"{c['ratio']:.3f}" if "ratio" in c else ""
        lines.append(f"{c['what']:<{width}}{times[0]:>14}{times[1]:>14}{ratio:>8}  {noise:<14}{c['change']}".rstrip())
    counts = {change: sum(c["change"] == change for c in changes) for change in ("slower", "faster", "lost", "new")}
    beyond = (
        ", ".join(f"{count} {change}" for change, count in counts.items() if count) or "none changed beyond its noise"
    )
    lines.append(
        f"\n{len(changes)} rows in both: {beyond}. Only in A: {len(a.keys() - b.keys())}, in B: {len(b.keys() - a.keys())}."
    )
    return "\n".join(lines)


def _one(group: list[dict]) -> dict:
    timed = [r for r in group if r["status"] == "ok"]
    if not timed or group[-1]["status"] != "ok":
        return group[-1]
    medians = [r["median_s"] for r in timed]
    row = timed[-1]
    if len(medians) > 1:
        low, high = min(medians), max(medians)
    elif row["samples"] >= LEAST_SAMPLES:
        low, high = row["p20_s"], row["p80_s"]
    else:
        low = high = None
    return {**row, "median_s": statistics.median(medians), "low_s": low, "high_s": high}


def _change(a: dict, b: dict) -> dict:
    if a["status"] != "ok" or b["status"] != "ok":
        sides = {side: r["median_s"] if r["status"] == "ok" else r["status"] for side, r in (("a", a), ("b", b))}
        change = "lost" if a["status"] == "ok" else "new" if b["status"] == "ok" else ""
        return {**sides, "change": change}
    ratio, noise, change = b["median_s"] / a["median_s"], None, ""
    if a["low_s"] and b["low_s"]:
        noise = b["low_s"] / a["high_s"], b["high_s"] / a["low_s"]
        change = "slower" if noise[0] > 1 else "faster" if noise[1] < 1 else ""
    return {"a": a["median_s"], "b": b["median_s"], "ratio": ratio, "noise": noise, "change": change}


def _machine(row: dict) -> tuple:
    return tuple(row.get("environment", {}).get(f) for f in MACHINE)


def _hardware(row: dict) -> tuple:
    return tuple(row.get("environment", {}).get(f) for f in ("device", "threads", "isa"))


def _describe(rows: dict[tuple, dict]) -> str:
    machines = dict.fromkeys(_machine(r) for r in rows.values())
    return "; ".join(", ".join(str(fact) for fact in machine if fact) for machine in machines) or "no rows"


def _name(key: tuple) -> str:
    kind, *fields = key
    return " ".join([*(["layer"] if kind == "layer" else []), *(str(f) for f in fields if f is not None)]) + "  "


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


if __name__ == "__main__":
    sys.exit(main())

"""`python -m bench.field operator|layer|model`: InfSA among the mechanisms of the field, on one of three levels.

    operator   q, k, v given                 layer   tokens -> attention sub-layer -> tokens, D = 1024
    model      a picture -> class scores of a 4- or 24-layer Vision Transformer

Each point runs in a process of its own (worker.py) and becomes a row of OUT/rows.jsonl, with environment and commit. Points
that have their row are not run again (`--again` runs them), so an interrupted run goes on. What the level's minutes do not
reach says so.
"""

import argparse
import json
import sys
import time
from pathlib import Path

from tqdm import tqdm

from . import peers
from .worker import ROOT, Worker

LEVELS = ("operator", "layer", "model")
SIZES = {
    ("operator", "cpu"): (224, 1024, 2048), ("layer", "cpu"): (224, 1024, 2048),
    ("model", "cpu"): (224, 1024, 2048, 4096, 9216),
    ("operator", "cuda"): (224, 1024, 4096, 9216), ("layer", "cuda"): (224, 1024, 2048, 4096, 9216),
    ("model", "cuda"): (224, 1024, 2048, 4096, 9216),
}  # fmt: skip
QUICK_SIZES = (224, 512)
MINUTES = {"cpu": {"operator": 1.5, "layer": 7, "model": 5.5}, "cuda": {"operator": 2, "layer": 4, "model": 2.5}}
QUICK_MINUTES = 1.5

# Seconds of one point, with its building, check and compilation.
LIMIT = {"operator": 25, "layer": 40, "model": 60}
BUDGET, QUICK_BUDGET = 0.3, 0.05

# Rows that are results; the rest are tried again by the next run.
FINAL = ("ok", "wrong", "out of memory", "time limit", "unsupported")
COMPILED_PIXELS = 1024
DTYPE = {"cpu": "fp32", "cuda": "bf16"}


def plan(level: str, names: list[str], sizes: list[int], device: str, compiled: bool = True) -> list[dict]:
    """Points in the order of their worth: all mechanisms in eager from small to large, then what torch.compile makes of them."""
    base = {"level": level, "device": device, "dtype": DTYPE[device]}
    if level == "model":
        return [
            {**base, "name": name, "depth": depth, "pixels": pixels, "phase": phase, "way": "eager"}
            for depth, phase, pixels in sorted(
                ((depth, phase, pixels) for depth in (4, 24) for phase in ("fwd", "train") for pixels in sizes),
                key=lambda p: (p[2] * p[0] * (2 if p[1] == "train" else 1), p),
            )
            for name in names
        ]
    points = []
    for pixels in sorted(sizes):
        for phase in ("fwd", "train"):
            points += [{**base, "name": name, "pixels": pixels, "phase": phase, "way": "eager"} for name in names]
            if "softmax" in names:
                kinds = ("flash", "efficient", "cudnn", "math") if device == "cuda" else ("math",)
                points += [
                    {**base, "name": "softmax", "pixels": pixels, "phase": phase, "way": f"sdpa:{kind}"} for kind in kinds
                ]
    if compiled:
        # The kernels of this package are the same compiled: what is left is the peers.
        for pixels in sorted(sizes, key=lambda p: (p != COMPILED_PIXELS, -p)):
            for phase in ("fwd", "train"):
                points += [
                    {**base, "name": name, "pixels": pixels, "phase": phase, "way": "compile"}
                    for name in names
                    if name not in peers.OWN
                ]
    return points


def key(row: dict) -> tuple:
    """What makes two rows the same measurement."""
    e = row.get("environment", {})
    return (
        *(row.get(f) for f in ("level", "device", "dtype", "name", "depth", "pixels", "phase", "way")),
        *(e.get(f) for f in ("device", "threads", "torch", "commit")),
    )


def load(path: Path) -> list[dict]:
    """The rows of a file, the last of each measurement."""
    if not path.exists():
        return []
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    return list({key(row): row for row in rows}.values())


def too_long(point: dict, rows: list[dict], limit: float) -> str | None:
    """Why a point is not tried, if a smaller picture's row tells that it would take too long or too much memory."""
    same = ("level", "name", "depth", "phase", "way")
    smaller = [r for r in rows if all(r.get(f) == point.get(f) for f in same) and r["pixels"] < point["pixels"]]
    if not smaller:
        return None
    last = max(smaller, key=lambda r: r["pixels"])
    if last["status"] in ("time limit", "out of memory"):
        return f"{last['status']} at {last['pixels']} pixels"
    if last["status"] != "ok":
        return None
    growth = (point["pixels"] / last["pixels"]) ** (4 if peers.MECHANISMS[point["name"]][0].QUADRATIC else 2)
    seconds = last["median_s"] * growth
    # A call to warm up and one that counts.
    return f"a call would take ~{seconds:.0f} s" if 2 * seconds > limit else None


def run(args: argparse.Namespace) -> list[dict]:
    """Measures what has no row yet and appends it; returns the level's rows."""
    path = args.out / "rows.jsonl"
    args.out.mkdir(parents=True, exist_ok=True)
    points = plan(args.level, args.only, args.sizes, args.device, not args.quick)
    end = time.monotonic() + 60 * args.minutes
    known = {key(row): row for row in load(path) if row["status"] in FINAL and not args.again}
    found = []
    with Worker(args.device, args.budget) as worker, path.open("a") as file:
        worker.measure({**points[0], "name": "mean", "pixels": 64}, args.limit)  # starts it, and tells the environment
        environment = worker.environment
        for point in tqdm(points, unit="point", dynamic_ncols=True, desc=args.level):
            row = known.get(key({**point, "environment": environment}))
            if row is None:
                left = end - time.monotonic()
                if left < 2:
                    row = {**point, "status": "not reached", "reason": f"the level's {args.minutes:g} minutes were over"}
                elif why := too_long(point, found, args.limit):
                    row = {**point, "status": "time limit", "reason": why}
                else:
                    row = worker.measure(point, min(args.limit, left + 5))
                row.setdefault("label", peers.label(point["name"]))
                row["N"] = (point["pixels"] // 16) ** 2
                row["environment"] = environment
                file.write(json.dumps(row) + "\n")
                file.flush()
            found.append(row)
    return found


def best(rows: list[dict], **fields) -> dict[str, dict]:
    """The fastest row of every mechanism among those that fit, or its first that tells why there is none."""
    chosen = {}
    for row in rows:
        if any(row.get(f) != value for f, value in fields.items()):
            continue
        known = chosen.get(row["name"])
        if known is None or row.get("median_s", float("inf")) < known.get("median_s", float("inf")):
            chosen[row["name"]] = row
    return chosen


def text(rows: list[dict], level: str) -> str:
    """A table per depth, size and phase: the fastest first."""
    lines = []
    cases = dict.fromkeys((r.get("depth"), r["pixels"], r["phase"]) for r in rows if r["level"] == level)
    for depth, pixels, phase in cases:
        chosen = best(rows, level=level, depth=depth, pixels=pixels, phase=phase)
        if not any(r["status"] == "ok" for r in chosen.values()):
            continue
        own = chosen.get("linear_infsa", {}).get("median_s")
        what = f"{depth} layers, " if depth else ""
        lines.append(f"\n{level}, {what}{pixels} x {pixels}, N = {(pixels // 16) ** 2}, {phase}")
        lines.append(f"{'':<34}{'way':<11}{'time':>11}{'x Linear':>10}{'MB':>9}{'params':>11}{'error':>10}")
        for row in sorted(chosen.values(), key=lambda r: r.get("median_s", float("inf"))):
            if row["status"] != "ok":
                lines.append(f"{row['label']:<34}{row['status']}: {row['reason'][:80]}")
                continue
            reference = row.get("baseline_s") or own
            ratio = f"{row['median_s'] / reference:.2f}" if reference else "-"
            error = f"{row['error']:.0e}" if "error" in row else "-"
            memory = f"{row['peak_bytes'] / 1e6:.0f}" if "peak_bytes" in row else "-"
            lines.append(
                f"{row['label']:<34}{row['way']:<11}{row['median_s'] * 1e3:>8.2f} ms{ratio:>10}{memory:>9}"
                f"{row['parameters']:>11,}{error:>10}"
            )
    return "\n".join(lines)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.field", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("level", choices=LEVELS)
    parser.add_argument("--only", type=_names, help=f"mechanisms, e.g. softmax,mlla+local; of {', '.join(peers.MECHANISMS)}")
    parser.add_argument("--sizes", type=_integers, help="sides of the picture in pixels, multiples of 16")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--quick", action="store_true", help="small pictures, no torch.compile: under two minutes")
    parser.add_argument("--again", action="store_true", help="measure also what has its row")
    parser.add_argument("--minutes", type=float, help="the most that the level takes")
    parser.add_argument("--limit", type=float, help="seconds that a point may take, with its building, check and compilation")
    parser.add_argument("--budget", type=float, help="seconds of calls per point")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "out", help="folder of rows.jsonl")
    args = parser.parse_args(arguments)
    if args.device == "auto":
        import torch

        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.only is None:
        args.only = [n for n in peers.MECHANISMS if args.level == "layer" or "+" not in n and not n.endswith("per_token")]
        if args.level == "model":
            args.only = list(peers.PAPER)
    args.sizes = args.sizes or list(QUICK_SIZES if args.quick else SIZES[args.level, args.device])
    args.minutes = args.minutes or (QUICK_MINUTES if args.quick else MINUTES[args.device][args.level])
    args.limit = args.limit or LIMIT[args.level]
    args.budget = args.budget or (QUICK_BUDGET if args.quick else BUDGET)
    return args


def _names(value: str) -> list[str]:
    names = [part for part in value.split(",") if part]
    if unknown := set(names) - set(peers.MECHANISMS):
        raise argparse.ArgumentTypeError(f"no mechanism {', '.join(sorted(unknown))}; there are {', '.join(peers.MECHANISMS)}")
    return names


def _integers(value: str) -> list[int]:
    sizes = [int(part) for part in value.split(",")]
    if any(size < 112 or size % 16 for size in sizes):
        raise argparse.ArgumentTypeError("a size is a multiple of 16 from 112: mechanisms pool 7 x 7 landmarks from the grid")
    return sizes


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    rows = run(args)
    print(text(rows, args.level))
    print(f"\nRows are in {args.out / 'rows.jsonl'}; `make report` draws them.")
    return int(any(row["status"] == "wrong" for row in rows))


if __name__ == "__main__":
    sys.exit(main())

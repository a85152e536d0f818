"""`python -m bench.field operator|layer|model`: InfSA among the mechanisms of the field, on one of three levels.

    operator   q, k, v given                 layer   tokens -> attention sub-layer -> tokens, D = 1024
    model      a picture -> class scores of a 4- or 24-layer Vision Transformer

Each point runs in a process of its own (worker.py) and becomes a row of OUT/rows.jsonl, with environment and commit. Points
that have their row are not run again (`--again` runs them), so an interrupted run goes on. What the level's minutes do not
reach says so.
"""

import argparse
import itertools
import json
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from . import peers, scaffold
from .field_rows import FINAL, key, load, text
from .image import PATCH, D
from .worker import ROOT, Worker

LEVELS = ("operator", "layer", "model")

# Local parts and the layer per token exist in the layer alone; the models are the paper's.
NAMES = {"operator": list(peers.CORES), "layer": list(peers.MECHANISMS), "model": list(peers.PAPER)}
SIZES = {
    ("operator", "cpu"): (224, 1024, 2048), ("layer", "cpu"): (224, 1024, 2048),
    ("model", "cpu"): (224, 1024, 2048, 4096, 9216),
    ("operator", "cuda"): (224, 1024, 4096, 9216), ("layer", "cuda"): (224, 1024, 2048, 4096, 9216),
    ("model", "cuda"): (224, 1024, 2048, 4096, 9216),
}  # fmt: skip
QUICK_SIZES = (224, 512)
MINUTES = {"cpu": {"operator": 2.5, "layer": 10, "model": 6}, "cuda": {"operator": 2, "layer": 4, "model": 2.5}}
QUICK_MINUTES = 1.5

# W in 4 N D (W D + N), the operations of a quadratic mechanism on N tokens: products with weights beside those with scores.
WEIGHTS = {"operator": 0, "layer": 2, "model": 6}

# Seconds that a level's last point may go on beyond its minutes.
GRACE = 5

# Seconds of one point, with its building, check and compilation.
LIMIT = {"operator": 25, "layer": 40, "model": 60}
BUDGET, QUICK_BUDGET = 0.3, 0.05

# The size whose compiled points come first.
COMPILED_PIXELS = 1024
DTYPE = {"cpu": "fp32", "cuda": "bf16"}


def plan(level: str, names: list[str], sizes: list[int], device: str, compiled: bool = True) -> list[dict]:
    """Points in the order of their worth, for time may end: the last ones are left to the next run."""
    depths = tuple(scaffold.HEADS) if level == "model" else (None,)
    points = [
        {
            "level": level,
            "device": device,
            "dtype": DTYPE[device],
            "name": name,
            "pixels": pixels,
            "phase": phase,
            "way": way,
        }
        | ({"depth": depth} if depth else {})
        for depth, pixels, phase, name in itertools.product(depths, sizes, ("fwd", "train"), names)
        for way in _ways(level, name, device, compiled)
    ]
    return sorted(points, key=_worth)


def _ways(level: str, name: str, device: str, compiled: bool) -> list[str]:
    ways = ["eager"]
    if level != "model" and name == "softmax":
        ways += [
            f"sdpa:{kind}" for kind in (("flash", "efficient", "cudnn", "math") if device == "cuda" else ("math",))
        ]
    # The kernels of this package are the same compiled.
    return [*ways, "compile"] if compiled and level != "model" and name not in peers.OWN else ways


def _worth(point: dict) -> tuple:
    """What sorts points: mechanisms before their variants, eager before compiled, small before large."""
    if point["level"] == "model":
        return (
            point["pixels"] * point["depth"] * (2 if point["phase"] == "train" else 1),
            point["pixels"],
            point["phase"],
        )
    variant, compiled = point["name"] in peers.VARIANTS, point["way"] == "compile"
    if compiled:
        stage = 1 if point["pixels"] == COMPILED_PIXELS and not variant else 3
    else:
        stage = 2 if variant else 0
    return stage, point["pixels"], point["phase"]


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
    seconds = last["median_s"] * _operations(point) / _operations(last)
    # A call to warm up and one that counts.
    return f"a call would take ~{seconds:.0f} s" if 2 * seconds > limit else None


def _operations(point: dict) -> float:
    """What a point's time grows with."""
    N = (point["pixels"] // PATCH) ** 2
    return N * (WEIGHTS[point["level"]] * D + N) if peers.MECHANISMS[point["name"]][0].QUADRATIC else N


def run(args: argparse.Namespace) -> list[dict]:
    """Measures what has no row yet and appends it; returns the level's rows."""
    path = args.out / "rows.jsonl"
    args.out.mkdir(parents=True, exist_ok=True)
    points = plan(args.level, args.only, args.sizes, args.device, not args.quick)
    end = time.monotonic() + 60 * args.minutes
    known = {key(row): row for row in load(path) if row["status"] in FINAL and not args.again}
    found = []
    with Worker(args.device, args.budget) as worker, path.open("a") as file:
        environment = worker.environment
        for point in tqdm(points, unit="point", dynamic_ncols=True, desc=args.level):
            row = known.get(key({**point, "environment": environment}))
            if row is None:
                left = end - time.monotonic()
                over = {"status": "not reached", "reason": f"the level's {args.minutes:g} minutes were over"}
                if left < 2:
                    row = point | over
                elif why := too_long(point, found, args.limit):
                    row = {**point, "status": "time limit", "reason": why}
                else:
                    row = worker.measure(point, min(args.limit, left + GRACE))
                    if row["status"] == "time limit" and left + GRACE < args.limit:
                        row = point | over
                row.setdefault("label", peers.label(point["name"]))
                row["N"] = (point["pixels"] // PATCH) ** 2
                row["environment"] = environment
                file.write(json.dumps(row) + "\n")
                file.flush()
            found.append(row)
    return found


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.field", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("level", choices=LEVELS)
    parser.add_argument(
        "--only", type=names_of, help=f"mechanisms, e.g. softmax,mlla+local; of {', '.join(peers.MECHANISMS)}"
    )
    parser.add_argument("--sizes", type=sizes_of, help="sides of the picture in pixels, multiples of 16")
    parser.add_argument(
        "--device", default="auto", choices=("auto", "cpu", "cuda"), help="default: cuda if there is one"
    )
    parser.add_argument("--quick", action="store_true", help="small pictures, no torch.compile: under two minutes")
    parser.add_argument("--again", action="store_true", help="measure also what has its row")
    parser.add_argument("--minutes", type=float, help="the most that the level takes")
    parser.add_argument(
        "--limit", type=float, help="seconds that a point may take, with its building, check and compilation"
    )
    parser.add_argument("--budget", type=float, help="seconds of calls per point")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "out", help="folder of rows.jsonl")
    args = parser.parse_args(arguments)
    args.device = device_of(args.device)
    args.only = args.only or NAMES[args.level]
    args.sizes = args.sizes or list(QUICK_SIZES if args.quick else SIZES[args.level, args.device])
    args.minutes = args.minutes or (QUICK_MINUTES if args.quick else MINUTES[args.device][args.level])
    args.limit = args.limit or LIMIT[args.level]
    args.budget = args.budget or (QUICK_BUDGET if args.quick else BUDGET)
    return args


def device_of(name: str) -> str:
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def names_of(value: str) -> list[str]:
    names = [part for part in value.split(",") if part]
    if unknown := set(names) - set(peers.MECHANISMS):
        raise argparse.ArgumentTypeError(
            f"no mechanism {', '.join(sorted(unknown))}; there are {', '.join(peers.MECHANISMS)}"
        )
    return names


def sizes_of(value: str) -> list[int]:
    sizes = [int(part) for part in value.split(",")]
    if any(size < 112 or size % 16 for size in sizes):
        raise argparse.ArgumentTypeError(
            "a size is a multiple of 16 from 112: mechanisms pool 7 x 7 landmarks from the grid"
        )
    return sizes


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    rows = run(args)
    print(text(rows, args.level))
    print(f"\nRows are in {args.out / 'rows.jsonl'}; `make report` draws them.")
    return int(any(row["status"] == "wrong" for row in rows))


if __name__ == "__main__":
    sys.exit(main())

"""`python -m bench.run`: measures both operators and the pooled layer on a photograph, and writes table, JSON and plots."""

import argparse
import json
import sys
import time
import warnings
from pathlib import Path

import torch
from tqdm import tqdm

from . import curves, goals, layer, machine, plots, report
from .cases import HEADS, SIZES, plan
from .image import queries_keys_values
from .sweep import PHASES, Settings, Sweep
from .ways import WAYS

SCHEMA = 1
QUICK_SIZES = (224, 512, 1024)
LAYER = "layer"


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    settings = Settings(device, dtype, tuple(args.peers), budget=args.budget, limit=args.limit)
    results = measure(settings, args.only, args.sizes)

    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    written = plots.draw_all(results, args.out) if results["rows"] else []
    text = report.text(results)
    (args.out / "table.txt").write_text(text + "\n")
    print(f"\nWritten to {args.out}: results.json, table.txt, {', '.join(path.name for path in written)}\n")
    print(text)
    return int(any(row["status"] == "wrong" for row in results["rows"] + results["layer"]))


def measure(settings: Settings, ops: list[str], sizes: list[int]) -> dict:
    """Everything that the report shows, as plain data."""
    warnings.filterwarnings("ignore", module="torch._inductor|torch._dynamo")
    began, other_load = time.perf_counter(), machine.OtherLoad()
    cases = plan([op for op in ops if op in HEADS], sizes, settings.dtype)
    found, flat, pixels = [], None, None
    with tqdm(total=len(cases) * len(PHASES) + 1, unit="step", dynamic_ncols=True) as bar:

        def progress(what: str) -> None:
            bar.update()
            bar.set_description(what)

        bar.set_description("ceilings of the machine")
        ceilings = machine.ceilings(settings.device, settings.dtype)
        dispatch = machine.dispatch(settings.device)
        sweep = Sweep(settings, ceilings, progress)
        for case in cases:
            if case.pixels != pixels:
                pixels, flat = case.pixels, queries_keys_values(case.pixels)
            found += sweep.run(case, flat)
        of_layer = layer.measure(settings, sizes, bar.set_description) if LAYER in ops else []
        bar.update()
    results = {
        "schema": SCHEMA,
        "environment": machine.environment(settings.device) | {"other_load": other_load.share()},
        "ceilings": ceilings,
        "dispatch": dispatch,
        "rows": found,
        "layer": of_layer,
    }
    results["slopes"] = curves.slopes(found)
    results["goals"] = goals.compare(results)
    results["seconds"] = time.perf_counter() - began
    return results


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__)
    parser.add_argument("--out", type=Path, default=machine.ROOT / "bench" / "out", help="folder for results and plots")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: cuda if there is one)")
    parser.add_argument("--only", choices=[*HEADS, LAYER], action="append", help="one of them (default: all)")
    parser.add_argument("--sizes", type=_integers, help="side lengths of the picture in pixels, e.g. 224,1024")
    parser.add_argument(
        "--peers", type=_peers, help="comparators, e.g. eager,sdpa (default: all; quick: all but compile)"
    )
    parser.add_argument("--budget", type=float, help="seconds of calls per candidate and case (default 1)")
    parser.add_argument("--limit", type=float, help="seconds that one call of a comparator may take (default 10)")
    parser.add_argument("--quick", action="store_true", help="small sizes, no torch.compile: under a minute")
    args = parser.parse_args(arguments)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.only = args.only or [*HEADS, LAYER]
    args.peers = (
        args.peers if args.peers is not None else [p for p in list(WAYS)[1:] if not (args.quick and p == "compile")]
    )
    args.sizes = args.sizes or list(QUICK_SIZES if args.quick else SIZES)
    args.budget = args.budget or (0.2 if args.quick else 1.0)
    args.limit = args.limit or (2.0 if args.quick else 10.0)
    return args


def _integers(text: str) -> list[int]:
    sizes = [int(part) for part in text.split(",")]
    if min(sizes) < 16:
        raise argparse.ArgumentTypeError("a size is a number of pixels, at least 16: one patch")
    return sizes


def _peers(text: str) -> list[str]:
    names = [part for part in text.split(",") if part]
    if unknown := set(names) - set(WAYS):
        raise argparse.ArgumentTypeError(f"no comparator {', '.join(sorted(unknown))}; there are {', '.join(WAYS)}")
    return [name for name in names if name != "infsa"]


if __name__ == "__main__":
    sys.exit(main())

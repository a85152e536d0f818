"""`python -m bench.gpu_check --out DIR`: everything that has to be seen on a GPU, in parts, each with its own JSON.

A part whose JSON lies in DIR is not run again (`--again` runs it), so a machine that goes away costs one part; `--seconds`
begins no part after that time, for machines lent by the minute. The last step merges the parts into DIR/results.json, draws
DIR/goals.png and DIR/roofline.png and prints one short table. `--dry-run` walks through the parts on the CPU with tiny sizes,
in Triton's interpreter (TRITON_INTERPRET=1), for the test of this script: its figures mean nothing.

Needs torch, triton, numpy, pytest and matplotlib, and no network.
"""

import argparse
import json
import os
import sys
import time
import traceback
from pathlib import Path

import torch

from . import gpu_goals, gpu_plots, gpu_right, machine, tune

PARTS = {
    "backends": gpu_right.backends,
    "graph": gpu_right.graph,
    "ceilings": gpu_goals.ceilings,
    "agreement": gpu_right.agreement,
    "repeatability": gpu_right.repeatability,
    "large": gpu_right.large,
    "devices": gpu_right.devices,
    "linear": gpu_goals.linear,
    "pure": gpu_goals.pure,
    "sanitizer": gpu_right.sanitizer,
    "suite": gpu_right.suite,
    "tune": tune.quick,
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check", description=__doc__)
    out = machine.ROOT / "bench" / "out" / "gpu"
    parser.add_argument("--out", type=Path, default=out, help="folder for JSON, logs and plots")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"which of {', '.join(PARTS)}, in this order")
    parser.add_argument("--again", action="store_true", help="run parts that are done already")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no part after this time")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, tiny sizes")
    parser.add_argument("--touch", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if unknown := set(args.parts.split(",")) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if args.dry_run and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("--dry-run needs TRITON_INTERPRET=1 in the environment")
    if not args.dry_run and not torch.cuda.is_available():
        parser.error("torch sees no GPU; --dry-run runs on the CPU")
    args.device = torch.device("cpu") if args.dry_run else torch.device("cuda", 0)
    if args.touch:
        gpu_right.touch(args.device)
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    for name in args.parts.split(","):
        at = args.out / f"{name}.json"
        if (at.exists() and not args.again) or time.perf_counter() - began > args.seconds:
            continue
        at.write_text(json.dumps(run(PARTS[name], args), indent=1) + "\n")
        print(f"{name}: {json.loads(at.read_text())['seconds']:.0f} s", flush=True)
    return report(args)


def run(part, args) -> dict:
    """What a part found; an exception is a finding too."""
    began = time.perf_counter()
    torch.manual_seed(0)
    try:
        found = part(args)
    except Exception:
        found = {"passed": False, "reason": traceback.format_exc()}
    return {**found, "seconds": time.perf_counter() - began}


def report(args) -> int:
    parts = {name: json.loads(at.read_text()) for name in PARTS if (at := args.out / f"{name}.json").exists()}
    goals, rows, ratios = gpu_goals.compare(parts), gpu_goals.beside_the_floor(parts), gpu_goals.ratios(parts)
    environment = machine.environment(args.device)
    results = {"environment": environment, "parts": parts, "goals": goals, "rows": rows, "ratios": ratios}
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    try:
        gpu_plots.draw_goals(goals, args.out / "goals.png")
        gpu_plots.draw_roofline(rows, args.out / "roofline.png")
    except ImportError as error:
        print(f"no plots: {error}")
    print()
    for row in rows:
        print(
            f"{row['what']:<36} {row['seconds'] * 1e6:>12.1f} us, floor {row['floor']:>5.0%}, "
            f"predicted {row['predicted'] * 1e6:>12.1f} us"
        )
    for ratio in ratios:
        print(f"{ratio['what']:<58} {ratio['value']:>12.3g}")
    print()
    for name in PARTS:
        part = parts.get(name, {"passed": None, "reason": "not run"})
        if "passed" in part:
            verdict = {True: "passed", False: "FAILED", None: part.get("reason")}[part["passed"]]
            print(f"{name:<14} {verdict}")
        for key in ("reason", "wrong", "differing", "files", "nodes"):
            if part.get("passed") is False and part.get(key):
                print(f"  {key}: {part[key]}")
    for goal in goals:
        value = "not measured" if goal["value"] is None else f"{goal['value']:.3g}"
        print(f"{goal['goal']:<58} {goal['target']:>8} {value:>12}  {'reached' if goal['reached'] else ''}")
    return int(any(part.get("passed") is False for part in parts.values()))


if __name__ == "__main__":
    sys.exit(main())

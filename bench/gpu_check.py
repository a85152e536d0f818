"""`python -m bench.gpu_check --out DIR`: everything that has to be seen on a GPU: the tests, the goals' figures, a few tiles.

What a file of DIR has is not done again, so a machine that goes away costs what it was at; `--seconds` begins no part after that
time. The last step prints one short table and draws DIR/goals.png and the plots of the rows. `--dry-run` does the same on the
CPU with tiny sizes in Triton's interpreter (TRITON_INTERPRET=1): its figures mean nothing.

Needs torch, triton, numpy, psutil, pytest and matplotlib, and no network.
"""

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

from . import cases, goals, tune
from .machine import ROOT
from .rows import load, select
from .run import describe, run

# Tests with a `backend` fixture, and with no package that a lent machine lacks.
TESTS = ("gpu_kernels", "operators", "masks", "tables", "gradients", "numerics", "autograd_features", "transforms", "autocast",
         "bad_input", "library", "varlen", "pooled_linear")  # fmt: skip
TEST_SECONDS, SPEED_MINUTES = 450, 20


def tests(args) -> None:
    """The shared tests and the GPU's own on each of our backends, a process for each file; DIR/tests.json."""
    at = args.out / "tests.json"
    if at.exists():
        return
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    options = ["-k", "(cuda-triton or cuda-cuda) and not float64 or sanitizer or our_kernels"]
    if args.dry_run:
        options = ["-k", "test_every_tile and linear"]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options]
    processes = {}
    for name in TESTS[: 1 if args.dry_run else None]:
        log = (args.out / f"tests_{name}.log").open("w")
        file = next((ROOT / "tests").glob(f"**/test_{name}.py"))
        processes[name] = subprocess.Popen([*command, file], env=environment, cwd=ROOT, stdout=log, stderr=log)
    found, end = {}, time.monotonic() + TEST_SECONDS
    for name, process in processes.items():
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(1, end - time.monotonic()))
        process.kill()
        counts = re.findall(r"\d+ (?:passed|failed|skipped|error)", (args.out / f"tests_{name}.log").read_text())
        # 5: no test of this file is for a GPU.
        found[name] = {"passed": process.wait() in (0, 5), "tests": ", ".join(counts)}
    at.write_text(json.dumps(found, indent=1) + "\n")


def speed(args) -> None:
    """The rows of every goal, each mechanism checked first; DIR/rows.jsonl."""
    plan = cases.goals(args.device, args.dry_run)

    def show(number: int, name: str | None) -> None:
        if name == "":
            print(f"{number + 1}/{len(plan)} {describe(plan[number])}", flush=True)

    run(plan, args.out, args.device, SPEED_MINUTES, 0.01 if args.dry_run else 0.4, show)


def tiles(args) -> None:
    """A few candidates at the paper's heads, or all; DIR/tune.json."""
    if not (args.out / "tune.json").exists():
        tune.write(args.out / "tune.json", args.device, args.dry_run, quick=not args.all_tiles)


PARTS = {"tests": tests, "speed": speed, "tune": tiles}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check", description=__doc__)
    add, out = parser.add_argument, ROOT / "bench" / "out" / "gpu"
    add("--out", type=Path, default=out, help="folder for rows, logs and plots")
    add("--parts", default=",".join(PARTS), help=f"which of {', '.join(PARTS)}, in this order")
    add("--seconds", type=float, default=float("inf"), help="begin no part after this time")
    add("--all-tiles", action="store_true", help="every candidate of tune, at every size")
    add("--dry-run", action="store_true", help="on the CPU, tiny sizes")
    args = parser.parse_args(arguments)
    if unknown := set(args.parts.split(",")) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if args.dry_run and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("--dry-run needs TRITON_INTERPRET=1 in the environment")
    if not args.dry_run and not torch.cuda.is_available():
        parser.error("torch sees no GPU; --dry-run runs on the CPU")
    args.device = "cpu" if args.dry_run else "cuda"
    args.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + args.seconds
    for name in args.parts.split(","):
        if time.monotonic() < end:
            PARTS[name](args)
    return report(args.out)


def report(out: Path) -> int:
    """Prints what the folder has, and draws it; 1 if something was wrong."""
    rows, found = load(out / "rows.jsonl"), json.loads(at.read_text()) if (at := out / "tests.json").exists() else {}
    reached = [goals.ratio(goal, rows) for goal in goals.GPU]
    lines = [f"{what:<58} {value:>12.3g}" for what, value in ratios(rows).items()]
    # A mechanism that is not there is no fault; one that is wrong is.
    wrong = [f"WRONG: {r['name']} N={r['N']} {r['pass']}: {r['reason']}" for r in select(rows, status="wrong")]
    lines += [f"tests of {name:<20} {'passed' if f['passed'] else 'FAILED'}: {f['tests']}" for name, f in found.items()]
    print("\n".join([*lines, *wrong, *map(goals.line, reached)]))
    draw(rows, reached, out)
    return int(bool(wrong) or not all(f["passed"] for f in found.values()))


def draw(rows: list[dict], reached: list[dict], out: Path) -> None:
    """Every measured goal as its share of the target, and the plots of the rows."""
    from . import plots

    if rows:
        plots.draw_all(rows, out)
    if shares := {g["goal"]: g["share"] for g in reached if g["share"]}:
        plots.share_bars(shares, "share of the target (1 = reached)").savefig(out / "goals.png", dpi=120)


def ratios(rows: list[dict]) -> dict[str, float]:
    """Linear's CUDA C++ kernels, and the pooled layer's torch operations, beside Triton's at every size; each backend beside an
    empty launch at the smallest.
    """
    times = {(r["name"], r["pass"], r["N"], r["batch"]): r["median_s"] for r in select(rows, status="ok")}
    found = {}
    for (name, which, N, batch), seconds in times.items():
        base, _, backend = name.partition("@")
        if backend == "cuda" and (triton := times.get((f"{base}@triton", which, N, batch))):
            found[f"{base} {which}, N={N} x{batch}: CUDA / Triton"] = seconds / triton
        if backend == "eager" and (triton := times.get((f"{base}@triton", which, N, batch))):
            found[f"{base} {which}, N={N} x{batch}: torch operations / Triton"] = seconds / triton
        launch = times.get(("launch", which, N, batch)) if N == 196 and which == "fwd" else None
        if launch and backend and base == "linear_infsa":
            found[f"{name} {which}, N={N} x{batch}: time / empty launch"] = seconds / launch
    return found


if __name__ == "__main__":
    sys.exit(main())

"""`python -m bench.gpu_check --out DIR`: everything that has to be seen on a GPU, in parts, each with its own JSON.

What has to be right: our backends beside eager and the CPU, in every configuration, stream, graph and size. What has to be fast:
the turns of cases.goals, and a few tiles. A part whose JSON lies in DIR is not run again (`--again` runs it), so a machine that
goes away costs one part; `--seconds` begins no part after that time, for machines lent by the minute. The last step draws
DIR/goals.png and the plots of the rows and prints one short table. `--dry-run` walks through the parts on the CPU with tiny
sizes, in Triton's interpreter (TRITON_INTERPRET=1), for the test of this script: its figures mean nothing.

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

from . import cases, engine, goals, gpu_right, machine, peers, timer, tune

# The cache that keeps a tied Q between Linear's two passes over it: an H200's, as far as it was seen to.
KEPT_BYTES = 40 << 20


def speed(args) -> dict:
    """The rows of every goal, each mechanism checked first; on a CPU, tiny ones."""
    rows, budget = [], 0.01 if args.dry_run else 0.4
    if args.dry_run:
        peers.machine.GEMM_SIZE["cpu"], timer.LONG_CALL_SECONDS = 64, 0.0  # each call once: its time means nothing
    for turn in cases.goals(args.device.type, args.dry_run):
        rows += engine.measure(turn, args.device, budget)
        print(f"  {turn['pixels']}² x{turn['batch']} {turn['phase']} {turn['way']}", flush=True)
    facts = machine.environment(args.device)
    # A mechanism that is not there is no fault; one that is wrong is.
    wrong = [f"{r['name']} N={r['N']} {r['pass']}: {r['reason']}" for r in rows if r["status"] == "wrong"]
    return {"passed": not wrong, "wrong": wrong, "rows": [r | {"environment": facts} for r in rows]}


def tiles(args) -> dict:
    """A few candidates at the paper's heads."""
    return {"seconds_by_candidate": tune.run(args.device, args.dry_run, quick=True)}


PARTS = {
    **{
        name: getattr(gpu_right, name)
        for name in ("backends", "graph", "agreement", "repeatability", "large", "devices")
    },
    "speed": speed,
    "sanitizer": gpu_right.sanitizer,
    "suite": gpu_right.suite,
    "tune": tiles,
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
    rows = parts.get("speed", {}).get("rows", [])
    found = [goals.ratio(goal, rows) for goal in goals.GPU]
    (args.out / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    try:
        draw(found, rows, args.out)
    except ImportError as error:
        print(f"no plots: {error}")
    print()
    for row in beside_the_floor(rows):
        micro = f"{row['seconds'] * 1e6:>12.1f} us, floor {row['floor']:>5.0%}, predicted {row['predicted'] * 1e6:>12.1f} us"
        print(f"{row['what']:<48} {micro}")
    for what, value in ratios(rows).items():
        print(f"{what:<58} {value:>12.3g}")
    print()
    for name in PARTS:
        part = parts.get(name, {"passed": None, "reason": "not run"})
        if "passed" in part:
            print(f"{name:<14} {({True: 'passed', False: 'FAILED', None: part.get('reason')})[part['passed']]}")
        for key in ("reason", "wrong", "differing", "files", "nodes"):
            if part.get("passed") is False and part.get(key):
                print(f"  {key}: {part[key]}")
    print("\n".join(goals.line(goal) for goal in found))
    return int(any(part.get("passed") is False for part in parts.values()))


def draw(found: list[dict], rows: list[dict], out: Path) -> None:
    """Every measured goal as its share of the target, and the plots of the rows."""
    from . import plots

    def share(goal):
        sign, target = goal["target"].split()
        return goal["value"] / float(target) if sign == ">=" else float(target) / goal["value"]

    if rows:
        plots.draw_all(rows, out)
    figure = plots.share_bars({g["goal"]: share(g) for g in found if g["value"]}, "share of the target (1 = reached)")
    if figure is not None:
        figure.savefig(out / "goals.png", dpi=120)


def beside_the_floor(rows: list[dict]) -> list[dict]:
    """Every time of ours with its distance to the least that the machine allows, and with what was predicted."""
    found, ceilings = [], _ceilings(rows)
    for row in rows if ceilings else ():
        if "@" in row["name"] and row["status"] == "ok":
            cls = peers.of(row["name"])
            sizes = (
                cls.OP,
                row["pass"],
                "k" not in cls.PROJECTIONS,
                row["batch"],
                row["H"],
                row["N"],
                row["d"],
                2,
                ceilings,
            )
            what = f"{row['name']} {row['pass']} N={row['N']} x{row['batch']}"
            found.append({"what": what, "seconds": row["median_s"], "floor": floor(*sizes) / row["median_s"],
                          "predicted": predict(*sizes)})  # fmt: skip
    return found


def floor(op: str, which: str, tied: bool, B: int, H: int, N: int, d: int, itemsize: int, ceilings: dict) -> float:
    """Seconds that a pass takes at least on a machine of these ceilings (bytes/s "read" and "copy", FLOP/s "gemm")."""
    moved = peers.infsa.traffic(op, which, tied, B * N * H * d * itemsize, B * H * d * itemsize)
    memory = moved / ceilings["read" if which == "fwd" and op == "linear" else "copy"]
    # Linear's few operations per number are no matrix product.
    return max(memory, peers.infsa.flops(op, which, B, H, N, d) / ceilings["gemm"] if op == "pure" else 0.0)


def predict(op: str, which: str, tied: bool, B: int, H: int, N: int, d: int, itemsize: int, ceilings: dict) -> float:
    """Seconds that the Triton kernels should take: the floor, what they move beyond it, and their launches.

    Beyond it: Linear reads a tied Q again, and backward hands on one float32 per token and head, written and read; Pure
    rescales its output in place, and its untied backward pass computes two of five products twice.
    """
    tokens = B * N * H * d * itemsize
    least = floor(op, which, tied, B, H, N, d, itemsize, ceilings)
    if op == "pure":
        again, launches = (1.0, 2) if which == "fwd" or tied else (7 / 5, 3)
        return least * again + 2 * tokens / ceilings["copy"] + launches * ceilings["launch"]
    again = max(0, tokens - KEPT_BYTES) if tied or which == "bwd" else 0
    if which == "bwd":
        again = tied * (again + 2 * B * N * H * 4)
    launches = 1 if which == "fwd" and N <= 512 else 2
    return least + again / ceilings["read" if which == "fwd" else "copy"] + launches * ceilings["launch"]


def _ceilings(rows: list[dict]) -> dict | None:
    """Bytes and operations a second, and the seconds of a launch: of the longest calls that moved or multiplied."""
    longest = {r["name"]: r for r in sorted(rows, key=lambda r: r["N"] * r["batch"]) if r["status"] == "ok"}
    if not {"read", "clone", "gemm", "launch"} <= longest.keys():
        return None

    def rate(name):
        row = longest[name]
        return 2 * row["batch"] * row["N"] * row["dim"] * (4 if row["dtype"] == "fp32" else 2) / row["median_s"]

    others = {"gemm": longest["gemm"]["flops_per_s"], "launch": longest["launch"]["median_s"]}
    return {"read": rate("read"), "copy": 2 * rate("clone"), **others}


def ratios(rows: list[dict]) -> dict[str, float]:
    """Linear's CUDA C++ kernels beside Triton's at every size, and each backend beside an empty launch at the smallest."""
    found, times = {}, {(r["name"], r["pass"], r["N"], r["batch"]): r["median_s"] for r in rows if r["status"] == "ok"}
    for (name, which, N, batch), seconds in times.items():
        base, _, backend = name.partition("@")
        at = f"{which}, N={N} x{batch}"
        if backend == "cuda" and (triton := times.get((f"{base}@triton", which, N, batch))):
            found[f"{base} {at}: CUDA / Triton"] = seconds / triton
        if (
            base == "linear_infsa"
            and backend
            and N == 196
            and which == "fwd"
            and (launch := times.get(("launch", "fwd", N, batch)))
        ):
            found[f"{name} {at}: time / empty launch"] = seconds / launch
    return found


if __name__ == "__main__":
    sys.exit(main())

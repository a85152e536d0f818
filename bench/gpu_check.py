"""`python -m bench.gpu_check --out DIR`: everything that has to be seen on a GPU, in parts, each with its own JSON.

A part whose JSON lies in DIR is not run again (`--again` runs it), so a machine that goes away costs one part. The last step
merges them into DIR/results.json, draws DIR/goals.png and prints one short table. `--dry-run` walks through the parts on the CPU
with tiny sizes, for the test of this script: its figures mean nothing.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
import traceback
from pathlib import Path

import torch

import infsa_kernels

from . import gpu_goals, machine

SUITES = ("test_operators.py", "test_masks.py", "test_tables.py", "test_gradients.py")
RUNS = 250


def inputs(op, device, N=197, B=1, dtype=torch.bfloat16, tied=True, D=1024):
    """q, k, v as views of [B, N, H, d] with the paper's heads; k is q where tied."""
    H, d = gpu_goals.HEADS[op]
    H = min(H, max(1, D // d))
    q, k, v = (torch.randn(B, N, H, d, device=device).to(dtype).transpose(1, 2) for _ in range(3))
    return q, q if tied else k, v


def step(op, q, k, v):
    """A forward and backward pass: [out, dq, (dk), dv]."""
    leaves = [t.detach().requires_grad_() for t in ([q, v] if k is q else [q, k, v])]
    # With a small eps the gradients of a head with few positive scores all but cancel, and digits differ for no fault.
    out = getattr(torch.ops.infsa, op)(leaves[0], leaves[0] if k is q else leaves[1], leaves[-1], 1.0, 0.95)
    dout = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def distance(actual, expected) -> float:
    """Largest difference beside the largest entry; NaN where either is not finite."""
    return ((actual.float() - expected.float()).abs().max() / expected.float().abs().max()).item()


def suite(args) -> dict:
    """The shared tests on this device's Triton backend."""
    environment = {**os.environ, **({"TRITON_INTERPRET": "1"} if args.dry_run else {})}
    tests = [str(machine.ROOT / "tests" / name) for name in (SUITES[2:3] if args.dry_run else SUITES)]
    chosen = "cpu-triton and linear and float32" if args.dry_run else "cuda-triton and not float64"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", chosen, *tests]
    if subprocess.run([sys.executable, "-c", "import xdist"], capture_output=True).returncode == 0:
        command += ["-n", "8"]
    run = subprocess.run(command, env=environment, cwd=machine.ROOT, capture_output=True, text=True)
    (args.out / "suite.log").write_text(run.stdout + run.stderr)
    counts = re.findall(r"\d+ (?:passed|failed|skipped|error)", run.stdout)
    return {"passed": run.returncode == 0, "summary": ", ".join(counts)}


def agreement(args) -> dict:
    """The Triton backend beside eager on the GPU and beside the CPU's own kernels, on the same inputs."""
    worst = {}
    for op in gpu_goals.HEADS:
        for dtype, bound in ((torch.float32, 1e-4), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)):
            for tied in (True, False):
                for N in (33, 65) if args.dry_run else (33, 197, 1000, 4097):
                    q, k, v = inputs(
                        op, args.device, N, 1 if args.dry_run else 2, dtype, tied, 64 if args.dry_run else 1024
                    )
                    with infsa_kernels.backend("triton"):
                        ours = step(op, q, k, v)
                    with infsa_kernels.backend("eager"):
                        others = {"eager": step(op, q, k, v)}
                    cpu = [t.cpu() for t in (q, k, v)]
                    others["cpu"] = step(op, cpu[0], cpu[0] if tied else cpu[1], cpu[2])
                    for other, theirs in others.items():
                        far = max(distance(a.cpu(), b.cpu()) for a, b in zip(ours, theirs))
                        name = f"{op} {dtype} {other}"
                        worst[name] = max(worst.get(name, 0.0), far / bound)
    return {"passed": all(share <= 1 for share in worst.values()), "share_of_bound": worst}


def repeatability(args) -> dict:
    """Bitwise the same over many runs, on another stream, from NaN-filled memory, and replayed from a CUDA graph."""
    differing = []
    for op in gpu_goals.HEADS:
        for tied in (True, False):
            for N in (65,) if args.dry_run else (197, 4096):
                q, k, v = inputs(op, args.device, N, tied=tied, D=64 if args.dry_run else 1024)
                with infsa_kernels.backend("triton"):
                    first = step(op, q, k, v)
                    checks = {f"run {i}": lambda: step(op, q, k, v) for i in range(2 if args.dry_run else RUNS)}
                    checks["poisoned memory"] = lambda: _poisoned(lambda: step(op, q, k, v), args.device)
                    if args.device.type == "cuda":
                        checks["side stream"] = lambda: _on_side_stream(lambda: step(op, q, k, v))
                        checks["graph"] = lambda: _replayed(lambda: step(op, q, k, v))
                    for name, run in checks.items():
                        if not all(torch.equal(a, b) for a, b in zip(first, run())):
                            differing.append(f"{op} N={N} {'tied' if tied else 'untied'}: {name}")
    return {"passed": not differing, "differing": differing}


def _poisoned(run, device):
    rubbish = [torch.full((1 << (14 if device.type == "cpu" else 24),), float("nan"), device=device) for _ in range(8)]
    del rubbish  # to the allocator, which hands it out again
    return run()


def _on_side_stream(run):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        results = run()
    stream.synchronize()
    return results


def _replayed(run):
    graph, results = gpu_goals.capture(run)
    for t in results:
        t.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    return results


def large(args) -> dict:
    """Addresses beyond 2^31 elements: one head of a huge tensor equals the same numbers alone."""
    wrong = []
    for op in gpu_goals.HEADS:
        _, d = gpu_goals.HEADS[op]
        N, stride = (40, 1 << 10) if args.dry_run else (600, 1 << 22)  # 600 * 2^22 > 2^31
        store = torch.empty(N * stride, dtype=torch.bfloat16, device=args.device)
        q, v = (store.as_strided((1, 2, N, d), (0, d, stride, 1), offset) for offset in (0, stride // 2))
        for t in (q, v):
            t.copy_(torch.randn(t.shape, device=args.device))
        alone = q.contiguous()
        with infsa_kernels.backend("triton"):
            for far, near in zip(step(op, q, q, v), step(op, alone, alone, v.contiguous())):
                if not distance(far, near) < 2e-2:
                    wrong.append(op)
    return {"passed": not wrong, "wrong": wrong}


def sanitizer(args) -> dict:
    """compute-sanitizer's memcheck and racecheck over every kernel at small shapes."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists() or args.dry_run:
        return {"passed": None, "reason": "no compute-sanitizer here"}
    found = {}
    for check in ("memcheck", "racecheck"):
        command = [tool, "--tool", check, "--error-exitcode", "9", sys.executable, "-m", "bench.gpu_check", "--touch"]
        run = subprocess.run(command, cwd=machine.ROOT, capture_output=True, text=True, timeout=240)
        (args.out / f"{check}.log").write_text(run.stdout + run.stderr)
        found[check] = (run.stdout.strip().splitlines() or ["nothing"])[-1]
        found[f"{check} code"] = run.returncode
    return {"passed": not any(v for k, v in found.items() if k.endswith("code")), **found}


def touch() -> None:
    """Every kernel once, at a small odd size: what the sanitizer watches."""
    for op in gpu_goals.HEADS:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for tied in (True, False):
                for N in (33, 700):
                    q, k, v = inputs(op, torch.device("cuda"), N, dtype=dtype, tied=tied, D=128)
                    with infsa_kernels.backend("triton"):
                        step(op, q, k, v)
    torch.cuda.synchronize()


PARTS = {
    "ceilings": gpu_goals.ceilings,
    "agreement": agreement,
    "repeatability": repeatability,
    "large": large,
    "linear": gpu_goals.linear,
    "pure": gpu_goals.pure,
    "tune": gpu_goals.tune,
    "sanitizer": sanitizer,
    "suite": suite,
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check", description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=machine.ROOT / "bench" / "out" / "gpu", help="folder for JSON, logs, plot"
    )
    parser.add_argument("--parts", default=",".join(PARTS), help=f"which of {', '.join(PARTS)}, in this order")
    parser.add_argument("--again", action="store_true", help="run parts that are done already")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, tiny sizes")
    parser.add_argument("--touch", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.touch:
        touch()
        return 0
    args.device = torch.device("cpu" if args.dry_run else "cuda")
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.parts.split(","):
        at = args.out / f"{name}.json"
        if at.exists() and not args.again:
            continue
        began = time.perf_counter()
        torch.manual_seed(0)
        try:
            found = PARTS[name](args)
        except Exception:
            found = {"passed": False, "reason": traceback.format_exc()}
        at.write_text(json.dumps({**found, "seconds": time.perf_counter() - began}, indent=1) + "\n")
        print(f"{name}: {found.get('passed', 'done')}", flush=True)
    return report(args)


def report(args) -> int:
    parts = {name: json.loads(at.read_text()) for name in PARTS if (at := args.out / f"{name}.json").exists()}
    results = {"environment": machine.environment(args.device), "parts": parts, "goals": gpu_goals.compare(parts)}
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    gpu_goals.draw(results["goals"], args.out / "goals.png")
    print()
    for name, part in parts.items():
        if "passed" in part:
            print(
                f"{name:<14} {'passed' if part['passed'] else part.get('reason', part) if part['passed'] is None else 'FAILED'}"
            )
    for goal in results["goals"]:
        value = "not measured" if goal["value"] is None else f"{goal['value']:.3g}"
        print(f"{goal['goal']:<58} {goal['target']:>8} {value:>12}  {'reached' if goal['reached'] else ''}")
    return int(any(part.get("passed") is False for part in parts.values()))


if __name__ == "__main__":
    sys.exit(main())

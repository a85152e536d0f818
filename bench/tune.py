"""Measures tiles and writes the best of each kernel as the lines that configs.py holds: `python -m bench.gpu_check --parts tune`.

A candidate is a turn of the engine: checked by its gate, timed in a CUDA graph. The JSON has every time, so that a choice can say
by how much it won. A dry run tries one candidate of each on the CPU, in Triton's interpreter.
"""

import contextlib
import json
from itertools import product
from pathlib import Path
from unittest import mock

import torch

from infsa_kernels.ops import plans

from . import cases, engine, gate, machine

# (BLOCK_M, BLOCK_N, warps, stages)
PURE = [
    tile for tile in product((32, 64, 128, 256), (32, 64, 128), (4, 8), (1, 2, 3)) if 2048 <= tile[0] * tile[1] <= 16384
]
QUICK_PURE = {
    "fwd": [(128, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3), (64, 128, 4, 2), (256, 64, 8, 2)],
    "bwd_queries": [(64, 64, 4, 2), (128, 128, 8, 2), (64, 128, 4, 2)],
    "bwd_keys": [(64, 128, 8, 2), (128, 128, 8, 2), (32, 64, 4, 3)],
    "bwd_tied": [(128, 64, 8, 2), (128, 128, 8, 2), (64, 32, 4, 3)],
}
# (elements per thread, warps, programs on the GPU)
LINEAR = list(product((8, 16, 32), (4, 8), (396, 792, 1584)))
QUICK_LINEAR = [(16, 4, 396), (16, 4, 1584), (8, 4, 792), (32, 4, 396), (16, 8, 396)]
SECONDS = 0.4


def pure(kernel: str, tile: tuple) -> contextlib.AbstractContextManager:
    """configs.py with another tile for one of Pure's kernels."""
    from infsa_kernels.triton import configs

    chosen = {kernel: dict.fromkeys((64, 128, 256), configs.Pure(*tile))}
    return mock.patch.object(configs, "PURE", {arch: kernels | chosen for arch, kernels in configs.PURE.items()})


def linear(elements: int, warps: int, programs: int) -> contextlib.AbstractContextManager:
    """configs.py with other launches of Linear."""
    from infsa_kernels.triton import configs

    shipped = configs.linear

    def config(q, v, tokens):
        heads = shipped(q, v, tokens).heads
        size = max(1, elements * 32 * warps // (heads * max(q.shape[3], v.shape[3])))
        return configs.Linear(heads, 1 << (size.bit_length() - 1), warps, programs)

    return mock.patch.object(configs, "linear", config)


def race(turns: list[dict], candidates: dict, device: torch.device) -> dict[str, float | None]:
    """Seconds of all passes of the turns by candidate; None for one that is wrong or does not compile."""
    seconds = {}
    for name, candidate in {"shipped": contextlib.nullcontext(), **candidates}.items():
        gate.forget()
        plans.forget()
        with candidate:
            rows = [row for turn in turns for row in engine.measure(turn, device, SECONDS)]
        seconds[name] = sum(row["median_s"] for row in rows) if all(row["status"] == "ok" for row in rows) else None
        print(f"  {name}: {seconds[name] or rows[0].get('reason')}", flush=True)
    return seconds


def run(device: str, dry: bool, quick: bool) -> dict:
    """Every kernel at every size: name -> candidate -> seconds."""
    found = {}

    def turns(name: str, phases: tuple[str, ...], pixels: int, batch: int, heads: int) -> list[dict]:
        case = {"batch": 1, "dim": 32, "heads": 2} if dry else {"batch": batch, "heads": heads}
        plan = cases.turns("operator", [f"{name}@triton"], (112 if dry else pixels,), device, phases, ("graph",),
                           dtype="bf16", **case)  # fmt: skip
        return [turn | {"anchors": []} for turn in plan]

    def named(candidates: list[tuple], changed) -> dict:
        return {"x".join(map(str, c)): changed(c) for c in candidates[: 1 if dry else None]}

    for pixels, batch in ((1024, 8),) if quick else ((224, 32), (1024, 8), (4096, 1)):
        candidates = named(QUICK_LINEAR if quick else LINEAR, lambda c: linear(*c))
        plan = turns("linear_infsa", ("fwd", "train"), pixels, batch, 64)
        found[f"linear d=16 N={(pixels // 16) ** 2}"] = race(plan, candidates, torch.device(device))
    for kernel, d in product(QUICK_PURE, (64,) if quick else (64, 128, 256)):
        candidates = named(QUICK_PURE[kernel] if quick else PURE, lambda c: pure(kernel, c))
        name = "pure_infsa" if kernel == "bwd_tied" else "pure_infsa_untied"
        plan = turns(name, ("fwd" if kernel == "fwd" else "train",), 1024, 4, 1024 // d)
        found[f"pure {kernel} d={d} N=4096"] = race(plan, candidates, torch.device(device))
    return found


def best(found: dict) -> list[str]:
    """What configs.py would say, each with its reason."""
    lines = []
    for name, seconds in found.items():
        times = {candidate: s for candidate, s in seconds.items() if s}
        if times:
            first = min(times, key=times.get)
            gain = times.get("shipped", times[first]) / times[first]
            lines.append(f"{name}: {first}  # {times[first] * 1e6:.1f} us, {gain:.2f}x the shipped one's speed")
    return lines


def write(out: Path, device: str, dry: bool, quick: bool) -> None:
    """Measures, writes the JSON and prints the best."""
    found = run(device, dry, quick)
    results = {"environment": machine.environment(torch.device(device)), "seconds": found, "best": best(found)}
    out.write_text(json.dumps(results, indent=1) + "\n")
    print("\n".join(best(found)))

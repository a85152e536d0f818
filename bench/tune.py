"""`python -m bench.tune --out FILE`: measures tiles and writes the best of each kernel as the lines that configs.py holds.

A candidate counts only if its result agrees with the shipped configuration's. The JSON has every time, so that a choice can say
by how much it won. `--dry-run` tries one candidate of each on the CPU, in Triton's interpreter.
"""

import argparse
import contextlib
import json
import sys
from itertools import product
from pathlib import Path
from unittest import mock

import torch

import infsa_kernels

from . import machine, timer

# (BLOCK_M, BLOCK_N, warps, stages)
PURE = [
    (m, n, w, s)
    for m, n, w, s in product((32, 64, 128, 256), (32, 64, 128), (4, 8), (1, 2, 3))
    if 2048 <= m * n <= 16384
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
TOLERANCE, SECONDS = 2e-2, 0.4


def pure(kernel: str, tile: tuple):
    """configs.py with another tile for one of Pure's kernels, as a context."""
    from infsa_kernels.triton import configs

    chosen = {kernel: dict.fromkeys((64, 128, 256), configs.Pure(*tile))}
    return mock.patch.object(configs, "PURE", {key: kernels | chosen for key, kernels in configs.PURE.items()})


def linear(elements: int, warps: int, programs: int):
    """configs.py with other launches of Linear, as a context."""
    from infsa_kernels.triton import configs

    shipped = configs.linear

    def config(q, v, tokens):
        heads = shipped(q, v, tokens).heads
        size = max(1, elements * 32 * warps // (heads * max(q.shape[3], v.shape[3])))
        return configs.Linear(heads, 1 << (size.bit_length() - 1), warps, programs)

    return mock.patch.object(configs, "linear", config)


def race(
    run, candidates: dict[str, contextlib.AbstractContextManager], device: torch.device
) -> dict[str, float | None]:
    """Seconds of a pass as shipped and by candidate; None for one whose result is off. One that does not compile is left out."""
    with infsa_kernels.backend("triton"):
        expected, seconds = run(), {"shipped": _seconds(run, device)}
        for name, candidate in candidates.items():
            try:
                with candidate:
                    right = all(_close(a, b) for a, b in zip(run(), expected))
                    seconds[name] = _seconds(run, device) if right else None
            except Exception as error:  # it does not fit: the next one
                print(f"  {name}: {str(error)[:100]}", flush=True)
    return seconds


def _pass(op: str, backward: bool, tied: bool, device: torch.device, H: int, d: int, N: int, B: int):
    """A forward pass, or one and its gradients, as a function without arguments."""
    operator = getattr(torch.ops.infsa, op)
    q, k, v = (torch.randn(B, N, H, d, device=device).to(torch.bfloat16).transpose(1, 2) for _ in "qkv")
    leaves = [t.detach().requires_grad_(backward) for t in ([q, v] if tied else [q, k, v])]
    dout = torch.randn_like(v[:, :, 0] if op == "linear" else v)

    def run():
        out = operator(leaves[0], leaves[0] if tied else leaves[1], leaves[-1], 1e-6, 0.95)
        return [out.detach(), *(torch.autograd.grad(out, leaves, dout) if backward else ())]

    return run


def _seconds(run, device: torch.device) -> float:
    """The median of replays from a CUDA graph; on a CPU, which only tries the script, one call."""
    if device.type == "cpu":
        return timer.observe(lambda lap: run(), device, warm_up=False)[0].seconds
    graph = timer.capture(run)[0]

    def replay(lap):
        graph.replay()
        return []

    seen = {"": timer.observe(replay, device)[0]}
    timer.interleave({"": replay}, seen, SECONDS, device)
    return seen[""].seconds


def _close(actual, expected) -> bool:
    return bool((actual.float() - expected.float()).abs().max() <= TOLERANCE * expected.float().abs().max())


def run(device: torch.device, dry: bool, quick: bool) -> dict:
    """Every kernel at every size: name -> candidate -> seconds."""
    found, few, heads = {}, slice(1 if dry else None), 2 if dry else None

    def named(candidates, context):
        return {"x".join(map(str, c)): context(c) for c in candidates[few]}

    for N, B in ((33, 1),) if dry else ((4096, 8),) if quick else ((197, 32), (4096, 8), (65536, 1)):
        candidates = named(QUICK_LINEAR if quick else LINEAR, lambda c: linear(*c))
        found[f"linear d=16 N={N}"] = race(
            _pass("linear", True, False, device, heads or 64, 16, N, B), candidates, device
        )
    N, B = (33, 1) if dry else (4096, 4)
    for kernel, d in product(QUICK_PURE, (64,) if quick else (64, 128, 256)):
        candidates = named(QUICK_PURE[kernel] if quick else PURE, lambda c: pure(kernel, c))
        call = _pass("pure", kernel != "fwd", kernel == "bwd_tied", device, heads or 1024 // d, d, N, B)
        found[f"pure {kernel} d={d} N={N}"] = race(call, candidates, device)
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


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__)
    parser.add_argument("--out", type=Path, default=machine.ROOT / "bench" / "out" / "tune.json")
    parser.add_argument("--quick", action="store_true", help="a few candidates at the paper's heads")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, one candidate, tiny sizes")
    args = parser.parse_args(arguments)
    device = torch.device("cpu" if args.dry_run else "cuda")
    found = run(device, args.dry_run, args.quick or args.dry_run)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    results = {"environment": machine.environment(device), "seconds": found, "best": best(found)}
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    print("\n".join(best(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

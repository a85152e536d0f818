"""`python -m bench.tune --out FILE`: measures tiles and writes the best of each kernel as the lines that configs.py holds.

A candidate counts only if its result agrees with the shipped configuration's. The JSON has every time, so that a choice can say
by how much it won. `--dry-run` tries one candidate of each on the CPU, in Triton's interpreter.
"""

import argparse
import json
import sys
from itertools import product
from pathlib import Path

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


def pure(device, kernel: str, H: int, d: int, N: int, B: int, tiles: list[tuple]) -> dict:
    """Seconds of one of Pure's kernels' passes by tile; None where a tile does not compile or its result is off."""
    from infsa_kernels.triton import configs

    shipped = configs.PURE

    def choose(tile):
        chosen = dict.fromkeys((64, 128, 256), configs.Pure(*tile))
        configs.PURE = {key: kernels | {kernel: chosen} for key, kernels in shipped.items()}

    def undo():
        configs.PURE = shipped

    call = _pass("pure", kernel != "fwd", kernel == "bwd_tied", device, H, d, N, B)
    return _race(call, tiles, choose, undo, device)


def linear(device, H: int, d: int, N: int, B: int, candidates: list[tuple]) -> dict:
    """Seconds of Linear's forward and backward pass together by (elements per thread, warps, programs)."""
    from infsa_kernels.triton import configs

    shipped = configs.linear

    def choose(candidate):
        elements, warps, programs = candidate

        def config(q, v, tokens):
            c = shipped(q, v, tokens)
            size = max(1, elements * 32 * warps // (c.heads * max(q.shape[3], v.shape[3])))
            return configs.Linear(c.heads, 1 << (size.bit_length() - 1), warps, programs)

        configs.linear = config

    def undo():
        configs.linear = shipped

    return _race(_pass("linear", True, False, device, H, d, N, B), candidates, choose, undo, device)


def _pass(op: str, backward: bool, tied: bool, device, H, d, N, B):
    """A forward pass, or one and its gradients, as a function without arguments."""
    operator = getattr(torch.ops.infsa, op)
    q, k, v = (torch.randn(B, N, H, d, device=device).to(torch.bfloat16).transpose(1, 2) for _ in "qkv")
    k = q if tied else k
    if not backward:
        return lambda: [operator(q, k, v, 1e-6, 0.95)]
    leaves = [t.detach().requires_grad_() for t in ([q, v] if tied else [q, k, v])]
    dout = torch.randn_like(v[:, :, 0] if op == "linear" else v)

    def run():
        out = operator(leaves[0], leaves[0] if tied else leaves[1], leaves[-1], 1e-6, 0.95)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout)]

    return run


def _race(run, candidates, choose, undo, device) -> dict:
    with infsa_kernels.backend("triton"):
        expected = run()
        seconds = {"shipped": _seconds(run, device)}
        for candidate in candidates:
            choose(candidate)
            try:
                right = all(_close(a, b) for a, b in zip(run(), expected))
                seconds["x".join(map(str, candidate))] = _seconds(run, device) if right else None
            except Exception as error:  # it does not fit: the next one
                print(f"  {candidate}: {str(error)[:100]}", flush=True)
            finally:
                undo()
    return seconds


def _seconds(run, device) -> float:
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


def run(device, dry: bool, quick: bool) -> dict:
    """Every kernel at every size: name -> candidate -> seconds."""
    found, few, heads = {}, slice(1 if dry else None), 2 if dry else None
    linear_sizes = ((33, 1),) if dry else ((4096, 8),) if quick else ((197, 32), (4096, 8), (65536, 1))
    for N, B in linear_sizes:
        candidates = (QUICK_LINEAR if quick else LINEAR)[few]
        found[f"linear d=16 N={N}"] = linear(device, heads or 64, 16, N, B, candidates)
    N, B = (33, 1) if dry else (4096, 4)
    for kernel, tiles in QUICK_PURE.items():
        for d in (64,) if quick else (64, 128, 256):
            candidates = (tiles if quick else PURE)[few]
            found[f"pure {kernel} d={d} N={N}"] = pure(device, kernel, heads or 1024 // d, d, N, B, candidates)
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

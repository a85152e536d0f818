"""`python -m bench.distributed`: two ranks of one thread beside one process of two threads, on the same numbers.

Forward and backward of the sequence-parallel operators on half of the tokens each, in turn with the dense operator on all of
them, which the first rank runs with both threads while the other sleeps. First the gate: the output and every gradient are
the dense operator's. A ratio above 1 says that the ranks are faster; that of processor time is all threads' of
both sides, which other load leaves alone. Linear also says how many bytes a rank gives to collectives.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import infsa_kernels
from infsa_kernels import distributed

from . import machine

WORLD = 2


@dataclass(frozen=True)
class Case:
    name: str
    tied: bool
    heads: int
    d: int
    options: tuple = ()

    def functions(self) -> tuple[Callable, Callable]:
        """The dense operator and the sequence-parallel one."""
        name = f"{self.name}_infsa"
        return getattr(infsa_kernels, name), lambda q, k, v: getattr(distributed, name)(q, k, v, **dict(self.options))

    def __str__(self) -> str:
        how = dict(self.options).get("method", "").replace("_", "-")
        return " ".join(word for word in (self.name, how, "tied" if self.tied else "untied") if word)


LINEAR = [Case("linear", tied, 64, 16) for tied in (True, False)]
PURE = [Case("pure", tied, 2, 64, (("method", method),)) for method in ("ring", "all_to_all") for tied in (True, False)]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.distributed", description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=65536, help="of Linear's sequence")
    parser.add_argument("--pure-tokens", type=int, default=8192, help="of Pure's")
    parser.add_argument("--samples", type=int, default=7, help="turns of each")
    given = parser.parse_args()
    load = machine.OtherLoad()
    print(machine.describe(machine.environment(torch.device("cpu"))))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # waiting is no processor time
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, (f"{folder}/store", given), nprocs=WORLD)
    share = load.share()
    print(f"others took {share:.0%} of the processor" if share is not None else "what others took is not known")


def _rank(rank: int, store: str, given) -> None:
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=WORLD)
    for cases, tokens in ((LINEAR, given.tokens), (PURE, given.pure_tokens)):
        for case in cases:
            line = measured(case, tokens, given.samples)
            if rank == 0:
                print(line, flush=True)
    dist.destroy_process_group()
    os._exit(0)


def measured(case: Case, tokens: int, samples: int) -> str:
    rank = dist.get_rank()
    dense, sharded = case.functions()
    shape = 1, case.heads, tokens, case.d
    q, k, v, dout = (torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(4))
    k = q if case.tied else k
    mine = slice(rank * tokens // WORLD, (rank + 1) * tokens // WORLD)
    shards = [t[:, :, mine].clone() for t in (q, k, v, dout)]
    if case.tied:
        shards[1] = shards[0]

    torch.set_num_threads(1)
    with Sent() as sent:
        found = step(sharded, *shards)
    torch.set_num_threads(WORLD)
    names = ("out", "dq", "dv") if case.tied else ("out", "dq", "dk", "dv")
    for name, whole, part in zip(names, step(dense, q, k, v, dout), found):
        error = (whole[:, :, mine] - part).abs().max() / whole.abs().max()
        assert error < 1e-5, f"{case}: {name} is off by {error:.1e}"

    walls, processors = ({"dense": [], "ranks": []} for _ in range(2))
    for _ in range(samples):
        torch.set_num_threads(WORLD)
        dist.barrier()
        if rank == 0:
            wall, processor = seconds(dense, q, k, v, dout)
            walls["dense"].append(wall), processors["dense"].append(processor)
        torch.set_num_threads(1)
        dist.barrier()
        wall, processor = map(torch.tensor, seconds(sharded, *shards))
        dist.all_reduce(wall, dist.ReduceOp.MAX)
        dist.all_reduce(processor)
        walls["ranks"].append(wall.item()), processors["ranks"].append(processor.item())
    if rank:
        return ""
    (one, two), (busy_one, busy_two) = ((statistics.median(t) for t in of.values()) for of in (walls, processors))
    told = f" ({sent.calls} collectives, {sent.bytes:,} bytes a rank)" if sent.calls else ""
    return (
        f"{case}, N = {tokens:,}, H = {case.heads}, d = {case.d}: one process of {WORLD} threads {one * 1e3:.1f} ms, {WORLD} "
        f"ranks of one {two * 1e3:.1f} ms, ratio {one / two:.2f}; of processor time {busy_one / busy_two:.2f}{told}"
    )


def step(function: Callable, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> list[Tensor]:
    """The output and the gradients."""
    inputs = [t.detach().requires_grad_() for t in ((q, v) if k is q else (q, k, v))]
    q, *k, v = inputs
    out = function(q, k[0] if k else q, v)
    return [out.detach(), *torch.autograd.grad(out, inputs, dout)]


def seconds(*call) -> tuple[float, float]:
    """By the wall clock, and of the processor: all threads of this process."""
    start, busy = time.perf_counter(), time.process_time()
    step(*call)
    return time.perf_counter() - start, time.process_time() - busy


class Sent(TorchDispatchMode):
    """Counts collectives and what they are given; what travels between two ranks is none."""

    calls, bytes = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("_c10d_functional", "c10d") and not func._opname.lstrip("_").startswith(("wait", "wrap")):
            self.calls += 1
            self.bytes += sum(t.nbytes for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, Tensor))
        return func(*args, **(kwargs or {}))


if __name__ == "__main__":
    main()

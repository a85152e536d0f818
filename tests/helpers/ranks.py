"""Processes that share a sequence, for tests: each runs the same checks, with its own shard of a call."""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import torchvision_shim
from helpers.calls import Call

# Long enough for a machine that does much else, short enough to end a test that hangs.
TIMEOUT = timedelta(seconds=120)


def run(checks: Sequence[Callable], world: int, store, timeout: timedelta = TIMEOUT) -> None:
    """Every check on ``world`` processes of one thread."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.multiprocessing.spawn(_work, (world, str(store), checks, timeout), nprocs=world)


def _work(rank, world, store, checks, timeout):
    torchvision_shim.install()  # there is no conftest.py in a process that was spawned
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=world, timeout=timeout)
    for check in checks:
        torch.manual_seed(0)
        check()
        dist.barrier()
    dist.destroy_process_group()
    # Now and then, with or without operators of ours, gloo's threads outlive the process and abort it at its very end.
    os._exit(0)


def shard(t: Tensor, lengths: Sequence[int], dim: int) -> Tensor:
    """This rank's run of a tensor that every rank has."""
    return t.split(list(lengths), dim)[dist.get_rank()]


def whole(t: Tensor, dim: int) -> Tensor:
    """The shards of all ranks, together."""
    everyones = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, t.detach())
    return torch.cat(everyones, dim)


def over_ranks(t: Tensor) -> Tensor:
    """The sum of every rank's, in float64."""
    total = t.detach().double().clone()
    dist.all_reduce(total)
    return total


def of_rank(call: Call, queries: Sequence[int], keys: Sequence[int]) -> Call:
    """This rank's shard of a call, in the strides of the whole."""
    masks = call.key_padding_mask, call.query_padding_mask
    key_mask, query_mask = (None if m is None else shard(m, n, 1) for m, n in zip(masks, (keys, queries)))
    k = None if call.k is None else shard(call.k, keys, -2)
    return replace(
        call, q=shard(call.q, queries, -2), k=k, v=shard(call.v, keys, -2), key_padding_mask=key_mask,
        query_padding_mask=query_mask,
    )  # fmt: skip


class Sent(TorchDispatchMode):
    """Counts what collectives are given: the names and the bytes."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("_c10d_functional", "c10d") and not func._opname.lstrip("_").startswith(("wait", "wrap")):
            tensors = [t for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, Tensor)]
            self.calls.append((func._opname, sum(t.nbytes for t in tensors)))
        return func(*args, **(kwargs or {}))

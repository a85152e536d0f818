"""What ranks say to each other, and what they are told where one of them no longer answers."""

import contextlib
from typing import TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..torch_private import all_reduce, process_group

# What may stand for a process group, or its name; None for the one of all ranks. In words: a torch may have no process groups.
Group: TypeAlias = "dist.ProcessGroup | DeviceMesh | str | None"


def name_of(op: str, group: Group) -> str:
    """The name by which operators know a group of ranks."""
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(
            f"{op}: there is no process group, expected one of the ranks that share the sequence; start by torchrun and call "
            "torch.distributed.init_process_group()"
        )
    if isinstance(group, str):
        return group
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"{op}: group is a DeviceMesh of {group.ndim} dimensions, expected the one over which the sequence is sharded; "
                'give mesh["sequence"], by the name that it has'
            )
        group = group.get_group()
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"{op}: group is a {type(group).__name__}, expected a ProcessGroup, a DeviceMesh or None")
    group = dist.group.WORLD if group is None else group
    if dist.get_rank(group) < 0:
        raise ValueError(f"{op}: this process is no member of the group; call it on the group's ranks only")
    return group.group_name


def sum_over_ranks(t: Tensor, group: str) -> Tensor:
    """In the order that the backend takes for this number of ranks, always the same; and the same bits on every rank."""
    with told(group):
        return all_reduce(t.contiguous(), group)


@contextlib.contextmanager
def told(group: str):
    """An error of torch.distributed's in words, and with where to look."""
    try:
        yield
    except RuntimeError as error:
        ranks = process_group(group)
        first = str(error).strip().splitlines()[0]
        raise RuntimeError(
            f"infsa_kernels.distributed: rank {dist.get_rank(ranks)} of {dist.get_world_size(ranks)} waited for the others in "
            f"vain: one of them ended, raised an error or took longer than the group's timeout. Look for its own error, "
            f"which came first; this one says: {first}"
        ) from error


def gather_numbers(numbers: list[int], group: str, device: torch.device) -> list[list[int]]:
    """Those of every rank."""
    ranks = process_group(group)
    mine = torch.tensor(numbers, dtype=torch.int64, device=device)
    everyones = [torch.empty_like(mine) for _ in range(dist.get_world_size(ranks))]
    with told(group):
        dist.all_gather(everyones, mine, group=ranks)
    return torch.stack(everyones).tolist()


class _SumGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, t, group):
        ctx.group = group
        return t.view_as(t)

    @staticmethod
    def backward(ctx, gradient):
        return sum_over_ranks(gradient, ctx.group), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, t, group):
        ctx.group = group
        return sum_over_ranks(t, group)

    @staticmethod
    def backward(ctx, gradient):
        return sum_over_ranks(gradient, ctx.group), None


def sum_gradients(t: Tensor, group: str) -> Tensor:
    """``t``, which all ranks have: what each rank's loss gives to its gradient is added up."""
    return _SumGradients.apply(t, group)


def differentiable_sum(t: Tensor, group: str) -> Tensor:
    """The sum over ranks, of which every rank uses its copy: gradients are added up over the ranks as well."""
    return _Sum.apply(t, group)

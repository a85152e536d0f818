"""Processes that share a picture: each reads rows of its own, and per pass they add a few numbers per head.

What they add is gathered and summed in the order of the ranks: the same bits in every process, and in every run.
"""

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks:
    """The processes of a group, or this one alone if it is None.

    Attributes:
        rank, size: this process among how many.
    """

    def __init__(self, group=None):
        self.group = group
        self.rank, self.size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))

    def share(self, rows: int) -> tuple[int, int]:
        """This process's part of so many rows."""
        return rows * self.rank // self.size, rows * (self.rank + 1) // self.size

    @contextlib.contextmanager
    def agreeing(self) -> Iterator[None]:
        """If the block raises in one process, all of them raise: none waits for an answer that will not come."""
        error = None
        try:
            yield
        except Exception as found:
            error = found
        told = self._all(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        for rank, message in enumerate(told):
            if message is not None:
                raise RuntimeError(f"predict_file: rank {rank} of {self.size} cannot start: {message}")

    def check_equal(self, identity: dict[str, str]) -> None:
        """ValueError unless all processes have the same picture, model and arguments."""
        theirs = self._all(identity)[0]
        other = [name for name in identity if identity[name] != theirs[name]]
        if other:
            raise ValueError(
                f"predict_file: rank {self.rank} of {self.size} has another {', '.join(other)} than rank 0, expected the same "
                "picture, model and arguments in every process of group"
            )

    def sum(self, tensors: list[Tensor]) -> list[Tensor]:
        if self.size == 1 or not tensors:
            return tensors
        flat = torch.cat([t.flatten() for t in tensors])
        parts = [torch.empty_like(flat) for _ in range(self.size)]
        dist.all_gather(parts, flat, group=self.group)
        total = torch.stack(parts).sum(0)
        return [part.view(t.shape) for part, t in zip(total.split([t.numel() for t in tensors]), tensors)]

    def join(self, t: Tensor) -> Tensor:
        """The parts of all processes, one after the other."""
        return t if self.size == 1 else torch.cat([part.to(t.device) for part in self._all(t.cpu())])

    def wait(self) -> None:
        self._all(None)

    def _all(self, thing) -> list:
        if self.size == 1:
            return [thing]
        found = [None] * self.size
        dist.all_gather_object(found, thing, group=self.group)
        return found

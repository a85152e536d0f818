"""What calls of one kind have in common, found once: that their arguments are right, which kernels run them, and how.

A call is of the kind of another where everything is equal that a check, the choice of kernels or a launch asks of it: numbers
themselves; sizes, strides, dtype and device of tensors, and whether they begin on 16 bytes. A rho that is a number of its own at
every call makes every call the first of its kind.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Devices whose calls have plans. The interpreter, on the CPU, has nothing to gain.
PLANNED = ("cuda",)

# As many kinds as a process may meet, each some kilobytes; one more, and all are found anew.
MOST = 1024


_all: list["Plans"] = []


class Plans:
    """What runs the calls of one raw operator, by kind."""

    def __init__(self):
        self._known: dict[tuple, Callable] = {}
        _all.append(self)

    def find(self, kind: tuple) -> Callable | None:
        return self._known.get(kind)

    def make(self, kind: tuple, kernels: Callable, arguments: Sequence) -> Callable:
        """What runs this call and every other of its kind, on kernels that may have a ``plan`` (triton/launch.py)."""
        if not hasattr(kernels, "plan") or arguments[0].device.type not in PLANNED:
            return kernels
        run = kernels.plan(*arguments)
        if len(self._known) >= MOST:
            self._known.clear()
        # Two threads may both have made it: either will do.
        self._known[kind] = run
        return run


def forget() -> None:
    """After a change to what plans are made of, as launch configurations are."""
    for plans in _all:
        plans._known.clear()


def kind_of(arguments: Sequence) -> tuple:
    """The kind of a call of a raw operator, whose tensors are dense."""
    kind: list = []
    for a in arguments:
        if a is None:  # most are, and to ask that takes the least time
            kind.append(None)
        elif isinstance(a, Tensor):
            kind += a.shape, a.stride(), a.dtype, a.device, a.data_ptr() & 15
        else:
            kind.append(tuple(a) if isinstance(a, list) else a)
    if arguments[0].dtype is torch.float32:
        kind.append(torch.backends.cuda.matmul.fp32_precision)
    return tuple(kind)

"""What the known calls of all operators share, for the check before a kernel's first use (first_use.py)."""

import functools
import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor

# Whatever this package is imported as.
PARENT = __package__.rpartition(".")[0]

# Rows of NaN before and behind what is read.
MARGIN = 8

# How many units in the last place of the largest element a result may be off, where 16 bits hold it and where 32 do: its own
# rounding, that of T, and those of norms and quotients. Every sum of Pure's forward pass is exact.
UNITS_16, UNITS_32 = 2, 32


class Known(NamedTuple):
    """A call whose results are known."""

    where: str  # its sizes in words
    arguments: list  # of the forward pass
    around: Callable[[], AbstractContextManager]  # what it runs in


@functools.cache
def raw_of(op: str):
    """The raw operators of this name."""
    return {raw.name: raw for raw in importlib.import_module(".ops.register", PARENT).RAW_OPS}[op]


def rounding(precision: str, result: Tensor) -> float:
    """How far a result may be off, as a share of its largest element, where products of float32 have this precision."""
    if precision == "tf32":
        return UNITS_16 * 2.0**-10
    return (UNITS_16 if result.element_size() == 2 else UNITS_32) * torch.finfo(result.dtype).eps


def dtype_of(t: Tensor) -> str:
    return str(t.dtype).removeprefix("torch.")

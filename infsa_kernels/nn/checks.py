"""What errors here have in common: checks of constructors' numbers, where Python's own words name no argument, and phrases."""

import operator

import torch
from torch import Tensor

from ..torch_private import assert_async

NO_CAUSAL = "InfSA divides by sums over all queries, and a causal form of it does not exist yet"
NO_DROPOUT = (
    "in multi-hop InfSA all hops go through the same scores, which are never held, so none can be dropped; drop the output "
    "(nn.Dropout) instead"
)
LEAVE_OUT = "; convert(exclude_patterns=...) leaves a module of this name as it was"


def integer(op: str, name: str, value, at_least: int = 1) -> None:
    """An int, or what Python takes for one (numpy's, a tensor's)."""
    if not _converts(operator.index, value):
        raise TypeError(f"{op}: {name} is {value!r}, a {type(value).__name__}, expected an int")
    if value < at_least:
        raise ValueError(f"{op}: {name} is {value}, expected at least {at_least}")


def number(op: str, name: str, value) -> None:
    """A real number, or a tensor of one element; a gradient would be lost."""
    if not _converts(float, value):
        raise TypeError(f"{op}: {name} is {value!r}, a {type(value).__name__}, expected a number")
    if isinstance(value, Tensor) and value.requires_grad:
        raise TypeError(
            f"{op}: {name} is a tensor that requires a gradient, expected a number: it gets none; give float({name})"
        )


def fraction(op: str, name: str, value) -> None:
    """A number between 0 and 1, both excluded: one that has a logit."""
    number(op, name, value)
    if not 0 < value < 1:
        raise ValueError(f"{op}: {name} is {value}, expected a number between 0 and 1, both excluded")


def _converts(to, value) -> bool:
    if isinstance(value, (bool, str)):
        return False
    try:
        to(value)
    except (TypeError, ValueError, RuntimeError):
        return False
    return True


def require(condition: Tensor, message: str, error: type[Exception] = NotImplementedError, wait: bool = True) -> None:
    """``error`` unless a one-element bool tensor is true; RuntimeError under torch.compile, which reads no values.

    Args:
        wait: whether to read a value from a GPU, whose stream that stops; else it reports the error itself, and later.
    """
    if torch.compiler.is_compiling() or not (wait or condition.device.type == "cpu"):
        assert_async(condition, message)
    elif not condition:
        raise error(message)


def class_path(thing: object) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"

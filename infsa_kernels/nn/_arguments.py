"""Checks of numbers that constructors take: what Python would say about a wrong type does not name the argument."""

import operator


def integer(op: str, name: str, value, at_least: int = 1) -> None:
    """An int, or what Python takes for one (numpy's, a tensor's)."""
    if not _converts(operator.index, value):
        raise TypeError(f"{op}: {name} is {value!r}, a {type(value).__name__}, expected an int")
    if value < at_least:
        raise ValueError(f"{op}: {name} is {value}, expected at least {at_least}")


def number(op: str, name: str, value) -> None:
    """A real number, or a tensor of one element."""
    if not _converts(float, value):
        raise TypeError(f"{op}: {name} is {value!r}, a {type(value).__name__}, expected a number")


def _converts(to, value) -> bool:
    if isinstance(value, (bool, str)):
        return False
    try:
        to(value)
    except (TypeError, ValueError, RuntimeError):
        return False
    return True

"""Checks of numbers that constructors take: what Python would say about a wrong type does not name the argument."""

from numbers import Real


def integer(op: str, name: str, value, at_least: int = 1) -> None:
    """An int, or whatever counts as one (numpy's, symbolic)."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{op}: {name} is {value!r}, a {type(value).__name__}, expected an int")
    if value < at_least:
        raise ValueError(f"{op}: {name} is {value}, expected at least {at_least}")


def number(op: str, name: str, value) -> None:
    """A real number, or a tensor of one element."""
    if isinstance(value, bool) or not (isinstance(value, Real) or hasattr(value, "__float__")):
        raise TypeError(f"{op}: {name} is {value!r}, a {type(value).__name__}, expected a number")

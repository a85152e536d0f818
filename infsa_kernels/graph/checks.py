"""What the graph's functions demand of their arguments, and the words where one is not so."""

import math
from numbers import Integral, Real

import torch
from torch import Tensor


def check_square(name: str, N: int, M: int) -> None:
    if N != M:
        raise ValueError(
            f"{name}: the graph has {N} queries and {M} keys, expected as many: its tokens have to be the same"
        )


def check_number(name: str, argument: str, value, above: float, below: float, what: str) -> None:
    """A real number between two, both excluded; NaN is not."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: {argument} is {value!r}, a {type(value).__name__}, expected {what}")
    if not above < value < below:
        raise ValueError(f"{name}: {argument} is {value}, expected {what}")


def check_tol(name: str, tol) -> None:
    check_number(name, "tol", tol, 0, math.inf, "a number above 0, the error that may be left")


def check_count(name: str, argument: str, value, at_most: float = math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or not 1 <= value <= at_most:
        upto = "or more" if at_most == math.inf else f"to {at_most}"
        raise ValueError(f"{name}: {argument} is {value!r}, expected an int, 1 {upto}")


def check_columns(name: str, x: Tensor, rows: tuple[int, int, int]) -> None:
    if x.dim() != 4 or x.shape[:3] != rows:
        raise ValueError(f"{name}: x has shape {list(x.shape)}, expected (B, H, rows, c) = {list(rows)} and any c")
    if x.is_complex():
        raise TypeError(
            f"{name}: x has dtype {x.dtype}, expected real numbers; give real and imaginary parts as columns"
        )


def check_gamma(name: str, gamma: float | Tensor, heads: int, wait: bool = True) -> None:
    """
    Args:
        wait: whether to read a tensor's values from a GPU, whose stream that stops.
    """
    if not isinstance(gamma, Tensor):
        check_number(name, "gamma", gamma, 0, 1, "between 0 and 1, both excluded")
    elif gamma.shape not in ((), (1,), (heads,)):
        raise ValueError(f"{name}: gamma has shape {list(gamma.shape)}, expected [], [1] or (H,) = [{heads}]")
    elif (
        not torch.compiler.is_compiling()
        and (wait or gamma.device.type == "cpu")
        and not ((gamma > 0) & (gamma < 1)).all()
    ):
        raise ValueError(f"{name}: gamma is {gamma.tolist()}, expected between 0 and 1, both excluded")

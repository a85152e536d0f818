"""The one rule by which a result counts as right: in every test, in the benchmark's gate, and in tests of kernels of yours.

    max|actual - truth| <= factor * error of plain code + 2 max|t + 0.3 - 0.3 - t|

The error of plain code is that of the reference in the dtype of ``actual``; t is the truth in that dtype, brought to
order one by a power of two if it is smaller, so that small results are held to as many digits as large ones: to the digits
that the dtype has there, where they are subnormal.

    >>> truth = reference.linear(q.double(), k.double(), v.double())
    >>> assert_close_to_reference(actual, reference.linear(q, k, v), truth, FORWARD, "out")
"""

import math

import torch
from torch import Tensor

__all__ = ["FORWARD", "GRADIENT", "assert_close_to_reference", "assert_within", "error_of_eager", "rounding"]

# How many times the error of plain code a result, and a gradient, may have.
FORWARD, GRADIENT = 2.0, 3.0


def assert_close_to_reference(actual: Tensor, eager_low: Tensor, truth: Tensor, factor: float, what: str) -> None:
    """Fails unless ``actual`` is about as close to the truth as plain code, and has NaN and Inf where the truth has.

    Args:
        actual: the result under test.
        eager_low: the reference evaluated in the dtype of ``actual``.
        truth: the reference evaluated in float64.
        factor: FORWARD or GRADIENT.
        what: names the result in the message.

    Raises:
        AssertionError: names the first or the worst element, its error and the bound.
    """
    assert_within(actual, truth, error_of_eager(eager_low, truth, actual.dtype), factor, what)


def error_of_eager(eager_low: Tensor, truth: Tensor, dtype: torch.dtype) -> float:
    """The largest error of plain code in ``dtype``.

    Evaluated in float32 instead (for float64, in which the reference is itself the truth, and for float16 where it
    overflows), the error counts by the ratio of the two dtypes' epsilons. What overflows is no measure and allows
    nothing.
    """
    measurable = truth.isfinite() & eager_low.isfinite()
    error = torch.where(measurable, eager_low.double() - truth, 0).abs()
    return _max(error) * torch.finfo(dtype).eps / torch.finfo(eager_low.dtype).eps


def assert_within(actual: Tensor, truth: Tensor, eager_error: float, factor: float, what: str) -> None:
    """The rule, for an error of plain code that is already known."""
    assert actual.shape == truth.shape, f"{what}: shape {list(actual.shape)}, expected {list(truth.shape)}"
    if actual.numel() == 0:
        return
    truth_low = truth.to(actual.dtype)
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        wrong = kind(actual) != kind(truth_low)
        assert not wrong.any(), (
            f"{what}: {kind.__name__} differs from the reference at {int(wrong.sum())} of {wrong.numel()} elements, "
            f"first at {wrong.nonzero()[0].tolist()}: {actual[wrong][0].item()} instead of {truth_low[wrong][0].item()}"
        )
    finite = truth_low.isfinite()
    error = torch.where(finite, actual.double() - truth, 0).abs()
    if actual.dtype == torch.float64:
        factor += 1  # the truth has that error too
    bound = factor * eager_error + rounding(torch.where(finite, truth, 0), actual.dtype)
    worst = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
    assert error.max() <= bound, (
        f"{what}: error {error.max().item():.3g} at {list(worst)} ({actual[worst].item():.9g} instead of "
        f"{truth[worst].item():.9g}) is above the bound {bound:.3g}, as are {int((error > bound).sum())} of "
        f"{error.numel()} elements; {actual.dtype}, error of plain code {eager_error:.3g}"
    )


def rounding(truth: Tensor, dtype: torch.dtype) -> float:
    """What rounding to ``dtype`` alone explains: the rule's last term."""
    largest = _max(truth.abs())
    scale = min(1.0, 2.0 ** math.floor(math.log2(largest))) if largest else 1.0
    t = (truth / scale).to(dtype)
    half_a_subnormal = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / 2
    return max(2 * _max((t + 0.3 - 0.3 - t).abs()) * scale, half_a_subnormal if largest else 0.0)


def _max(t: Tensor) -> float:
    return t.max().item() if t.numel() else 0.0

"""The rule itself: it must fail on what is wrong."""

import pytest
import torch

from infsa_kernels.testing import FORWARD, assert_close_to_reference, assert_within

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=DTYPES, ids=str)
def example(request):
    truth = torch.randn(6, 50, dtype=torch.float64) * 1e-2
    eager_low = truth.to(request.param)
    return eager_low.clone(), eager_low, truth


def fails(*args, match="^out: "):
    with pytest.raises(AssertionError, match=match):
        assert_close_to_reference(*args, FORWARD, "out")


def test_what_is_as_good_as_plain_code_passes(example):
    assert_close_to_reference(*example, FORWARD, "out")


def test_one_wrong_element_fails_and_is_named(example):
    actual, eager_low, truth = example
    actual[3, 17] += 4 * torch.finfo(actual.dtype).eps * truth.abs().max()
    fails(actual, eager_low, truth, match=r"^out: error .* at \[3, 17\] .* above the bound .* 1 of 300 elements")


@pytest.mark.parametrize("wrong", [0.0, 0.9, 1.1, -1.0, 2.0])
def test_a_wrong_scale_fails(example, wrong):
    actual, eager_low, truth = example
    fails(actual * wrong, eager_low, truth)


def test_small_results_are_held_to_as_many_digits(example):
    actual, eager_low, truth = example
    small = [t * 2.0**-6 for t in (actual, eager_low, truth)]
    assert_close_to_reference(*small, FORWARD, "out")
    fails(torch.zeros_like(actual), *small[1:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_subnormal_results_are_held_to_the_digits_that_they_have(dtype):
    spacing = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    truth = torch.linspace(0.4, 9.3, 50, dtype=torch.float64) * spacing
    assert_within(truth.to(dtype), truth, 0.0, FORWARD, "out")
    with pytest.raises(AssertionError, match="above the bound"):
        assert_within((truth + spacing).to(dtype), truth, 0.0, FORWARD, "out")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_fail_where_the_truth_has_none(example, value):
    actual, eager_low, truth = example
    actual[0, 0] = value
    fails(actual, eager_low, truth, match="differs from the reference at 1 of 300 elements, first at")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_pass_only_where_the_truth_has_them(example, value):
    actual, eager_low, truth = example
    truth[1, 2] = value
    fails(actual, eager_low, truth)
    actual[1, 2] = value
    assert_close_to_reference(actual, eager_low, truth, FORWARD, "out")
    actual[1, 3] = 1.0
    fails(actual, eager_low, truth)


def test_plain_code_that_overflows_allows_nothing(example):
    actual, eager_low, truth = example
    eager_low.fill_(float("inf"))
    assert_close_to_reference(actual, eager_low, truth, FORWARD, "out")
    fails(actual * 1.01, eager_low, truth)


def test_a_wrong_shape_fails(example):
    actual, eager_low, truth = example
    fails(actual[:1], eager_low, truth, match=r"shape \[1, 50\], expected \[6, 50\]")


def test_empty_passes():
    assert_within(torch.empty(0, 3), torch.empty(0, 3, dtype=torch.float64), 0.0, FORWARD, "out")


def test_float64_is_measured_by_float32_code():
    truth = torch.randn(100, dtype=torch.float64)
    actual = truth + 1e-16
    assert_close_to_reference(actual, truth.float(), truth, FORWARD, "out")
    fails(truth + 1e-14, truth.float(), truth)

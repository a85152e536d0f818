"""What a call costs before any number is computed, as a ratio to a built-in operator in the same run: never a time."""

import timeit

import pytest
import torch
from helpers.calls import OPS, raw_op

import infsa_kernels

pytestmark = pytest.mark.alone

# Measured on a quiet CPU: 2 to 3 without gradients, 4 to 6 with them.
LIMIT, LIMIT_WITH_GRADIENTS = 6, 15


def costs(*functions, rounds=60, number=50):
    """The least of many short turns for each, all in turn: what the code takes when nothing else gets in its way."""
    turns = [[timeit.timeit(function, number=number) for function in functions] for _ in range(rounds)]
    return [min(times) for times in zip(*turns)]


@pytest.fixture
def tiny():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(False)
    yield torch.randn(3, 1, 1, 1, 16).unbind()
    torch.set_num_threads(before)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_overhead_over_the_raw_operator(op, requires_grad, tiny):
    q, k, v = (t.detach().requires_grad_(requires_grad) for t in tiny)
    forward = raw_op(f"{op}_fwd", infsa_kernels.choose_backend(op, q.device, q.dtype, q.shape)).default
    arguments = q, k, v, 1e-6, 0.95, None, None, None
    public = getattr(infsa_kernels, f"{op}_infsa")

    def bare():
        with torch._C._AutoDispatchBelowAutograd():
            forward(*arguments)

    def built_in():
        torch.nn.functional.scaled_dot_product_attention(q, k, v)

    whole, kernel, peer = costs(lambda: public(q, k, v), bare, built_in)
    assert (whole - kernel) / peer < (LIMIT_WITH_GRADIENTS if requires_grad else LIMIT)


@pytest.mark.parametrize("op", OPS)
def test_number_and_tensor_rho_cost_about_the_same(op, tiny):
    """A float rho that had to fail at the other overload first would cost ten times as much as the arithmetic."""
    public, rho = getattr(infsa_kernels, f"{op}_infsa"), torch.ones(1)
    number, tensor = costs(lambda: public(*tiny, 0.9), lambda: public(*tiny, rho))
    assert number < 1.5 * tensor

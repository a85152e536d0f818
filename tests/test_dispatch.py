"""What a call costs before any number is computed, as a ratio to a built-in operator in the same run: never a time."""

import statistics
import timeit

import pytest
import torch
from calls import OPS, raw_op

import infsa_kernels

# Measured on a quiet CPU: about 2 without gradients and 6 with them.
LIMIT, LIMIT_WITH_GRADIENTS = 6, 15


def cost(function, repeats=15, number=200):
    """The least of many: what the code takes when nothing else gets in its way."""
    return min(timeit.repeat(function, repeat=repeats, number=number))


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
    forward = raw_op(f"{op}_fwd", infsa_kernels.choose_backend(q.device, q.dtype, q.shape)).default
    arguments = q, k, v, 1e-6, 0.95, None, None, None
    public = getattr(infsa_kernels, f"{op}_infsa")

    def bare():
        with torch._C._AutoDispatchBelowAutograd():
            forward(*arguments)

    ratios = []
    for _ in range(3):
        overhead = cost(lambda: public(q, k, v)) - cost(bare)
        ratios.append(overhead / cost(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v)))
    assert statistics.median(ratios) < (LIMIT_WITH_GRADIENTS if requires_grad else LIMIT)


@pytest.mark.parametrize("op", OPS)
def test_number_and_tensor_rho_cost_about_the_same(op, tiny):
    """A float rho that had to fail at the other overload first would cost ten times as much as the arithmetic."""
    public, rho = getattr(infsa_kernels, f"{op}_infsa"), torch.ones(1)
    assert cost(lambda: public(*tiny, 0.9)) < 1.5 * cost(lambda: public(*tiny, rho))

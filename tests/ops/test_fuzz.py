"""Random calls of every kind against the float64 reference, on every backend; the same calls in every run."""

from random import Random

import pytest
import torch
from fuzz import near_the_kink, random_call
from helpers.backends import backends_of
from helpers.calls import OPS, check, expected
from helpers.sweep import some

import infsa_kernels

# Of each operator; every one runs forward and backward on every backend.
CASES = some([50, 600], 50)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("cases", CASES)
def test_random_calls(op, cases, device):
    draw = Random(op)
    for case in range(cases):
        call, dout = random_call(draw, op, device)
        if near_the_kink(call):
            continue
        torch.manual_seed(case)
        wanted = expected(call, dout, draws=16)
        for backend in backends_of(device):
            with infsa_kernels.backend(backend):
                try:
                    check(call, dout, wanted)
                except AssertionError as error:
                    raise AssertionError(f"call {case}, backend {backend!r}: {error}") from error

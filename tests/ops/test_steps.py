"""The parts of operators for tokens of which others have the rest: put together, they are the operator."""

import itertools
from dataclasses import replace

import pytest
import torch
from helpers.calls import DTYPES, OPS, accumulation
from helpers.framework_calls import LAYOUTS, make_call
from helpers.parts import check_in_parts, linear_in_parts, pure_in_blocks
from helpers.sweep import swept
from torch.library import opcheck

from infsa_kernels.ops.linear_steps import choose_steps

FORMS = ("plain", "tied", "masked", "tied_masked_one_rho")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.one_in(2)
def test_parts_are_the_operator(backend, device, op, dtype, form):
    for layout in LAYOUTS:
        check_in_parts(make_call(op, form, dtype, device, layout), backend, layout)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.one_in(2)
def test_parts_with_a_floor_are_the_operator(backend, device, dtype, form):
    for layout in LAYOUTS:
        call = replace(make_call("linear", form, dtype, device, layout), score_floor=0.3)
        check_in_parts(call, backend, layout)


@pytest.mark.only_backend("cpu", "eager")
@pytest.mark.parametrize("floor", [0.0, 0.3])
@pytest.mark.parametrize("size", [1e25, 1e-12])
@pytest.mark.parametrize("tied", [False, True])
def test_sums_of_large_and_small_tokens_stay_in_range(backend, device, size, tied, floor):
    call = make_call("linear", "tied" if tied else "plain", torch.float32, device)
    k = None if tied else call.k * size
    call = replace(call, q=call.q * size, k=k, rho=1.0, eps=1e-34, score_floor=floor)
    dout = torch.randn(*call.q.shape[:2], call.v.shape[3], device=device)
    check_against_double(call, dout, backend)


@pytest.mark.only_backend("cpu", "eager")
@pytest.mark.parametrize("floor", [0.0, 0.3])
@pytest.mark.parametrize(
    ("q_size", "k_size", "v_size", "dout_size"),
    [
        (1e-6, 1e-6, 1e-30, 1e-12),
        (1e-6, 1e-6, 1e-10, 1e-32),
        (1e13, 1e-1, 1e-25, 1e-10),
        (1e-6, None, 1e-30, 1e-12),
        (1e-7, 1e-7, 1e-33, 1.0),
    ],
)
def test_products_of_values_and_gradients_that_vanish(backend, device, q_size, k_size, v_size, dout_size, floor):
    """dout . v, or that over the sum of the scores, is below float32; over small scores, or times large queries, it is not."""
    call = make_call("linear", "plain" if k_size else "tied", torch.float32, device)
    k, eps = (call.k * k_size if k_size else None), 0.1 * q_size * (k_size or q_size)
    call = replace(call, q=call.q * q_size, k=k, v=call.v * v_size, rho=1.0, eps=eps, score_floor=floor)
    dout = torch.randn(*call.q.shape[:2], call.v.shape[3], device=device) * dout_size
    check_against_double(call, dout, backend)


def check_against_double(call, dcontext, backend):
    truth, truths = call.to(torch.float64).reference_results(dcontext.double(), torch.float64)
    context, gradients = linear_in_parts(call, dcontext, backend)
    for name, actual, right in (("context", context, truth), *((n, g, truths[n]) for n, g in gradients.items())):
        smallest = torch.finfo(actual.dtype).smallest_normal * torch.finfo(actual.dtype).eps
        assert (actual.double() - right).abs().max() <= 1e-5 * right.abs().max() + smallest, name


@pytest.mark.parametrize(
    ("dtype", "form", "layout"),
    [
        (torch.float32, "plain", "token_major"),
        (torch.bfloat16, "tied_masked_one_rho", "token_major"),
        *map(swept, itertools.product(DTYPES, FORMS, LAYOUTS)),
    ],
)
def test_opcheck(backend, device, dtype, form, layout):
    seen = set()

    def checked(op, *arguments):
        # Compiling takes its time: once for each operator.
        compiled = () if op in seen else ("test_aot_dispatch_static",)
        seen.add(op)
        opcheck(op, arguments, test_utils=("test_schema", "test_faketensor", *compiled))
        return op(*arguments)

    call = make_call("linear", form, dtype, device, layout)
    dcontext = torch.randn(*call.q.shape[:2], call.v.shape[3], device=device).to(accumulation(dtype))
    for floor in (0.0, 0.3):
        linear_in_parts(replace(call, score_floor=floor), dcontext, backend, checked)
    dout = torch.randn(*call.q.shape[:3], call.v.shape[3], device=device).to(dtype)
    pure_in_blocks(call, dout, backend, checked)


def test_nothing_silent(backend, device):
    q = torch.randn(2, 3, 4, 5, device=device, requires_grad=True)
    steps = choose_steps(q, backend)
    with pytest.raises(NotImplementedError, match=r"distributed\.linear_infsa has one"):
        steps.queries_fwd(q, None)
    with torch.no_grad():
        with pytest.raises(ValueError, match="query_padding_mask has shape"):
            steps.queries_fwd(q, torch.zeros(2, 5, dtype=torch.bool, device=device))
        with pytest.raises(TypeError, match=r"central_query has dtype torch\.float64, expected torch\.float32"):
            steps.keys_fwd(q, q, q[:, :, 0].double(), None)

"""The parts of operators for tokens of which others have the rest: put together, they are the operator."""

import itertools

import pytest
import torch
from helpers.calls import DTYPES, accumulation, expected
from helpers.framework_calls import LAYOUTS, make_call
from torch.library import opcheck

from infsa_kernels.ops.linear_steps import choose_steps, mean
from infsa_kernels.ops.pure_blocks import choose_blocks
from infsa_kernels.testing import FORWARD, GRADIENT, assert_within

PARTS = (0, 2, 2, 5)  # tokens up to which each part goes; one is empty


def parts(t, dim=2):
    if t is None:
        return [None] * 3
    return [t.narrow(dim, a, min(b, t.shape[dim]) - a) for a, b in itertools.pairwise(PARTS)]


def linear_in_parts(call, dcontext, record=lambda op, *arguments: op(*arguments)):
    """z / rho and the gradients for a dcontext, from three parts of the tokens."""
    acc, tied = accumulation(call.q.dtype), call.k is None
    qs, ks, vs = parts(call.q), parts(call.q if tied else call.k), parts(call.v)
    query_masks, key_masks = parts(call.query_padding_mask, 1), parts(call.key_padding_mask, 1)
    steps = choose_steps(call.q)
    sums = sum(record(steps.queries_fwd, q, m) for q, m in zip(qs, query_masks))
    central_query, energy_sum = mean(sums, call.eps, acc)
    sums = sum(record(steps.keys_fwd, k, v, central_query, m) for k, v, m in zip(ks, vs, key_masks))
    context, score_sum = mean(sums, call.eps, acc)
    wanted = [not tied, True, True, tied]
    back = [
        record(steps.keys_bwd, dcontext, k, v, context, central_query, score_sum, call.eps, m, wanted)
        for k, v, m in zip(ks, vs, key_masks)
    ]
    dcentral = sum(dqbar for _, _, dqbar, *_ in back)
    dq = [
        record(
            steps.queries_bwd, dcentral, *(dscores if tied else (None, None)), q, central_query, energy_sum, call.eps, m
        )
        for q, m, (*_, dt, unit) in zip(qs, query_masks, back)
        for dscores in [(dt, unit)]
    ]
    gradients = {"q": torch.cat(dq, 2), "v": torch.cat([dv for _, dv, *_ in back], 2)}
    return context, gradients if tied else gradients | {"k": torch.cat([dk for dk, *_ in back], 2)}


def pure_in_blocks(call, dout, record=lambda op, *arguments: op(*arguments)):
    """The output before rho and the gradients for a dout, from blocks of two parts of the queries and three of the keys."""
    tied = call.k is None
    blocks, eps = choose_blocks(call.q), call.eps
    qs, douts, query_masks = (
        [None] * 2 if t is None else t.split([3, t.shape[dim] - 3], dim)
        for t, dim in ((call.q, 2), (dout, 2), (call.query_padding_mask, 1))
    )
    ks, vs, key_masks = parts(call.q if tied else call.k), parts(call.v), parts(call.key_padding_mask, 1)
    found = [
        [record(blocks.fwd, q, k, v, eps, key_mask, mask) for k, v, key_mask in zip(ks, vs, key_masks)]
        for q, mask in zip(qs, query_masks)
    ]
    norm = sum(n.double().square() for row in found for _, n in row).sqrt()
    out = [sum(o * ((n + eps) / (norm + eps))[..., None, None] for o, n in row) for row in found]
    dout_out = sum((o * d).sum((-2, -1), dtype=torch.float64) for o, d in zip(out, douts))
    totals = [[0, 0, 0, 0] for _ in range(5)]
    norm = norm.to(accumulation(call.q.dtype))
    rho = torch.ones_like(norm)
    for (i, (q, d, mask)), (j, (k, v, key_mask)) in itertools.product(
        enumerate(zip(qs, douts, query_masks)), enumerate(zip(ks, vs, key_masks))
    ):
        dq, dk, dv, drho = record(blocks.bwd, d, q, k, v, dout_out, norm, eps, 1.0, rho, key_mask, mask, [True] * 4)
        assert dq.dtype == dk.dtype == dv.dtype == norm.dtype
        totals[i][0] = totals[i][0] + dq
        totals[2 + j][1], totals[2 + j][2] = totals[2 + j][1] + dk, totals[2 + j][2] + dv
        totals[0][3] = totals[0][3] + drho
    dq = torch.cat([t[0] for t in totals[:2]], 2)
    dk, dv = (torch.cat([t[n] for t in totals[2:]], 2) for n in (1, 2))
    gradients = {"q": dq + dk, "v": dv} if tied else {"q": dq, "k": dk, "v": dv}
    return torch.cat(out, 2), gradients, totals[0][3]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["plain", "tied", "masked", "tied_masked_one_rho"])
def test_linear_in_parts_is_linear(backend, device, dtype, form):
    for layout in LAYOUTS:
        call = make_call("linear", form, dtype, device, layout)
        call.rho = 1.0
        dout = torch.randn(*call.q.shape[:2], call.v.shape[3], device=device).to(dtype)
        wanted = expected(call, dout)
        context, gradients = linear_in_parts(call, dout.to(accumulation(dtype)))
        assert context.dtype == accumulation(dtype)
        assert_within(context, wanted["out"].truth, wanted["out"].eager_error, FORWARD, f"context, {layout}")
        for name, gradient in gradients.items():
            assert gradient.dtype == dtype
            assert_within(gradient, wanted[name].truth, wanted[name].eager_error, GRADIENT, f"d{name}, {layout}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["plain", "tied", "masked", "tied_masked_one_rho"])
def test_blocks_of_pure_are_pure(backend, device, dtype, form):
    for layout in LAYOUTS:
        call = make_call("pure", form, dtype, device, layout)
        call.rho = 1.0
        dout = torch.randn(*call.q.shape[:3], call.v.shape[3], device=device).to(dtype)
        if call.query_padding_mask is not None:
            dout.masked_fill_(call.query_padding_mask[:, None, :, None], 0)
        wanted = expected(call, dout)
        out, gradients, drho = pure_in_blocks(call, dout)
        assert_within(out.to(dtype), wanted["out"].truth, wanted["out"].eager_error, FORWARD, f"out, {layout}")
        for name, gradient in gradients.items():
            assert_within(
                gradient.to(dtype), wanted[name].truth, wanted[name].eager_error, GRADIENT, f"d{name}, {layout}"
            )
        torch.testing.assert_close(drho.double(), (out.double() * dout.double()).sum((-2, -1)), rtol=1e-4, atol=1e-5)


@pytest.mark.only_backend("cpu", "eager")
@pytest.mark.parametrize("size", [1e25, 1e-15])
@pytest.mark.parametrize("tied", [False, True])
def test_sums_of_large_and_small_tokens_stay_in_range(backend, device, size, tied):
    call = make_call("linear", "tied" if tied else "plain", torch.float32, device)
    call.q, call.rho, call.eps = call.q * size, 1.0, 1e-60
    call.k = None if tied else call.k * size
    dout = torch.randn(*call.q.shape[:2], call.v.shape[3], device=device)
    double = call.to(torch.float64)
    truth, truths = double.reference_results(dout.double(), torch.float64)
    context, gradients = linear_in_parts(call, dout)
    for name, actual, right in (("context", context, truth), *((n, g, truths[n]) for n, g in gradients.items())):
        assert (actual.double() - right).abs().max() <= 1e-5 * right.abs().max(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["plain", "tied_masked_one_rho"])
@pytest.mark.parametrize("layout", ["contiguous", "token_major"])
def test_opcheck(backend, device, dtype, form, layout):
    def checked(op, *arguments):
        opcheck(op, arguments, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_static"))
        return op(*arguments)

    call = make_call("linear", form, dtype, device, layout)
    linear_in_parts(
        call, torch.randn(*call.q.shape[:2], call.v.shape[3], device=device).to(accumulation(dtype)), checked
    )
    call.op = "pure"
    pure_in_blocks(call, torch.randn(*call.q.shape[:3], call.v.shape[3], device=device).to(dtype), checked)


def test_nothing_silent(backend, device):
    q = torch.randn(2, 3, 4, 5, device=device, requires_grad=True)
    steps = choose_steps(q)
    with pytest.raises(NotImplementedError, match=r"distributed\.linear_infsa has one"):
        steps.queries_fwd(q, None)
    with torch.no_grad():
        with pytest.raises(ValueError, match="query_padding_mask has shape"):
            steps.queries_fwd(q, torch.zeros(2, 5, dtype=torch.bool, device=device))
        with pytest.raises(TypeError, match=r"central_query has dtype torch\.float64, expected torch\.float32"):
            steps.keys_fwd(q, q, q[:, :, 0].double(), None)

"""The Triton kernels of the pooled layer in Triton's interpreter, against the float64 reference."""

import itertools

import pytest
import torch
from helpers.interpreter import needs_interpreter
from helpers.layouts import tokens_amid_nan

from infsa_kernels import reference
from infsa_kernels.testing import FORWARD, GRADIENT, assert_within, error_of_eager

pytest.importorskip("triton")

pytestmark = [pytest.mark.interpreter, needs_interpreter]

EPS = 1.0
NAMES = "x", "weight", "bias"


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
    """Several splits, several tiles in a split, and backward in several blocks of tokens."""
    from infsa_kernels.triton import central_query, configs

    monkeypatch.setattr(configs, "multiprocessors", lambda device: 2)
    monkeypatch.setattr(central_query, "BLOCK_TOKENS", 280)


def of_triton(call, dcentral, norm_eps, mask):
    from infsa_kernels.triton import central_query

    x, weight, bias = call
    central, energy = central_query.forward(x, weight, bias, norm_eps, EPS, mask)
    gradients = [None if t is None else torch.full_like(t, torch.nan) for t in call]
    central_query.backward(dcentral, x, weight, bias, central, energy, norm_eps, EPS, mask, gradients)
    return {"central_query": central, "energy_sum": energy} | {
        f"d{n}": g for n, g in zip(NAMES, gradients) if g is not None
    }


def of_reference(call, dcentral, norm_eps, mask, dtype):
    """The same from the reference, whose gradients are autograd's; energy_sum is no result of it."""
    leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in call]
    central = reference.central_query(*leaves, norm_eps, EPS, mask)
    wanted = [t for t in leaves if t is not None]
    found = torch.autograd.grad(central, wanted, dcentral.to(central.dtype))
    return {"central_query": central.detach()} | {f"d{n}": g for n, g in zip(NAMES, found)}


def check(x, mask, H, d, *, bias, norm_eps):
    weight = (torch.randn(H, d, x.shape[2]) * x.shape[2] ** -0.5).to(x.dtype)
    call = x, weight, torch.randn(H, d) if bias else None
    dcentral = torch.randn(x.shape[0], H, d)
    actual = of_triton(call, dcentral, norm_eps, mask)
    truth = of_reference(call, dcentral, norm_eps, mask, torch.float64)
    low = of_reference(call, dcentral, norm_eps, mask, x.dtype)
    for name, right in truth.items():
        error = error_of_eager(low[name], right, x.dtype)
        # The central query comes in float32, of products whose factors have the dtype of x.
        result = actual[name].to(x.dtype)
        assert_within(result, right, error, FORWARD if name == "central_query" else GRADIENT, name)
    again = of_triton(call, dcentral, norm_eps, mask)
    assert all(torch.equal(again[name], actual[name]) for name in actual), "two runs differ"


TILES = [(torch.float32, False), *itertools.product((torch.bfloat16, torch.float16), (False, True))]


@pytest.mark.parametrize(("dtype", "large"), TILES, ids=str)
@pytest.mark.parametrize("norm_eps", [None, 1e-5])
@pytest.mark.one_in(3)
def test_central_query(dtype, large, norm_eps):
    """Odd sizes, with and without masks, biases and strides."""
    from infsa_kernels.triton import central_query

    with central_query.tiles(large):
        every_form(dtype, norm_eps)


def every_form(dtype, norm_eps):
    for masked, (H, d, D) in itertools.product((False, True), ((3, 5, 24), (2, 16, 80))):
        x, mask = tokens_amid_nan(2, 150, D, dtype, strided=masked, masked=masked)
        check(x, mask, H, d, bias=masked, norm_eps=norm_eps)


@pytest.mark.parametrize("multiprocessors", [8, 108, 132])
@pytest.mark.parametrize("heads", [1, 16, 64])
def test_large_tiles_leave_no_multiprocessor_without_one(heads, multiprocessors, monkeypatch):
    """Nor do they start where most of a tile would lie past the last token."""
    from infsa_kernels.triton import central_query, configs

    monkeypatch.setattr(configs, "multiprocessors", lambda device: multiprocessors)
    monkeypatch.setattr(central_query, "BLOCK_TOKENS", 1 << 14)
    weight, found = torch.empty(heads, 16, 32, dtype=torch.bfloat16, device="meta"), set()
    for B, N in itertools.product((1, 2, 7, 64, 1000), (1, 127, 128, 197, 1025, 4224, 65536)):
        x = torch.empty(B, N, 32, dtype=torch.bfloat16, device="meta")
        tiling = central_query.Tiling(x, weight, "forward")
        found.add(tiling.large)
        if tiling.large:
            assert tiling.rows <= N and B * -(-N // tiling.rows) * tiling.groups >= multiprocessors
        assert not central_query.Tiling(x.float(), weight.float(), "forward").large
    assert False in found and (True in found) == (128 * max(1, heads // 8) >= multiprocessors)


def test_a_mean_far_above_the_deviation():
    x, mask = tokens_amid_nan(1, 40, 48, torch.float32, strided=False, masked=False, offset=1e4)
    check(x, mask, 2, 8, bias=True, norm_eps=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("d", [130, 256])
@pytest.mark.one_in(2)
def test_wide_heads(dtype, d):
    """The tiles of heads of more than 128 channels."""
    x, mask = tokens_amid_nan(2, 70, 24, dtype, strided=True, masked=True)
    check(x, mask, 2, d, bias=True, norm_eps=1e-5)

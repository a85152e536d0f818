"""The Triton kernels of score_pool and score_pool_floor in Triton's interpreter, against the float64 reference."""

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
NAMES = "x", "keys", "key_bias"
DTYPES = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
    """Several splits, several tiles in a split, and several blocks of tokens."""
    from infsa_kernels.triton import configs, score_pool

    monkeypatch.setattr(configs, "multiprocessors", lambda device: 2)
    monkeypatch.setattr(score_pool, "BLOCK_BYTES", 1 << 14)


def of_triton(call, douts, norm_eps, mask, score_floor):
    from infsa_kernels.triton import score_pool, score_pool_floor

    kernels, more = (score_pool_floor, (score_floor,)) if score_floor else (score_pool, ())
    pooled, mass, *sums = kernels.forward(*call, norm_eps, EPS, *more, mask)
    gradients = tuple(None if t is None else torch.full_like(t, torch.nan) for t in call)
    kernels.backward(*douts, *call, pooled, *sums, norm_eps, EPS, *more, mask, gradients)
    return {"pooled": pooled, "mass": mass} | {f"d{n}": g for n, g in zip(NAMES, gradients) if g is not None}


def of_reference(call, douts, norm_eps, mask, score_floor, dtype):
    """The same from the reference, whose gradients are autograd's."""
    leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in call]
    outs = reference.score_pool(*leaves, norm_eps, EPS, mask, score_floor)
    wanted = [t for t in leaves if t is not None]
    found = torch.autograd.grad(outs, wanted, [t.to(dtype) for t in douts])
    results = {"pooled": outs[0].detach(), "mass": outs[1].detach()}
    return results | {f"d{n}": g for n, g in zip((n for n, t in zip(NAMES, call) if t is not None), found)}


def plain(call, setting, draws=4):
    """The reference in the dtype of x and in float64, of this call and of some whose values differ by up to 1/64."""
    for draw in range(draws):
        near = [t if t is None or not draw else t * (1 + (torch.rand_like(t) - 0.5) / 32) for t in call]
        yield tuple(of_reference(near, *setting, dtype) for dtype in (call[0].dtype, torch.float64))


def check(x, mask, H, *, bias, norm_eps, score_floor=0.0):
    B, _, D = x.shape
    call = x, torch.randn(B, H, D) * D**-0.5, torch.randn(B, H) / 4 if bias else None
    setting = (torch.randn(B, H, D), torch.randn(B, H)), norm_eps, mask, score_floor
    actual = of_triton(call, *setting)
    truth = of_reference(call, *setting, torch.float64)
    nearby = list(plain(call, setting))
    assert actual.keys() == truth.keys()
    for name, right in truth.items():
        # What comes in float32 is made of products whose factors have the dtype of x.
        error = max(error_of_eager(low[name], true[name], x.dtype) for low, true in nearby)
        assert_within(actual[name].to(x.dtype), right, error, GRADIENT if name.startswith("d") else FORWARD, name)
    again = of_triton(call, *setting)
    assert all(torch.equal(again[name], actual[name]) for name in actual), "two runs differ"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm_eps", [None, 1e-5])
@pytest.mark.parametrize("score_floor", [0.0, 0.3])
@pytest.mark.one_in(4)
def test_score_pool(dtype, norm_eps, score_floor):
    """Odd sizes, with and without masks, biases and strides; several tiles of channels."""
    for masked, H, D in (False, 3, 23), (True, 17, 135):
        x, mask = tokens_amid_nan(2, 140, D, dtype, strided=masked, masked=masked)
        check(x, mask, H, bias=masked, norm_eps=norm_eps, score_floor=score_floor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.one_in(3)
def test_groups_of_heads(dtype):
    x, mask = tokens_amid_nan(1, 40, 24, dtype, strided=False, masked=True)
    for score_floor in (0.0, 0.3):
        check(x, mask, 70, bias=True, norm_eps=1e-5, score_floor=score_floor)


def test_many_short_samples_share_a_block():
    x, mask = tokens_amid_nan(37, 7, 16, torch.float32, strided=False, masked=True)
    check(x, mask, 2, bias=True, norm_eps=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts(dtype):
    """One token, one channel and one head; tokens that all samples share; channels apart."""
    for x in (
        torch.randn(2, 1, 1),
        torch.randn(1, 33, 20).expand(3, -1, -1),
        torch.randn(2, 20, 33).transpose(1, 2),
    ):
        check(x.to(dtype), None, 1, bias=False, norm_eps=None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_mean_far_above_the_deviation(dtype):
    offset = 1e4 if dtype == torch.float32 else 30.0
    x, mask = tokens_amid_nan(1, 40, 45, dtype, strided=False, masked=False, offset=offset)
    check(x, mask, 2, bias=True, norm_eps=1e-5)
    if dtype == torch.float32:
        # Plain code takes off a mean that is rounded to 1/1024.
        call = x, torch.randn(1, 2, 45), None
        setting = (torch.randn(1, 2, 45), torch.randn(1, 2)), 1e-5, None, 0.0
        truth = of_reference(call, *setting, torch.float64)["pooled"]
        assert (of_triton(call, *setting)["pooled"] - truth).abs().max() < 2e-6


def test_nothing_past_the_channels_is_normalised():
    """A mean so far above the deviation that float16 does not hold what 0 would become."""
    x = torch.full((1, 5, 1500), 6e4).index_fill(2, torch.tensor(7), 6e4 + 32).half()
    check(x, None, 2, bias=True, norm_eps=1e-5)


@pytest.mark.parametrize("score_floor", [0.0, 0.3])
def test_nothing_that_counts(score_floor):
    """A sample of removed tokens, a head whose scores are all negative, and a token whose score is 0."""
    x = torch.randn(2, 20, 12)
    x[0, 3] = 0
    x[1] = torch.nan
    mask = torch.zeros(2, 20, dtype=torch.bool)
    mask[1] = True
    call = x, torch.randn(2, 2, 12), torch.tensor([[-1e3, 0.0]] * 2)
    douts = torch.randn(2, 2, 12), torch.randn(2, 2)
    actual = of_triton(call, douts, None, mask, score_floor)
    for name, right in of_reference(call, douts, None, mask, score_floor, torch.float64).items():
        torch.testing.assert_close(actual[name], right.float(), msg=name)
    assert not any(actual[name][1].any() for name in actual)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_digits_of_what_is_not_rounded(dtype):
    """Keys, scores and their gradients keep more digits in a product than tokens have."""
    call = torch.randn(1, 100, 40).to(dtype), torch.randn(1, 3, 40), None
    setting = (torch.randn(1, 3, 40), torch.randn(1, 3)), None, None, 0.0
    actual, truth = of_triton(call, *setting), of_reference(call, *setting, torch.float64)
    for name in ("pooled", "mass", "dkeys"):
        error = (actual[name] - truth[name]).abs().max() / truth[name].abs().max()
        assert error < 2**-14, f"{name}: {error}"


def test_range_of_float16():
    """Neither large keys and scores nor small gradients leave it."""
    call = (torch.randn(1, 70, 20) * 1e3).half(), torch.randn(1, 3, 20) * 1e5, None
    setting = (torch.randn(1, 3, 20) * 1e-3, torch.zeros(1, 3)), None, None, 0.0
    actual, truth = of_triton(call, *setting), of_reference(call, *setting, torch.float64)
    for name in ("pooled", "dkeys"):
        assert (actual[name] - truth[name]).abs().max() < 2**-14 * truth[name].abs().max(), name


@pytest.mark.parametrize("wanted", list(itertools.product((False, True), repeat=3)))
@pytest.mark.one_in(4)
def test_gradients_that_nobody_asked_for(wanted):
    from infsa_kernels.triton import score_pool

    call = torch.randn(1, 20, 12), torch.randn(1, 2, 12), torch.randn(1, 2)
    pooled, _, score_sum = score_pool.forward(*call, 1e-5, EPS, None)
    given = torch.randn(1, 2, 12), torch.randn(1, 2), *call, pooled, score_sum, 1e-5, EPS, None
    complete, some = [tuple(map(torch.empty_like, call)) for _ in "ab"]
    score_pool.backward(*given, complete)
    score_pool.backward(*given, tuple(g if asked else None for g, asked in zip(some, wanted)))
    assert all(torch.equal(a, b) for a, b, asked in zip(complete, some, wanted) if asked)


@pytest.mark.parametrize("shape", [(0, 5, 3, 2), (2, 0, 3, 2), (2, 5, 0, 2), (2, 5, 3, 0)])
def test_empty(shape):
    B, N, D, H = shape
    call = torch.randn(B, N, D), torch.randn(B, H, D), None
    for score_floor in (0.0, 0.3):
        results = of_triton(call, (torch.randn(B, H, D), torch.randn(B, H)), None, None, score_floor)
        assert not any(t.any() for t in results.values())

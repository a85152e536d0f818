"""The pooled layer against the plain path: LayerNorm, projections, Linear-InfSA, output projection."""

import itertools

import pytest
import torch
from helpers.calls import DTYPES
from helpers.pooled_linear_calls import B, D, N, check, layer, leaves, output_gradient, results
from torch.testing import assert_close

from infsa_kernels import pooled_linear_infsa, reference

EVERY_FORM = [
    dict(tied=tied, bias=bias, norm=norm, masked=masked)
    for tied, bias, norm, masked in itertools.product(
        (True, False), (True, False), ("affine", "plain", ""), (False, True)
    )
]
FORMS = [
    dict(tied=True, bias=True, norm="affine", masked=True, rho="heads"),
    dict(tied=False, bias=True, norm="plain", rho="scalar"),
    dict(tied=True, bias=False, norm="", masked=True, rho="number"),
    dict(tied=False, bias=False, norm="affine", rho="one"),
]
# (B, N, D), heads, head_dim, value head_dim, output: primes, single tokens, heads wider than a vector and narrower,
# one more than a block of tokens, more heads than a tile, depths of more than one block of a product.
SIZES = [
    ((1, 1, 1), 1, 1, 1, 1),
    ((1, 197, 48), 3, 16, 16, 48),
    ((3, 5, 7), 1, 7, 3, 2),
    ((1, 193, 33), 2, 31, 9, 65),
    ((2, 101, 67), 13, 3, 5, 8),
    ((1, 60, 530), 17, 20, 4, 30),
    ((1, 25, 64), 40, 2, 1, 7),
]


@pytest.fixture(autouse=True)
def _on_every_backend(device, backend):
    with torch.device(device):
        yield


def assert_exact(call):
    """Forward and every gradient of the plain path, to 1e-12 of the largest element, or of 0.1 where they cancel to less."""
    dout = output_gradient(call)
    actual, wanted = (results(f, call, dout) for f in (pooled_linear_infsa, reference.pooled_linear))
    assert actual.keys() == wanted.keys()
    for name, truth in wanted.items():
        scale = max(0.1, float(truth.abs().max()))
        assert_close(actual[name], truth, rtol=0, atol=1e-12 * scale, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("form", EVERY_FORM, ids=str)
def test_exact_in_float64(form):
    assert_exact(layer(**form))


@pytest.mark.parametrize("rho", ["number", "scalar", "one", "heads"])
def test_every_rho(rho):
    assert_exact(layer(rho=rho))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_sizes_in_float64(form, sizes):
    shape, heads, head, v_head, out = sizes
    assert_exact(layer(**form, shape=shape, heads=heads, head=head, v_head=v_head, out=out))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_rule(form, dtype):
    call = layer(dtype, **form)
    check(call, output_gradient(call))


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("sizes", SIZES[1:], ids=str)
@pytest.mark.one_in(3)
def test_sizes_by_the_rule(sizes, dtype):
    shape, heads, head, v_head, out = sizes
    call = layer(dtype, tied=False, shape=shape, heads=heads, head=head, v_head=v_head, out=out)
    # Of many heads and few tokens some would have next to no positive score, and no digits: keys near the queries.
    with torch.no_grad():
        call["k_weight"].mul_(0.25).add_(call["q_weight"])
        call["k_bias"].mul_(0.25).add_(call["q_bias"])
    check(call, output_gradient(call))


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_mean_far_above_deviation(dtype):
    """Tokens of mean 30 and deviation 1: what normalisation must not lose by folding it into the weights."""
    call = layer(dtype, tied=False)
    call["x"] = (call["x"].detach() + 30).requires_grad_()
    check(call, output_gradient(call))


@pytest.mark.parametrize("offset", [1e3, 1e5])
def test_mean_of_float32_keeps_its_digits(offset):
    call = layer(torch.float32, bias=False)
    call["x"] = (call["x"].detach() + offset).requires_grad_()
    check(call, output_gradient(call))


@pytest.mark.only_backend("cpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1e-6, 1e6, 1e12, 1e15, 1e18])
def test_range(size, dtype):
    """What plain code keeps inside float32 the operators do too: scores times tokens grow with the third power of x."""
    for tied in (True, False):
        call = layer(dtype, tied=tied, bias=False, norm="", masked=True, rho="number")
        call["x"] = (call["x"].detach() * size).requires_grad_()
        call["eps"] = min(1e-6, size**2 * 1e-6)
        check(call, output_gradient(call))


def layouts():
    def poisoned(*shape):
        return torch.full(shape, torch.nan, dtype=torch.float64)

    def every_other_channel(x):
        view = poisoned(B, N, 2 * D + 1)[..., 1::2]
        return view.copy_(x)

    def every_third_token(x):
        return poisoned(B, 3 * N, D)[:, ::3].copy_(x)

    return {
        "channel_major": lambda x: x.mT.contiguous().mT,
        "token_first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        "every_other_channel": every_other_channel,
        "every_third_token": every_third_token,
        "expanded_batch": lambda x: x[:1].expand(x.shape),
        "expanded_token": lambda x: x[:, :1].expand(x.shape),
    }


@pytest.mark.parametrize("layout", list(layouts()))
@pytest.mark.parametrize("masked", [False, True])
def test_layouts(layout, masked):
    # The gradient of equal tokens all but cancels where eps is small: plain code in another order of sums has other digits.
    call = {**layer(masked=masked, tied=False), "eps": 1.0}
    call["x"] = layouts()[layout](call["x"].detach()).requires_grad_()
    for name in ("q_weight", "k_weight", "v_weight", "out_weight"):
        call[name] = call[name].detach().mT.contiguous().mT.requires_grad_()
    assert_exact(call)


def test_nothing_to_pool():
    """No tokens at all, and tokens that are all removed, whatever they hold: the output projection's bias."""
    for call in (layer(shape=(B, 0, D)), layer(shape=(0, N, D)), layer(masked=True)):
        if "padding_mask" in call:
            call["padding_mask"] = torch.ones(B, N, dtype=torch.bool)
            call["x"] = torch.full_like(call["x"], torch.nan).requires_grad_()
        dout = output_gradient(call)
        found = results(pooled_linear_infsa, call, dout)
        assert_close(found.pop("out"), call["out_bias"].detach().expand_as(dout))
        assert_close(found.pop("dout_bias"), dout.sum(0))
        for name, grad in found.items():
            assert_close(grad, torch.zeros_like(grad), msg=lambda m: f"{name}: {m}")


def test_removed_tokens_count_for_nothing():
    call = layer(masked=True, tied=False)
    poisoned = {
        **call,
        "x": call["x"].detach().masked_fill(call["padding_mask"][..., None], torch.nan).requires_grad_(),
    }
    dout = output_gradient(call)
    wanted, actual = results(pooled_linear_infsa, call, dout), results(pooled_linear_infsa, poisoned, dout)
    for name, t in wanted.items():
        assert_close(actual[name], t, rtol=0, atol=0)
    assert not actual["dx"][call["padding_mask"]].any()

    kept = {**call, "x": call["x"].detach()[:1, ~call["padding_mask"][0]].requires_grad_(), "padding_mask": None}
    assert_close(pooled_linear_infsa(**kept), wanted["out"][:1])


def test_no_positive_score():
    """Keys that point away from every query: output and gradients finite, exactly the bias and 0."""
    call = layer(tied=False, bias=False, norm="")
    call["k_weight"] = (-call["q_weight"]).detach().requires_grad_()
    call["x"] = torch.ones_like(call["x"]).requires_grad_()
    found = results(pooled_linear_infsa, call, output_gradient(call))
    for name, t in found.items():
        assert not t.any(), name
        assert t.isfinite().all(), name


def test_zero_tokens():
    """Tokens of zeros have queries of zero length, whose direction has no gradient."""
    call = layer(bias=False, norm="", tied=False)
    x = call["x"].detach().clone()
    x[:, ::2] = 0
    call["x"] = x.requires_grad_()
    assert_exact(call)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_bad_numbers_propagate(bad):
    for norm in ("", "affine"):
        call = layer(torch.float32, norm=norm)
        x = call["x"].detach().clone()
        x[0, 3, 5] = bad
        call["x"] = x.requires_grad_()
        found = results(pooled_linear_infsa, call, output_gradient(call))
        assert not found["out"][0].isfinite().any()
        assert found["out"][1].isfinite().all()
        assert not found["dx"][0].isfinite().all()
        assert found["dx"][1].isfinite().all()
        assert not found["dq_weight"].isfinite().all()


@pytest.mark.parametrize(
    "wanted", [("x",), ("q_weight",), ("q_bias",), ("k_weight", "rho"), ("v_weight",), ("norm_bias",)]
)
def test_some_gradients_only(wanted):
    call = layer(tied=False)
    dout = output_gradient(call)
    everything = results(pooled_linear_infsa, call, dout)
    some = {n: t.detach().requires_grad_(n in wanted) for n, t in leaves(call).items()}
    found = results(pooled_linear_infsa, {**call, **some}, dout)
    assert found.keys() == {"out"} | {f"d{n}" for n in wanted}
    for name, grad in found.items():
        assert_close(grad, everything[name], rtol=0, atol=0)

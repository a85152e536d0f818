"""LayerNorm under torch.autocast: normalised as given, in float32, and rounded after, as by nn.LayerNorm on the plain path."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.pooled_linear_calls import layer, output_gradient, results, to
from helpers.sweep import swept
from torch import nn
from torch.testing import assert_close

from infsa_kernels import pooled_linear_infsa, reference
from infsa_kernels.nn import InfSAAttention, InfViT

LOW = [torch.bfloat16, torch.float16]
D = 24
# Of the unfused path's error against float64.
FACTOR = 3


def offset(x):
    return x + 50


def outlier(x):
    return x * torch.ones(x.shape[-1]).index_fill(0, torch.tensor(3), 1e5)


def distance(actual, truth):
    """The error in proportion to the truth, as one number: single elements of two roundings differ by chance."""
    # The truth can be 0: gradients where no score is positive.
    return ((actual.double() - truth).norm() / truth.norm().clamp(min=1e-300)).item()


def assert_no_worse(draw, draws=25):
    """Of ``draw() -> {name: (actual, plain, truth)}``: the median error of several. One score that changes its sign in
    rounding moves a gradient more than all else: of 9 draws in some, one time in a hundred in enough to move the median."""
    found = [{n: (distance(t[0], t[2]), distance(t[1], t[2])) for n, t in draw().items()} for _ in range(draws)]
    for name in found[0]:
        ours, theirs = (sorted(errors[name][i] for errors in found)[draws // 2] for i in range(2))
        assert ours <= FACTOR * theirs, name


def plain_path(x, num_heads, q_weight, v_weight, out_weight, *, norm_weight, norm_bias, norm_eps, **rest):
    """The layer by modules' functions, each as autocast has it."""
    tokens = F.layer_norm(x, x.shape[2:], norm_weight, norm_bias, norm_eps)
    q, k, v = (
        F.linear(tokens, w, rest[f"{n}_bias"]).unflatten(-1, (num_heads, -1)).transpose(1, 2)
        for n, w in (("q", q_weight), ("k", rest["k_weight"]), ("v", v_weight))
    )
    masks = [rest.get("padding_mask")] * 2
    z = torch.ops.infsa.linear(q, k, v, 1e-6, rest["rho"], *masks)
    return F.linear(z.flatten(1), out_weight, rest["out_bias"])


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("change", [offset, outlier])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.one_in(2)
def test_error_is_that_of_the_plain_path(change, masked, dtype, device, backend):

    def draw():
        call = layer(torch.float32, tied=False, masked=masked)
        call["x"] = change(call["x"].detach()).requires_grad_()
        dout = output_gradient(call)
        truth = results(reference.pooled_linear, to(call, torch.float64), dout.double())
        with torch.autocast(device, dtype):
            actual, plain = results(pooled_linear_infsa, call, dout), results(plain_path, call, dout)
        assert actual["out"].dtype == dtype
        return {name: (actual[name], plain[name], truth[name]) for name in truth}

    assert_no_worse(draw)


@pytest.mark.parametrize("norm_eps", [1e-5, 0.0])
def test_removed_tokens_may_hold_anything(norm_eps, device, backend):
    call = layer(torch.float32, masked=True) | {"norm_eps": norm_eps}
    removed = call["padding_mask"]
    junk = {**call, "x": call["x"].detach().masked_fill(removed[..., None], torch.nan).requires_grad_()}
    with torch.autocast(device, torch.bfloat16):
        expected, actual = (results(pooled_linear_infsa, c, output_gradient(layer())) for c in (call, junk))
    assert (actual["dx"][removed] == 0).all()
    for name in expected.keys() - {"out"}:
        assert actual[name].isfinite().all()
    assert torch.equal(actual["out"], expected["out"])


def test_what_autocast_would_not_round_is_left_alone(device, backend):
    """A region switched off, float64, and tokens that are in its dtype already: exact as outside of it."""
    call = layer(torch.float32)
    plain = pooled_linear_infsa(**call)
    low, double = to(call, torch.bfloat16), to(call, torch.float64)
    expected = pooled_linear_infsa(**low)
    with torch.autocast(device, torch.bfloat16):
        with torch.autocast(device, enabled=False):
            assert torch.equal(pooled_linear_infsa(**call), plain)
        assert torch.equal(pooled_linear_infsa(**low), expected)
        with torch.autocast(device, torch.float16):
            inner = pooled_linear_infsa(**low)
            assert inner.dtype == torch.float16 and torch.allclose(inner.float(), expected.float(), atol=0.1)
    if backend in ("cpu", "eager"):
        expected = pooled_linear_infsa(**double)
        with torch.autocast(device, torch.bfloat16):
            assert torch.equal(pooled_linear_infsa(**double), expected)


def test_transforms_and_compile(device, backend):
    call = layer(torch.float32, masked=True)
    call = {n: t.detach() if isinstance(t, torch.Tensor) else t for n, t in call.items()}
    x = offset(torch.stack([call.pop("x"), torch.randn(2, 37, D)]))
    weights = torch.stack([call["norm_weight"], call["norm_weight"] + 1])

    def forward(x, norm_weight):
        return torch.ops.infsa.pooled_linear(x, **{**call, "norm_weight": norm_weight})

    def gradient(x, norm_weight):
        return torch.func.grad(lambda *args: forward(*args).float().square().sum(), argnums=(0, 1))(x, norm_weight)

    with torch.autocast(device, torch.bfloat16):
        for function in (forward, gradient):
            expected = [function(*args) for args in zip(x, weights)]
            if function is gradient:
                expected = tuple(torch.stack(pair) for pair in zip(*expected))
            else:
                expected = torch.stack(expected)
            assert_close(torch.vmap(function)(x, weights), expected, rtol=0.02, atol=0.02)
        compiled = torch.compile(forward, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x[0], weights[0]), forward(x[0], weights[0]))


def test_mixed_dtypes_and_errors(device, backend):
    call = layer(torch.float32)
    mixed = {n: t.bfloat16() if n in ("norm_weight", "norm_bias", "q_weight") else t for n, t in call.items()}
    with torch.autocast(device, torch.bfloat16):
        assert_close(pooled_linear_infsa(**mixed), pooled_linear_infsa(**call), rtol=0.05, atol=0.05)
        with pytest.raises(ValueError, match=r"norm_weight has shape \[3\], expected \(D,\) = \[24\]"):
            pooled_linear_infsa(**{**call, "norm_weight": torch.ones(3, device=device)})
        with pytest.raises(ValueError, match=r"x has shape \[37, 24\], expected \(B, N, D\)"):
            pooled_linear_infsa(**{**call, "x": call["x"][0]})
        with pytest.raises(ValueError, match="norm_eps is -1"):
            pooled_linear_infsa(**{**call, "norm_eps": -1.0})
        with pytest.raises(TypeError, match=r"norm_bias has dtype torch\.float64, expected torch\.float32"):
            pooled_linear_infsa(**{**call, "norm_bias": call["norm_bias"].double()})


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("change", [offset, outlier])
@pytest.mark.parametrize("variant", ["linear_infsa", "pure_infsa"])
def test_attention_with_its_norm(variant, change, dtype):
    attention, norm = InfSAAttention(D, 4, batch_first=True, variant=variant), nn.LayerNorm(D)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    x = change(torch.randn(2, 37, D))
    truth = copy.deepcopy(attention).double()(x.double(), norm=copy.deepcopy(norm).double())[0]
    with torch.autocast("cpu", dtype):
        fused, plain = attention(x, norm=norm)[0], attention(norm(x), need_weights=True)[0]
    assert distance(fused, truth) <= FACTOR * distance(plain, truth)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("size", [swept(1), 50])
def test_whole_model(size, dtype):
    """Forward and every gradient of InfViT beside the same model with hooks on its layers, which are then called."""
    model = InfViT(16, 4, 3, 5, 64, 4, 4)
    nn.init.normal_(model.head.weight)
    with torch.no_grad():
        model.pos_embed += size
    exact, hooked = copy.deepcopy(model).double(), copy.deepcopy(model)
    for part in hooked.modules():
        if isinstance(part, (nn.Linear, nn.LayerNorm)):
            part.register_forward_hook(lambda *_: None)
    names = ["out", *(n for n, _ in model.named_parameters())]

    def run(model, images):
        out = model(images)
        return out.detach(), *torch.autograd.grad(out.float().square().sum(), model.parameters())

    def draw():
        images = torch.randn(4, 3, 16, 16)
        with torch.autocast("cpu", dtype):
            found = run(model, images), run(hooked, images)
        return dict(zip(names, zip(*found, run(exact, images.double()))))

    assert_no_worse(draw)

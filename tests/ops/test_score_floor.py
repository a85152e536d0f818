"""Linear-InfSA and the pooled layer with a floor under their scores, against the reference, on every backend that has it."""

import re

import numpy as np
import pytest
import torch
from helpers import pooled_linear_calls
from helpers.calls import DTYPES, Call, accumulation, check, output_gradient, raw_op
from helpers.framework_calls import FORMS, make_call
from helpers.layouts import LAYOUTS
from helpers.sweep import some, swept
from torch.func import grad, vmap
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from infsa_kernels import linear_infsa, linear_infsa_scores, pooled_linear_infsa, reference
from infsa_kernels.testing import assert_within

FLOORS = (1e-3, 0.1, 3.0)


def make(device, *, B=2, H=3, N=37, M=29, d=16, dv=24, dtype=torch.float32, tied=False, floor=0.1, **options) -> Call:
    def randn(*shape):
        return torch.randn(shape, dtype=dtype, device=device)

    M = N if tied else M
    q, k, v = randn(B, H, N, d), None if tied else randn(B, H, M, d), randn(B, H, M, dv)
    return Call("linear", q, k, v, score_floor=floor, **options)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("layout", some(LAYOUTS, "token_major", "every_third_token", "expanded_head", "offset_by_one"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.one_in(2)
def test_layouts(dtype, layout, tied, device, backend):
    for d, dv in ((16, 16), (20, 9)):
        call = make(device, d=d, dv=dv, dtype=dtype, tied=tied, eps=1.0)
        dout = output_gradient(call)
        dout = LAYOUTS[layout](dout.view(2, 3, -1, dv)).view(dout.shape)
        strided = {name: None if t is None else LAYOUTS[layout](t) for name, t in call.qkv().items()}
        check(Call("linear", **strided, eps=1.0, score_floor=0.1), dout)


@pytest.mark.parametrize("d", some([1, 2, 3, 8, 15, 17, 31, 32, 64, 100, 128, 256], 3, 32, 64, 100))
def test_head_dims(d, device, backend):
    for dtype in (torch.float32, torch.bfloat16):
        for dv, tied in ((d, True), (d, False), (d // 2 + 3, False)):
            call = make(device, d=d, dv=dv, dtype=dtype, tied=tied, rho=torch.rand(3, device=device) + 0.5)
            check(call, output_gradient(call), draws=4)


@pytest.mark.parametrize("floor", some(FLOORS, 0.1))
@pytest.mark.parametrize("N", some([1, 2, 7, 16, 33, 129, 257, 521, 1025], 1, 33, 521))
def test_lengths(N, floor, device, backend):
    eps = 1e-6 if N > 8 else 1.0
    for M in (N, 131, max(1, N - 1)):
        call = make(device, H=2, N=N, M=M, tied=M == N, eps=eps, floor=floor)
        check(call, output_gradient(call), draws=4)


@pytest.mark.only_backend("cpu")
@pytest.mark.parametrize("layout", [swept("contiguous"), "token_major"])
def test_many_chunks_of_tokens(layout, device, backend):
    """Partial sums of many chunks and waves; with one thread and with two, the same bits."""
    call = make(device, B=2, H=6, N=30_011, M=29_989, d=16, dv=16)
    call = Call("linear", **{name: LAYOUTS[layout](t) for name, t in call.qkv().items()}, score_floor=0.1)
    dout = output_gradient(call)
    check(call, dout, draws=2)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append([call.run(), *call.gradients(dout).values()])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(*pair) for pair in zip(*results))


@pytest.mark.parametrize("poison", [None, float("nan")], ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_masks(dtype, tied, poison, device, backend):
    """Ignored keys have no part in the mean of the scores nor of the values; one sample ignores all of them."""
    call = make(device, B=3, dtype=dtype, tied=tied, eps=1.0, floor=0.3, rho=torch.rand(3, device=device).double())
    call.rho = call.rho.to(accumulation(dtype))
    M = call.v.shape[2]
    call.key_padding_mask, call.query_padding_mask = (torch.rand(3, n, device=device) < 0.4 for n in (M, 37))
    call.key_padding_mask[1] = True
    keys, queries = call.key_padding_mask[:, None, :, None], call.query_padding_mask[:, None, :, None]
    if tied:
        queries = queries & keys
    dout = output_gradient(call)
    check(call, dout)
    if poison is None:
        return
    clean, gradients = call.run(), call.gradients(dout)
    call.q, call.v = call.q.masked_fill(queries, poison), call.v.masked_fill(keys, poison)
    call.k = None if tied else call.k.masked_fill(keys, poison)
    assert torch.equal(call.run(), clean)
    for name, gradient in call.gradients(dout).items():
        assert torch.equal(gradient, gradients[name]), f"d{name}"
    assert (gradients["v"].masked_select(keys) == 0).all() and (gradients["q"].masked_select(queries) == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics(dtype, device, backend):
    call = make(device, dtype=dtype)
    call.key_padding_mask = torch.rand(2, 29, device=device) < 0.2
    out, *statistics = raw_op("linear_floor_fwd", backend)(*call.raw())
    assert torch.equal(out, call.run())
    q, k, v = (t.double() for t in call.qkv().values())
    kept = ~call.key_padding_mask[:, None]
    u, kappa = q / 4, k / 4
    energy = u.norm(dim=-1)
    central_query = (energy[..., None] * u).sum(-2) / (energy.sum(-1, keepdim=True) + 1e-6)
    products = (kappa * central_query[..., None, :]).sum(-1) * kept
    context = reference.linear(q, k, v, 1.0, 1e-6, call.key_padding_mask, score_floor=0.1)
    wanted = [context, central_query, energy.sum(-1), torch.relu(products).sum(-1), products.abs().sum(-1)]
    wanted.append((v * kept[..., None]).sum(-2) / kept.sum(-1, keepdim=True))
    rtol = 1e-12 if dtype == torch.float64 else 2e-6
    for statistic, truth in zip(statistics, wanted, strict=True):
        assert statistic.dtype == accumulation(dtype) and statistic.is_contiguous()
        assert_close(statistic.double(), truth, rtol=rtol, atol=rtol * truth.abs().max().item())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_heads_without_a_positive_score_pool_the_mean(dtype, device, backend):
    """The paper's operator gives 0 there, and no gradient. With a floor the values get theirs."""
    call = make(device, dtype=dtype, rho=1.0)
    call.q.abs_()
    call.k.abs_().neg_()
    assert (Call("linear", call.q, call.k, call.v).run() == 0).all()
    dout = output_gradient(call)
    check(call, dout)
    mean = call.v.double().mean(2)
    assert_close(call.run().double(), mean, rtol=1e-4, atol=torch.finfo(dtype).eps * 4 + 1e-5)
    rtol = max(4 * torch.finfo(dtype).eps, 1e-4)  # eps beside the floor's sum, too
    assert_close(call.gradients(dout)["v"], (dout / 29)[:, :, None].expand_as(call.v), rtol=rtol, atol=0)


def test_share_of_the_mean(device, backend):
    """alpha / (1 + alpha) where all scores are positive; the mean alone for a large floor; blind to the scale of q and k."""
    q, k, v = make(device, dtype=torch.float32).qkv().values()
    q, k = q.abs(), k.abs()
    paper, mean = linear_infsa(q, k, v, 1.0), v.mean(2, keepdim=True)
    for floor in FLOORS:
        mixed = (paper + floor * mean) / (1 + floor)
        assert_close(linear_infsa(q, k, v, 1.0, score_floor=floor), mixed, rtol=1e-4, atol=1e-5)
    assert_close(linear_infsa(q, k, v, 1.0, score_floor=1e7)[:, :, :1], mean, rtol=1e-4, atol=1e-5)
    q, k = torch.randn_like(q), torch.randn_like(k)
    scaled = linear_infsa(64 * q, 64 * k, v, 1.0, score_floor=0.1)
    assert_close(scaled, linear_infsa(q, k, v, 1.0, score_floor=0.1), rtol=1e-4, atol=1e-5)


def test_no_jump_where_the_last_positive_score_goes(device, backend):
    """A head whose only positive score t crosses 0: without a floor its slope there is |v| / eps."""
    k = torch.tensor([[0.0, 1.0], [-1.0, 1.0]], device=device)[None, None]
    q, v = torch.tensor([[1.0, 0.0]], device=device)[None, None], 4 * torch.eye(2, device=device)[None, None]

    def slope(t, floor):
        keys = (k + torch.tensor([[t, 0.0], [0.0, 0.0]], device=device)).requires_grad_()
        z = torch.ops.infsa.linear(q, keys, v, 1e-6, 1.0, score_floor=floor)
        return torch.autograd.grad(z[0, 0, 0], keys)[0].norm().item()

    assert slope(1e-8, 0.0) > 1e5
    assert max(slope(t, 0.1) for t in (1e-8, 1e-6, 1e-4, 1e-2)) < 100


def test_weights_are_those_of_the_output(device, backend):
    call = make(device, rho=torch.rand(3, device=device), floor=0.3)
    call.key_padding_mask = torch.rand(2, 29, device=device) < 0.3
    q, k, v = call.qkv().values()
    arguments = call.rho, 1e-6, call.key_padding_mask
    weights = linear_infsa_scores(q, k, *arguments, score_floor=0.3)
    kept = v.masked_fill(call.key_padding_mask[:, None, :, None], 0)
    out = linear_infsa(q, k, v, *arguments, score_floor=0.3)
    assert_close(weights.mT @ kept, out[:, :, :1], rtol=1e-5, atol=1e-6)
    assert (weights.squeeze(-1) > 0).eq(~call.key_padding_mask[:, None]).all()


def test_no_floor_is_the_papers_operator(device, backend):
    call = make(device, floor=0.0)
    q, k, v = call.qkv().values()
    for floor in (0.0, 0, np.float64(0.0)):
        assert torch.equal(linear_infsa(q, k, v, 0.95, score_floor=floor)[:, :, 0], call.run())


@pytest.mark.parametrize("scale", [1e-15, 1e-6, 1e6, 1e15])
def test_range(scale, device, backend):
    """Products of two rows leave float32 where the result does not."""
    if backend == "triton":
        pytest.skip("docs/linear.md: sums have to be finite there")
    for dtype in (torch.float32, torch.bfloat16):
        call = make(device, dtype=dtype, eps=1e-30)
        call.q, call.k, call.v = call.q * scale, call.k * scale, call.v * scale**0.5
        check(call, output_gradient(call))


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_nan_comes_out(name, device, backend):
    call = make(device)
    call.k[0, 1, 5] = 0  # a score of 0, whose sign does not stop a NaN
    getattr(call, name)[0, 1, 7, 3] = torch.nan
    dout = output_gradient(call)
    out = call.run()
    assert out[0, 1].isnan().any() and not out[0, ::2].isnan().any() and not out[1].isnan().any()
    _, truth = call.reference_results(dout, torch.float64)
    for of, gradient in call.gradients(dout).items():
        assert not (truth[of].isnan() & gradient.isfinite()).any(), of


def test_infinity_comes_out_of_a_value_whose_score_is_below_zero(device, backend):
    call = make(device)
    call.v[0, :, :, 3], call.v[1, :, 5, 2] = torch.inf, -torch.inf
    out, truth = call.run(), call.reference(torch.float64)
    assert torch.equal(out.isinf(), truth.isinf()) and not out.isnan().any()


@pytest.mark.parametrize("sizes", [{"B": 0}, {"H": 0}, {"N": 0}, {"M": 0}, {"d": 0}, {"dv": 0}], ids=str)
def test_empty(sizes, device, backend):
    call = make(device, **sizes)
    gradients = call.gradients(output_gradient(call))
    assert call.run().isfinite().all()
    for name, gradient in gradients.items():
        assert gradient.shape == call.tensors()[name].shape and gradient.isfinite().all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.one_in(4)
def test_gradcheck_and_gradgradcheck(form, device, backend):
    call = make_call("linear", form, torch.float64, device).leaves()
    call.score_floor = 0.3
    names, tensors = zip(*call.tensors().items())

    def run(*tensors):
        for name, t in zip(names, tensors):
            setattr(call, name, t)
        return call.run()

    tensors = tuple(t.detach().double().requires_grad_() for t in tensors)
    assert torch.autograd.gradcheck(run, tensors)
    assert torch.autograd.gradgradcheck(run, tensors, fast_mode=True)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "three_dimensions"])
def test_output_mask(form, device, backend):
    """What is not wanted is an empty tensor; what is wanted is the same whatever else is."""
    call = make_call("linear", form, torch.float32, device)
    call.score_floor = 0.1
    q, k, v, *rest = call.raw()
    outputs = raw_op("linear_floor_fwd", backend)(q, k, v, *rest)
    dout = torch.randn_like(outputs[0])
    everything, *some_of_it = (
        raw_op("linear_floor_bwd", backend)(dout, q, k, v, *outputs[1:], *rest, mask)
        for mask in ([True] * 4, *([i == j for j in range(4)] for i in range(4)))
    )
    for i, gradients in enumerate(some_of_it):
        for j, (gradient, whole) in enumerate(zip(gradients, everything)):
            assert torch.equal(gradient, whole) if i == j else gradient.shape == (0,)


@pytest.mark.parametrize("form", some(FORMS, "tied_masked_one_rho", "head_rho"))
def test_opcheck(form, device, backend):
    call = make_call("linear", form, torch.float32, device)
    q, k = call.q, call.q if call.k is None else call.k
    arguments = q, k, call.v, call.eps, call.rho, call.key_padding_mask, call.query_padding_mask
    overload = "default" if isinstance(call.rho, torch.Tensor) else "scalar_rho"
    torch.library.opcheck(getattr(torch.ops.infsa.linear, overload), arguments, {"score_floor": 0.1})
    if form == "three_dimensions":
        return
    call.score_floor = 0.1
    torch.library.opcheck(raw_op("linear_floor_fwd", backend).default, call.leaves().raw())


def test_transforms(device, backend):
    call = make(device, N=9, M=7, d=4, dv=5, dtype=torch.float64)
    tensors = [torch.stack([t, 2 * t, -t]) for t in (call.q, call.k, call.v)]

    def loss(function):
        return lambda *qkv: function(*qkv).square().sum()

    def fused(q, k, v):
        return linear_infsa(q, k, v, 1.0, score_floor=0.3)[..., 0, :]

    def truth(q, k, v):
        return reference.linear(q, k, v, score_floor=0.3)

    for transform in (lambda f: vmap(f), lambda f: vmap(grad(loss(f), (0, 1, 2))), lambda f: grad(loss(vmap(f)))):
        for result, wanted in zip(transform(fused)(*tensors), transform(truth)(*tensors)):
            assert_close(result, wanted)


def test_compile_is_eager(device, backend):
    @torch.compile(backend="aot_eager", fullgraph=True, dynamic=True)
    def compiled(q, k, v, floor):
        return linear_infsa(q, k, v, score_floor=floor)

    for N, floor in ((16, 0.1), (33, 0.1), (20, 0.2)):
        q, k, v = (t.requires_grad_() for t in make(device, N=N, M=N).qkv().values())
        results = compiled(q, k, v, floor), linear_infsa(q, k, v, score_floor=floor)
        assert_close(*results)
        gradients = (torch.autograd.grad(out.square().sum(), (q, k, v)) for out in results)
        for compiled_gradient, gradient in zip(*gradients):
            assert_close(compiled_gradient, gradient)


def test_meta_and_flops(device):
    q, k, v = make(device).qkv().values()
    with FlopCounterMode(display=False) as counter:
        linear_infsa(q, k, v, score_floor=0.1)
    assert counter.get_total_flops() == 6 * (4 * 37 * 16 + 2 * 29 * 16 + 3 * 29 * 24)
    out = linear_infsa(q.to("meta"), k.to("meta"), v.to("meta"), score_floor=0.1)
    assert out.is_meta and out.shape == (2, 3, 37, 24)


def test_autocast(device, backend):
    q, k, v = make(device).qkv().values()
    with torch.autocast(device, dtype=torch.bfloat16):
        out = linear_infsa(q, k, v, score_floor=0.1)
    assert torch.equal(out, linear_infsa(q.bfloat16(), k.bfloat16(), v.bfloat16(), score_floor=0.1))


# What is refused, and how.
OUT_OF_RANGE = "expected a finite number of at least 0; 0 is the paper's operator"
WRONG = [
    (-0.1, ValueError, f"score_floor is -0.1, {OUT_OF_RANGE}"),
    (float("nan"), ValueError, f"score_floor is nan, {OUT_OF_RANGE}"),
    (float("inf"), ValueError, f"score_floor is inf, {OUT_OF_RANGE}"),
    ("0.1", TypeError, "score_floor is a str, expected a number"),
    (None, TypeError, "score_floor is a NoneType, expected a number"),
    (True, TypeError, "score_floor is a bool, expected a number"),
    (torch.tensor(0.1, requires_grad=True), TypeError, "score_floor is a tensor that requires a gradient"),
    (torch.zeros(3), TypeError, "score_floor is a tensor of shape [3], expected a number; give one for all heads"),
]


@pytest.mark.parametrize(("floor", "error", "words"), WRONG, ids=lambda x: str(x)[:20])
def test_bad_floors(floor, error, words, device, backend):
    q, k, v = make(device).qkv().values()
    x, w = torch.randn(2, 7, 12, device=device), torch.randn(12, 12, device=device)
    with pytest.raises(error, match=f"^infsa::linear: {re.escape(words)}"):
        linear_infsa(q, k, v, score_floor=floor)
    with pytest.raises(error, match=f"^infsa::linear: {re.escape(words)}"):
        linear_infsa_scores(q, k, score_floor=floor)
    if backend in ("cpu", "eager"):
        with pytest.raises(error, match=f"^infsa::pooled_linear: {re.escape(words)}"):
            pooled_linear_infsa(x, 3, w, w, w, score_floor=floor)
    if error is ValueError:
        for function in (torch.ops.infsa.linear, raw_op("linear_floor_fwd", backend)):
            raw = function is not torch.ops.infsa.linear
            arguments = (q, k, v, 1e-6, floor, 1.0, None, None, None) if raw else (q, k, v)
            with pytest.raises(ValueError, match=f"^infsa::linear: {re.escape(words)}"):
                function(*arguments, **({} if raw else {"score_floor": floor}))


def test_a_wrong_argument_beside_a_floor_is_named(device, backend):
    q, k, v = make(device).qkv().values()
    with pytest.raises(ValueError, match=r"^infsa::linear: k has shape \[2, 3, 29, 15\], expected \(B, H, M, d\)"):
        linear_infsa(q, k[..., :-1], v, score_floor=0.1)
    with pytest.raises(ValueError, match=r"^infsa::linear: eps is 0"):
        linear_infsa(q, k, v, eps=0.0, score_floor=0.1)


def test_the_floor_is_no_variable_of_transforms(device):
    q, k, v = make(device).qkv().values()

    def call(floor):
        return linear_infsa(q, k, v, score_floor=floor).sum()

    with pytest.raises(TypeError, match="score_floor is a tensor that requires a gradient"):
        grad(call)(torch.tensor(0.1))
    with pytest.raises(TypeError, match="score_floor is a tensor that vmap maps over"):
        vmap(call)(torch.full((2,), 0.1))


pooled = pytest.mark.parametrize("op", ["pooled_linear"])


@pooled
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("norm", ["affine", None])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.one_in(2)
def test_pooled_layer(op, dtype, masked, norm, tied, device, backend):
    call = pooled_linear_calls.layer(dtype, tied=tied, norm=norm, masked=masked) | {"score_floor": 0.3, "eps": 1e-2}
    if masked:
        call["padding_mask"][1] = True
        call["x"] = call["x"].detach().masked_fill(call["padding_mask"][..., None], torch.nan).requires_grad_()
        clean = {**call, "x": call["x"].detach().nan_to_num().requires_grad_()}
        dout = pooled_linear_calls.output_gradient(call)
        results = (pooled_linear_calls.results(pooled_linear_infsa, one, dout) for one in (call, clean))
        for a, b in zip(*(r.values() for r in results)):
            assert torch.equal(a, b)
        call = clean
    pooled_linear_calls.check(call, pooled_linear_calls.output_gradient(call))


@pooled
@pytest.mark.parametrize("shape", [(1, 1, 3), (5, 2, 40), (2, 700, 65), (0, 4, 8), (2, 0, 8)], ids=str)
def test_pooled_sizes(op, shape, device, backend):
    """Several parts of an image, images of several waves, none at all."""
    call = pooled_linear_calls.layer(torch.float32, tied=False, shape=shape, heads=5) | {
        "score_floor": 0.1,
        "eps": 1e-2,
    }
    dout = pooled_linear_calls.output_gradient(call)
    if 0 not in shape:
        pooled_linear_calls.check(call, dout)
    assert all(t.isfinite().all() for t in pooled_linear_calls.results(pooled_linear_infsa, call, dout).values())


@pooled
def test_pooled_gradcheck(op, device, backend):
    call = pooled_linear_calls.layer(torch.float64, tied=False, shape=(2, 5, 6), masked=True)
    names = list(pooled_linear_calls.leaves(call))

    def run(*tensors):
        return pooled_linear_infsa(**{**call, **dict(zip(names, tensors)), "score_floor": 0.3})

    tensors = tuple(pooled_linear_calls.leaves(call).values())
    assert torch.autograd.gradcheck(run, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, tensors, fast_mode=True)


@pooled
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_pooled_range(op, scale, device, backend):
    call = pooled_linear_calls.layer(torch.float32, tied=False, norm=None, bias=False) | {"score_floor": 0.1}
    call |= {"x": (call["x"].detach() * scale).requires_grad_(), "eps": 1e-30}
    with torch.no_grad():
        truth = reference.pooled_linear(**pooled_linear_calls.to(call, torch.float64))
        low = reference.pooled_linear(**call)
        error = (low.double() - truth).abs().max().item() if low.isfinite().all() else 1e-5 * truth.abs().max().item()
        assert_within(pooled_linear_infsa(**call), truth, error, 4.0, "out")


@pooled
def test_pooled_opcheck(op, device, backend):
    B, N, D, H = 2, 13, 6, 3
    x, keys = torch.randn(B, N, D, requires_grad=True), torch.randn(B, H, D, requires_grad=True)
    mask = torch.rand(B, N) < 0.3
    arguments = x, keys, torch.randn(B, H, requires_grad=True), 1e-5, 1e-6, 0.1, mask
    torch.library.opcheck(raw_op("score_pool_floor_fwd", backend).default, arguments)
    pooled, mass, score_sum, absolute_sum, mean = raw_op("score_pool_floor_fwd", backend)(*arguments)
    assert_close(
        mean.detach(), torch.stack([t[~m].mean(0) for t, m in zip(_normalised(x), mask)]), rtol=1e-5, atol=1e-6
    )
    assert (absolute_sum >= score_sum).all()


def _normalised(x):
    return torch.nn.functional.layer_norm(x.detach(), x.shape[-1:], eps=1e-5)

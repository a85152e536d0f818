"""Both operators against the float64 reference: layouts, dtypes, sizes, scales, and what they return."""

import pytest
import torch
from helpers.calls import DTYPES, OPS, Call, accumulation, check, output_gradient, raw_op
from helpers.layouts import LAYOUTS, whole_storage
from helpers.sweep import some

import infsa_kernels
from infsa_kernels import reference

HEAD_DIMS = (1, 2, 3, 8, 15, 16, 17, 31, 32, 33, 64, 100, 128, 160, 256)
# Vector and tile sizes of any backend, one less, one more, and primes.
LENGTHS = (
    1,
    2,
    3,
    7,
    15,
    16,
    17,
    31,
    32,
    33,
    63,
    64,
    65,
    97,
    127,
    128,
    129,
    191,
    192,
    193,
    255,
    256,
    257,
    511,
    512,
    513,
    521,
)

pytestmark = pytest.mark.parametrize("op", OPS)


def make(op, device, *, B=2, H=3, N=37, M=29, d=16, dv=24, dtype=torch.float32, tied=False, **options) -> Call:
    def randn(*shape):
        return torch.randn(shape, dtype=dtype, device=device)

    M = N if tied else M
    return Call(op, randn(B, H, N, d), None if tied else randn(B, H, M, d), randn(B, H, M, dv), **options)


def random_masks(B, device):
    return {
        "key_padding_mask": torch.rand(B, 29, device=device) < 0.3,
        "query_padding_mask": torch.rand(B, 37, device=device) < 0.3,
    }


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", some(DTYPES, torch.float32, torch.bfloat16, torch.float64), ids=str)
@pytest.mark.one_in(4)
def test_layouts(op, dtype, layout, tied, device, backend):
    for d, dv in ((16, 16), (20, 9)):
        call = make(op, device, d=d, dv=dv, dtype=dtype, tied=tied)
        dout = output_gradient(call)
        dout = LAYOUTS[layout](dout.view(2, 3, -1, dv)).view(dout.shape)
        strided = {name: None if t is None else LAYOUTS[layout](t) for name, t in call.qkv().items()}
        # The gradient of equal tokens all but cancels where eps is small, and nothing can be said about its digits.
        call = Call(op, **strided, eps=1.0)
        before = {name: whole_storage(t).clone() for name, t in call.tensors().items()}
        check(call, dout)
        for name, t in call.tensors().items():
            assert torch.equal(whole_storage(t), before[name]), f"{name} was written to"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixed_layouts(op, dtype, device, backend):
    call = make(op, device, B=3, d=32, dv=17, dtype=dtype)
    for names in (
        ("token_major", "contiguous", "channel_major"),
        ("expanded_head", "every_third_token", "offset_by_one"),
    ):
        strided = dict(zip("qkv", (LAYOUTS[n](t) for n, t in zip(names, call.qkv().values()))))
        strided_call = Call(op, **strided)
        check(strided_call, output_gradient(call), draws=2)


@pytest.mark.parametrize("d", some(HEAD_DIMS, *HEAD_DIMS[::2]))
@pytest.mark.one_in(4)
def test_head_dims(op, d, device, backend):
    for dtype in (torch.float32, torch.bfloat16):
        for dv, tied in ((d, True), (d, False), (d // 2 + 3, False)):
            call = make(op, device, d=d, dv=dv, dtype=dtype, tied=tied, rho=torch.rand(3, device=device) + 0.5)
            check(call, output_gradient(call))


@pytest.mark.parametrize("N", some(LENGTHS, *LENGTHS[::2]))
@pytest.mark.one_in(2)
def test_lengths(op, N, device, backend):
    # With few keys and a small eps, too, the gradient all but cancels.
    eps = 1e-6 if N > 8 else 1.0
    for M in (N, 131, max(1, N - 1)):
        call = make(op, device, H=2, N=N, M=M, tied=M == N, eps=eps)
        check(call, output_gradient(call), draws=8 if N < 256 else 4)


@pytest.mark.parametrize("layout", ["contiguous", "token_major"])
@pytest.mark.parametrize("tokens", some([262_144, 1_000_000], 262_144))
@pytest.mark.one_in(4)
def test_long_sequences(op, tokens, layout, device, backend):
    """More than as many chunks as there may be have at their least size. Pure's time grows with the product of N and M."""
    N, M, d = (tokens, tokens - 17, 8) if op == "linear" else (tokens // 128 + 5, tokens // 64 + 3, 16)
    call = make(op, device, B=1, H=2, N=N, M=M, d=d, dv=d)
    check(Call(op, **{name: LAYOUTS[layout](t) for name, t in call.qkv().items()}), draws=3)


@pytest.mark.parametrize(("B", "H"), [(1, 1), (1, 65), (67, 1), (40, 13)])
def test_many_heads(op, B, H, device, backend):
    for tied in (False, True):
        call = make(op, device, B=B, H=H, N=9, M=11, tied=tied)
        check(call, output_gradient(call))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.one_in(2)
def test_kinds_of_rho(op, dtype, device, backend):
    rhos = [0.0, 1, -2.5, *(torch.randn(shape, dtype=accumulation(dtype), device=device) for shape in ((), (1,), (3,)))]
    rhos.append(torch.randn(3, dtype=dtype, device=device))
    rhos.append(torch.randn(6, device=device, dtype=dtype)[::2])
    rhos.append(torch.randn(1, device=device, dtype=dtype).expand(3))
    rhos.append(torch.zeros(3, dtype=dtype, device=device))
    for rho in rhos:
        call = make(op, device, dtype=dtype, rho=rho)
        check(call, output_gradient(call))


def test_rho_has_the_defaults_of_the_schema(op, device, backend):
    call = make(op, device)
    q, k, v = call.qkv().values()
    packet = getattr(torch.ops.infsa, op)
    for out in (packet(q, k, v), packet(q, k, v, 1e-6), packet(q, k, v, 1e-6, None), packet(q, k, v, rho=1)):
        assert torch.equal(out, packet(q, k, v, 1e-6, 1.0))


@pytest.mark.parametrize("eps", [1e-12, 1e-3, 1.0, 1e3])
def test_eps(op, eps, device, backend):
    for tied in (False, True):
        call = make(op, device, eps=eps, tied=tied)
        check(call, output_gradient(call))


def test_three_dimensions_are_heads_of_their_own(op, device, backend):
    call = make(op, device, B=6, H=1)
    masks = {
        "key_padding_mask": torch.rand(6, 29, device=device) < 0.3,
        "query_padding_mask": torch.rand(6, 37, device=device) < 0.3,
    }
    rho = torch.randn(6, device=device)
    packet = getattr(torch.ops.infsa, op)
    for rho_3d, rho_4d in ((0.9, [0.9] * 6), (rho, rho), (rho[:1], rho[:1].expand(6)), (rho[0], rho[:1].expand(6))):
        q, k, v = (t.squeeze(1) for t in call.qkv().values())
        actual = packet(q, k, v, 1e-6, rho_3d, **masks)
        for b in range(6):
            one = slice(b, b + 1)
            sample = [t[one] for t in call.qkv().values()]
            wanted = packet(*sample, 1e-6, float(rho_4d[b]), **{name: mask[one] for name, mask in masks.items()})
            torch.testing.assert_close(actual[one], wanted.squeeze(1), rtol=1e-6, atol=1e-7)


def test_pure_output_has_the_layout_of_q(op, device, backend):
    if op == "linear":
        assert make(op, device).run().is_contiguous()
        return
    contiguous = make(op, device)
    assert contiguous.run().is_contiguous()
    q, k, v = contiguous.qkv().values()
    for tied in (False, True):
        token_major = Call(op, LAYOUTS["token_major"](q), None if tied else k, q if tied else v)
        assert token_major.run().transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_of_the_raw_forward(op, dtype, device, backend):
    call = make(op, device, dtype=dtype)
    call.key_padding_mask = torch.rand(2, 29, device=device) < 0.2
    call.query_padding_mask = torch.rand(2, 37, device=device) < 0.2
    out, *statistics = raw_op(f"{op}_fwd", backend)(*call.raw())
    assert torch.equal(out, call.run())
    q, k, v = (t.double() for t in call.qkv().values())
    u = q.masked_fill(call.query_padding_mask[:, None, :, None], 0) / 4
    kappa = k.masked_fill(call.key_padding_mask[:, None, :, None], 0) / 4
    if op == "pure":
        wanted = [torch.relu(u @ kappa.mT).square().sum((-2, -1)).sqrt()]
    else:
        energy = u.square().sum(-1).sqrt()
        central_query = (energy[..., None] * u).sum(-2) / (energy.sum(-1, keepdim=True) + 1e-6)
        score_sum = torch.relu((kappa * central_query[..., None, :]).sum(-1)).sum(-1)
        context = reference.linear(q, k, v, 1.0, 1e-6, call.key_padding_mask, call.query_padding_mask)
        wanted = [context, central_query, energy.sum(-1), score_sum]
    rtol = 1e-12 if dtype == torch.float64 else 2e-6
    for statistic, truth in zip(statistics, wanted, strict=True):
        assert statistic.dtype == accumulation(dtype)
        assert statistic.is_contiguous()
        torch.testing.assert_close(statistic.double(), truth, rtol=rtol, atol=rtol * truth.abs().max().item())


@pytest.mark.parametrize(
    "sizes", [{"B": 0}, {"H": 0}, {"N": 0}, {"M": 0}, {"d": 0}, {"dv": 0}, {"N": 0, "M": 0}], ids=str
)
def test_empty_sizes(op, sizes, device, backend):
    for dtype in DTYPES:
        call = make(op, device, dtype=dtype, rho=torch.ones(sizes.get("H", 3), device=device), **sizes)
        out = call.run()
        assert out.shape == output_gradient(call).shape
        assert out.dtype == dtype
        assert (out == 0).all()
        for name, gradient in call.gradients(torch.ones_like(out)).items():
            assert gradient.shape == call.tensors()[name].shape
            assert (gradient == 0).all(), name


def test_public_functions(op, device, backend):
    call = make(op, device, rho=torch.rand(3, device=device))
    q, k, v = call.qkv().values()
    masks = {
        "key_padding_mask": torch.rand(2, 29, device=device) < 0.3,
        "query_padding_mask": torch.rand(2, 37, device=device) < 0.3,
    }
    function = getattr(infsa_kernels, f"{op}_infsa")
    scores_function = getattr(infsa_kernels, f"{op}_infsa_scores")

    wanted = getattr(torch.ops.infsa, op)(q, k, v, 1e-3, call.rho, **masks)
    out = function(q, k, v, call.rho, 1e-3, **masks)
    assert out.shape == (2, 3, 37, 24)
    if op == "linear":
        assert out.stride(2) == 0
        out = out[:, :, 0]
    assert torch.equal(out, wanted)

    scores = scores_function(q, k, call.rho, 1e-3, **masks)
    assert scores.shape == ((2, 3, 29, 1) if op == "linear" else (2, 3, 37, 29))
    clean = v.masked_fill(masks["key_padding_mask"][:, None, :, None], 0)
    pooled = (scores.mT @ clean).squeeze(-2) if op == "linear" else scores @ clean
    torch.testing.assert_close(out, pooled, rtol=1e-5, atol=1e-6)


def test_uninitialised_memory_has_no_part(op, device, backend):
    call = make(op, device, tied=True)
    dout = output_gradient(call)
    poisoned = [call.run(), *call.gradients(dout).values()]
    torch.use_deterministic_algorithms(False)
    for result, again in zip(poisoned, [call.run(), *call.gradients(dout).values()], strict=True):
        assert torch.equal(result, again)

"""Gradients: exact in float64 in every order, what is asked for and nothing else, and defined where they degenerate."""

import pytest
import torch
from helpers.calls import DTYPES, OPS, Call, accumulation, check, output_gradient, raw_op
from helpers.sweep import some

pytestmark = pytest.mark.parametrize("op", OPS)

DEGENERATE = ("no_positive_score", "zero_q", "zero_k", "zero_qkv", "zero_v", "zero_rows", "zero_dout")
OPTIONS = ("plain", "tied", "number_rho", "masks", "tied_masks", "one_rho", "three_dimensions")


def make(op, device, option="plain", dtype=torch.float64, B=2, H=2, N=5, M=4, d=3, dv=2, eps=1e-2) -> Call:
    def randn(*shape):
        return torch.randn(shape, dtype=dtype, device=device)

    tied = "tied" in option
    heads = (B * H,) if option == "three_dimensions" else (B, H)
    M = N if tied else M
    q, k, v = randn(*heads, N, d), None if tied else randn(*heads, M, d), randn(*heads, M, dv)
    rho_shape = {"one_rho": (), "three_dimensions": (B * H,)}.get(option, (H,))
    rho = 0.9 if option == "number_rho" else randn(*rho_shape).to(accumulation(dtype))
    call = Call(op, q, k, v, rho, eps)
    if "masks" in option:
        call.key_padding_mask = torch.arange(M, device=device) == torch.tensor([[1], [M - 1]], device=device)
        call.query_padding_mask = torch.arange(N, device=device) == torch.tensor([[0], [2]], device=device)
    return call


def as_function(call: Call):
    """The operator as a function of what has a gradient, and those tensors."""
    names = list(call.tensors())

    def function(*tensors):
        given = dict(zip(names, tensors))
        q = given["q"]
        packet = getattr(torch.ops.infsa, call.op)
        rho = given.get("rho", call.rho)
        return packet(q, given.get("k", q), given["v"], call.eps, rho, call.key_padding_mask, call.query_padding_mask)

    return function, tuple(t.detach().requires_grad_() for t in call.tensors().values())


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.one_in(2)
def test_gradcheck(op, option, device, backend):
    function, inputs = as_function(make(op, device, option))
    torch.autograd.gradcheck(
        function, inputs, fast_mode=False, check_batched_grad=True, check_undefined_grad=True, check_grad_dtypes=True
    )


@pytest.mark.parametrize("only", ["q", "k", "v", "rho"])
def test_gradcheck_of_one_input(op, only, device, backend):
    call = make(op, device)
    function, inputs = as_function(call)
    for name, t in zip(call.tensors(), inputs):
        t.requires_grad_(name == only)
    torch.autograd.gradcheck(function, inputs, check_batched_grad=True)


@pytest.mark.parametrize("option", some(OPTIONS, "plain", "tied_masks", "three_dimensions"))
@pytest.mark.one_in(4)
def test_gradgradcheck(op, option, device, backend):
    function, inputs = as_function(make(op, device, option))
    torch.autograd.gradgradcheck(function, inputs, check_batched_grad=True, check_undefined_grad=True)


@pytest.mark.parametrize("option", OPTIONS[:5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.one_in(2)
def test_against_the_reference(op, option, dtype, device, backend):
    call = make(op, device, option, dtype, B=2, H=2, N=45, M=39, d=16, dv=20)
    check(call, output_gradient(call))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_tied_is_the_sum_of_the_untied(op, dtype, device, backend):
    tied = make(op, device, "tied", dtype, N=40, d=16, eps=1.0)
    untied = Call(op, tied.q, tied.q.clone(), tied.v, tied.rho, tied.eps)
    dout = output_gradient(tied)
    actual, wanted = tied.gradients(dout), untied.gradients(dout)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float64: 1e-13}[dtype]
    total = wanted["q"].double() + wanted["k"].double()
    torch.testing.assert_close(actual["q"].double(), total, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(actual["v"], wanted["v"], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("option", ["plain", "tied", "number_rho", "masks"])
def test_output_mask(op, option, device, backend):
    """What is not wanted is an empty tensor; what is wanted is the same whatever else is."""
    call = make(op, device, option, torch.float32, N=70, M=33, d=16, dv=8)
    outputs = raw_op(f"{op}_fwd", backend)(*call.raw())
    saved = outputs[1:] if op == "linear" else outputs
    dout = torch.randn_like(outputs[0])
    q, k, v, *rest = call.raw()

    def backward(mask):
        return raw_op(f"{op}_bwd", backend)(dout, q, k, v, *saved, *rest, mask)

    everything = backward([True] * 4)
    exists = [True, k is not None, True, call.raw()[5] is not None]
    for bits in range(16):
        mask = [bool(bits >> i & 1) for i in range(4)]
        for gradient, whole, wanted, there in zip(backward(mask), everything, mask, exists):
            assert gradient.dtype == whole.dtype
            if wanted and there:
                assert torch.equal(gradient, whole)
            else:
                assert gradient.shape == (0,)


def test_layout_of_gradients(op, device, backend):
    call = make(op, device, dtype=torch.float32, N=7, M=6, d=4, dv=4)
    q, k, v = call.qkv().values()
    for name, layout in {
        "contiguous": torch.clone,
        "token_major": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        "channel_major": lambda t: t.mT.contiguous().mT,
        "gaps": lambda t: t.repeat_interleave(2, -1)[..., ::2],
        "expanded": lambda t: t[:, :1].expand(t.shape),
    }.items():
        strided = Call(op, layout(q), layout(k), layout(v), call.rho)
        outputs = raw_op(f"{op}_fwd", backend)(*strided.raw())
        saved = outputs[1:] if op == "linear" else outputs
        raw = strided.raw()
        gradients = raw_op(f"{op}_bwd", backend)(outputs[0], *raw[:3], *saved, *raw[3:], [True] * 4)
        for gradient, t in zip(gradients, strided.qkv().values()):
            assert gradient.stride() == torch.empty_like(t).stride(), name
        assert gradients[3].is_contiguous()


def test_strides_of_dout(op, device, backend):
    call = make(op, device, dtype=torch.float32, N=33, M=31, d=16, dv=16)
    dense = output_gradient(call)
    interleaved = torch.full((*dense.shape[:-1], 33), torch.nan, device=device)
    interleaved[..., 1::2] = dense
    for dout in (interleaved[..., 1::2], dense.mT.contiguous().mT, dense.transpose(0, 1).contiguous().transpose(0, 1)):
        for name, gradient in call.gradients(dout).items():
            torch.testing.assert_close(gradient, call.gradients(dense)[name], rtol=1e-5, atol=1e-6)
    for expanded in (torch.ones((), device=device).expand(dense.shape), dense[:1, :1].expand(dense.shape)):
        check(call, expanded)


def test_gradient_of_a_sum(op, device, backend):
    """sum().backward() hands the operator an expanded dout of stride 0."""
    call = make(op, device, dtype=torch.float32, N=33, d=16).leaves()
    call.run().sum().backward()
    wanted = call.to(torch.float64).reference_gradients(torch.ones_like(call.run()), torch.float64)
    for name, t in call.tensors().items():
        torch.testing.assert_close(t.grad.double(), wanted[name], rtol=1e-4, atol=1e-5)


def test_undefined_gradient(op, device, backend):
    call = make(op, device).leaves()
    call.run()
    loss = (call.v**2).sum()
    assert torch.autograd.grad(loss, (call.q, call.v), allow_unused=True)[0] is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case", ["no_positive_score", "zero_q", "zero_k", "zero_qkv", "zero_v", "zero_rows", "zero_dout"]
)
def test_degenerate(op, case, dtype, device, backend):
    call = make(op, device, dtype=dtype, N=20, M=18, d=16, dv=8, eps=1e-6)
    dout = output_gradient(call)
    q, k, v = call.qkv().values()
    if case == "no_positive_score":
        q.abs_()
        k.abs_().neg_()
    if case == "zero_rows":
        q[:, :, 3:9] = 0
        k[:, :, :7] = 0
        v[:, :, 5:] = 0
    for name in case.removeprefix("zero_") if case in ("zero_q", "zero_k", "zero_v", "zero_qkv") else "":
        call.qkv()[name].zero_()
    if case == "zero_dout":
        dout.zero_()
    gradients = call.gradients(dout)
    assert all(g.isfinite().all() for g in gradients.values())
    if case not in ("zero_rows", "zero_v", "zero_dout"):
        # No score is above 0: the output is 0, and so is every gradient.
        assert (call.run() == 0).all()
        assert all((g == 0).all() for g in gradients.values())
    elif case == "zero_v":
        assert (call.run() == 0).all()
        assert (gradients["rho"] == 0).all()
        assert (gradients["v"] != 0).any()
        check(call, dout)
    elif case == "zero_dout":
        assert all((g == 0).all() for g in gradients.values())
    else:
        check(call, dout)
        assert (gradients["q"][:, :, 3:9] == 0).all() if op == "linear" else True

"""torch.autocast: the operators compute in its dtype, and gradients arrive in the parameters' own."""

from dataclasses import replace

import pytest
import torch
from helpers.calls import OPS
from helpers.framework_calls import H, RawCalls, make_call
from torch.testing import assert_close

LOW = [torch.bfloat16, torch.float16]


@pytest.fixture(params=["head_rho", "tied_masked_one_rho", "plain", "three_dimensions"])
def form(request):
    return request.param


@pytest.fixture(params=OPS)
def op(request):
    return request.param


def results(call):
    """Output, gradients and gradients of gradients, all computed where this is called."""
    tensors = list(call.tensors().values())
    out = call.run()
    grads = torch.autograd.grad(out, tensors, torch.ones_like(out), create_graph=True)
    second = torch.autograd.grad(grads[0], tensors, torch.ones_like(grads[0]))
    return [out.detach(), *(g.detach() for g in grads), *second]


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_equals_casting_by_hand(op, form, dtype, device, backend):
    call = make_call(op, form, torch.float32, device).leaves()
    low = {name: t.detach().to(dtype) for name, t in call.tensors().items() if name != "rho"}
    with torch.autocast(device, dtype=dtype):
        actual = results(call)
    expected = results(replace(call, **low).leaves())
    assert actual[0].dtype == dtype
    assert torch.equal(actual[0], expected[0])
    for derivative, by_hand in zip(actual[1:], expected[1:]):
        assert derivative.dtype == torch.float32
        assert torch.equal(derivative, by_hand.float())


def test_default_dtype_is_autocasts(op, device, backend):
    call = make_call(op, "plain", torch.float32, device)
    with torch.autocast(device):
        assert call.run().dtype == torch.get_autocast_dtype(device)
    before = torch.get_autocast_dtype(device)
    try:
        torch.set_autocast_dtype(device, torch.float16)
        with torch.autocast(device):
            assert call.run().dtype == torch.float16
    finally:
        torch.set_autocast_dtype(device, before)


def test_disabled_and_nested_regions(op, form, device, backend):
    call = make_call(op, form, torch.float32, device)
    plain = call.run()
    with torch.autocast(device, dtype=torch.bfloat16):
        outer = call.run()
        with torch.autocast(device, enabled=False):
            assert torch.equal(call.run(), plain)
            with torch.autocast(device, dtype=torch.float16):
                assert call.run().dtype == torch.float16
        with torch.autocast(device, dtype=torch.float16):
            assert call.run().dtype == torch.float16
        assert torch.equal(call.run(), outer)
    assert torch.equal(call.run(), plain)
    with torch.autocast(device, dtype=torch.bfloat16, enabled=False):
        assert torch.equal(call.run(), plain)


def test_float64_is_left_alone(op, form, device, backend):
    call = make_call(op, form, torch.float64, device).leaves()
    expected = results(call)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert_close(results(call), expected, rtol=0, atol=0)


def test_mixed_dtypes_become_one(op, device, backend):
    call = make_call(op, "head_rho", torch.float32, device).leaves()
    call.k = call.k.detach().bfloat16().requires_grad_()
    with pytest.raises(TypeError, match="k has dtype"):
        call.run()
    with torch.autocast(device, dtype=torch.bfloat16):
        out, *derivatives = results(call)
    assert out.dtype == torch.bfloat16
    assert [g.dtype for g in derivatives] == 2 * [t.dtype for t in call.tensors().values()]


def test_tied_stays_tied_and_rho_keeps_its_precision(op, device, backend):
    call = make_call(op, "tied_scalar_rho", torch.float32, device)
    call.rho = torch.tensor([0.1, 0.7, 1.3], device=device)[:H]
    with torch.autocast(device, dtype=torch.bfloat16), RawCalls() as raw:
        call.run()
    ((_, k, _, _, _, head_rho, *_),) = raw.arguments("fwd")
    assert k is None
    assert head_rho.dtype == torch.float32
    assert torch.equal(head_rho[0], call.rho)


def test_with_transforms_and_compile(op, device, backend):
    call = make_call(op, "plain", torch.float32, device)
    q, k, v = (t.detach() for t in (call.q, call.k, call.v))

    def forward(q):
        return getattr(torch.ops.infsa, op)(q, k, v, 1e-6, 0.95)

    with torch.autocast(device, dtype=torch.bfloat16):
        expected = forward(q)
        assert torch.equal(torch.vmap(forward)(torch.stack([q, q]))[1], expected)
        grad = torch.func.grad(lambda q: forward(q).float().square().sum())(q)
        assert grad.dtype == torch.float32
        compiled = torch.compile(forward, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(q), expected)
    assert compiled(q).dtype == torch.float32


def test_training_step_with_projections(op, device, backend):
    """Linear layers give bfloat16, the operator takes it, and the float32 weights train."""
    projection = torch.nn.Linear(8, 3 * H * 8, device=device)
    rho = torch.nn.Parameter(torch.ones(H, device=device))
    with torch.autocast(device, dtype=torch.bfloat16):
        q, k, v = projection(torch.randn(2, 5, 8, device=device)).unflatten(-1, (3, H, 8)).permute(2, 0, 3, 1, 4)
        assert q.dtype == torch.bfloat16
        getattr(torch.ops.infsa, op)(q, k, v, 1e-6, rho).float().square().sum().backward()
    for parameter in (projection.weight, projection.bias, rho):
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.abs().sum() > 0

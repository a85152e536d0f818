"""torch.func, vmap, forward-mode AD and derivatives of every order, against the reference in float64."""

import warnings

import pytest
import torch
from helpers.calls import OPS, REFERENCE, raw_op
from helpers.framework_calls import DV, FORMS, B, D, H, M, N, make_call, mask
from helpers.sweep import some
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vmap
from torch.testing import assert_close

DIFFERENTIABLE = (0, 1, 2, 3)


@pytest.fixture(autouse=True)
def _no_slow_vmap():
    """An operator without a vmap rule would run once per element of the batch, and warn."""
    torch._C._debug_only_display_vmap_fallback_warnings(True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*performance drop.*")
        yield
    torch._C._debug_only_display_vmap_fallback_warnings(False)


def both(op, eps=1e-6):
    """The operator and its reference as functions of (q, k, v, rho, key mask, query mask); k is None where tied."""

    def fused(q, k, v, rho, *masks):
        return getattr(torch.ops.infsa, op)(q, q if k is None else k, v, eps, rho, *masks)

    def truth(q, k, v, rho, *masks):
        return REFERENCE[op](q, q if k is None else k, v, rho, eps, *masks)

    return fused, truth


def inputs(device, *batch):
    """q, k, v, per-head rho in float64, with leading dimensions to map over."""
    shapes = ((B, H, N, D), (B, H, M, D), (B, H, M, DV), (H,))
    return [torch.randn(*batch, *shape, dtype=torch.float64, device=device) for shape in shapes]


def loss(function):
    """A scalar with a second derivative in everything."""
    return lambda *args: function(*args).square().sum()


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("form", some(FORMS, "tied", "head_rho", "tied_masked_one_rho", "three_dimensions"))
@pytest.mark.one_in(4)
def test_gradcheck_and_gradgradcheck(op, form, device, backend):
    call = make_call(op, form, torch.float64, device).leaves()
    names, tensors = zip(*call.tensors().items())

    def run(*tensors):
        for name, t in zip(names, tensors):
            setattr(call, name, t)
        return call.run()

    # rho is a float32 tensor where the operator has one: as a double, so that differences can be taken.
    tensors = tuple(t.detach().double().requires_grad_() for t in tensors)
    assert torch.autograd.gradcheck(run, tensors)
    assert torch.autograd.gradgradcheck(run, tensors, fast_mode=True)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("tied", [False, True])
def test_grad_and_grad_of_grad(op, tied, device, backend):
    q, k, v, rho = inputs(device)
    masks = mask(N if tied else M, device), mask(N, device)
    argnums = (0, 2, 3) if tied else DIFFERENTIABLE
    args = (q, None, torch.randn(B, H, N, DV).to(q), rho) if tied else (q, k, v, rho)
    for order in (1, 2):

        def derivative(function, order=order):
            first = grad(loss(lambda *args: function(*args, *masks)), argnums)
            if order == 1:
                return first
            return grad(lambda *args: sum(g.square().sum() for g in first(*args)), argnums)

        fused, truth = both(op)
        assert_close(derivative(fused)(*args), derivative(truth)(*args))


@pytest.mark.parametrize("op", OPS)
def test_third_derivative(op, device, backend):
    q, k, v, rho = inputs(device)

    def third(function):
        def along_q(f):
            return lambda q: grad(lambda q: f(q).square().sum())(q)

        return along_q(along_q(along_q(lambda q: function(q, k, v, rho))))

    fused, truth = both(op)
    assert_close(third(fused)(q), third(truth)(q), rtol=1e-6, atol=1e-6)


IN_DIMS = [
    (0, 0, 0, 0),
    (0, None, None, None),
    (None, 0, None, None),
    (None, None, 0, None),
    (None, None, None, 0),
    (0, 0, 0, None),
    (2, 1, 3, 1),
    (-1, -2, 0, None),
]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("in_dims", IN_DIMS, ids=str)
@pytest.mark.parametrize("masked", [None, "shared", "mapped"])
@pytest.mark.one_in(2)
def test_vmap(op, in_dims, masked, device, backend):
    """Forward and gradients, mapped over any dimension of any argument, equal a loop."""
    size = 3
    args, dims = [], list(in_dims)
    for single, mapped, dim in zip(inputs(device), inputs(device, size), in_dims):
        args.append(single if dim is None else mapped.movedim(0, dim))
    if masked:
        key_masks = torch.stack([mask(M, device).roll(i, 1) for i in range(size)])
        args += [key_masks if masked == "mapped" else key_masks[0], mask(N, device)]
        dims += [0 if masked == "mapped" else None, None]

    def select(i):
        return [t if dim is None else t.select(dim, i) for t, dim in zip(args, dims)]

    fused, truth = both(op)
    expected = torch.stack([truth(*select(i)) for i in range(size)])
    assert_close(vmap(fused, tuple(dims))(*args), expected)

    per_sample = [torch.stack(gs) for gs in zip(*(grad(loss(truth), DIFFERENTIABLE)(*select(i)) for i in range(size)))]
    assert_close(vmap(grad(loss(fused), DIFFERENTIABLE), tuple(dims))(*args), tuple(per_sample))

    def total(function):
        return lambda *floats: vmap(loss(function), tuple(dims))(*floats, *args[4:]).sum()

    assert_close(grad(total(fused), DIFFERENTIABLE)(*args[:4]), grad(total(truth), DIFFERENTIABLE)(*args[:4]))


@pytest.mark.parametrize("op", OPS)
def test_vmap_tied_nested_and_three_dimensional(op, device, backend):
    q = torch.randn(2, 3, B * H, N, D, dtype=torch.float64, device=device)
    v = torch.randn(2, 3, B * H, N, DV, dtype=torch.float64, device=device)
    fused, truth = both(op)
    nested = vmap(vmap(lambda q, v: fused(q, None, v, 0.9)))(q, v)
    assert_close(nested, truth(q.flatten(0, 2), None, v.flatten(0, 2), 0.9).unflatten(0, (2, 3, B * H)))


@pytest.mark.parametrize("op", OPS)
def test_vmap_of_raw_operators(op, device, backend):
    """torch.ops.infsa.<op>_fwd and _bwd map too, statistics and unwanted gradients included."""
    q, k, v, _ = inputs(device, 3)
    head_rho = torch.rand(3, B, H, dtype=torch.float64, device=device)
    forward, backward = raw_op(f"{op}_fwd", backend), raw_op(f"{op}_bwd", backend)
    saved = slice(1, None) if op == "linear" else slice(0, None)

    def run(q, k, v, head_rho, output_mask):
        outputs = forward(q, k, v, 1e-6, 0.9, head_rho, None, None)
        grads = backward(outputs[0], q, k, v, *outputs[saved], 1e-6, 0.9, head_rho, None, None, output_mask)
        return *outputs, *(g for g, wanted in zip(grads, output_mask) if wanted)

    for output_mask in ([True] * 4, [True, False, False, True], [False, True, True, False]):
        mapped = vmap(lambda *args: run(*args, output_mask))(q, k, v, head_rho)
        singles = [run(q[i], k[i], v[i], head_rho[i], output_mask) for i in range(3)]
        assert_close(mapped, tuple(torch.stack(ts) for ts in zip(*singles)))


@pytest.mark.parametrize("op", OPS)
def test_jacrev_and_hessian(op, device, backend):
    q, k, v, rho = (t[..., :2] if t.dim() == 4 else t for t in inputs(device))
    fused, truth = both(op)
    assert_close(jacrev(fused, DIFFERENTIABLE)(q, k, v, rho), jacrev(truth, DIFFERENTIABLE)(q, k, v, rho))
    q = q[:1, :1]
    k, v = k[:1, :1], v[:1, :1]
    hessians = [jacrev(jacrev(lambda q, f=f: loss(f)(q, k, v, 0.9)))(q) for f in (fused, truth)]
    assert_close(*hessians)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("grad_enabled", [True, False])
def test_forward_mode_is_refused(op, grad_enabled, device, backend):
    """Zero tangents would be wrong in silence. The reference has forward mode."""
    q, k, v, rho = inputs(device)
    fused, truth = both(op)
    raw = raw_op(f"{op}_fwd", backend)

    def raw_forward(q, k, v, rho):
        return raw(q, k, v, 1e-6, 1.0, rho.expand(B, H), None, None)[0]

    def raw_backward(q, k, v, rho):
        stats = raw(*(t.detach() for t in (q, k, v)), 1e-6, 1.0, None, None, None)
        saved = stats[1:] if op == "linear" else stats
        return raw_op(f"{op}_bwd", backend)(stats[0], q, k, v, *saved, 1e-6, 1.0, None, None, None, [True] * 4)[0]

    def dual(function, i):
        args = [q, k, v, rho]
        with forward_ad.dual_level():
            args[i] = forward_ad.make_dual(args[i], torch.ones_like(args[i]))
            function(*args)

    refused = pytest.raises(NotImplementedError, match=f"infsa::{op}_.wd.* has no forward-mode derivative")
    with torch.set_grad_enabled(grad_enabled):
        for function in (fused, raw_forward, raw_backward):
            tangents = tuple(torch.ones_like(t) for t in (q, k, v))
            with refused:
                jvp(lambda *args, f=function: f(*args, rho), (q, k, v), tangents)
            for i in range(4 if function is not raw_backward else 1):
                with refused:
                    dual(function, i)
        with refused:
            jacfwd(fused)(q, k, v, rho)
        with refused:
            jvp(grad(loss(fused)), (q, k, v, rho), tuple(map(torch.ones_like, (q, k, v, rho))))
        assert jvp(lambda q: truth(q, k, v, rho), (q,), (q,))[1].abs().sum() > 0


class Attention(torch.nn.Module):
    def __init__(self, op):
        super().__init__()
        self.op = op
        self.qkv = torch.nn.Linear(D, 3 * H * D, dtype=torch.float64)
        self.rho = torch.nn.Parameter(torch.full((H,), 0.9, dtype=torch.float64))

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, H, D)).movedim(-3, 0).transpose(-2, -3)
        return self.op(q, k, v, self.rho).flatten(1)


@pytest.mark.parametrize("op", OPS)
def test_per_sample_gradients_of_a_module(op, device, backend):
    """functional_call with a learnable rho, mapped over the samples."""
    x = torch.randn(3, N, D, dtype=torch.float64, device=device)
    fused, truth = (Attention(f).to(device) for f in both(op))
    truth.load_state_dict(fused.state_dict())

    def per_sample(module):
        def sample_loss(parameters, x):
            return functional_call(module, parameters, (x[None],)).square().sum()

        return vmap(grad(sample_loss), (None, 0))(dict(module.named_parameters()), x)

    actual, expected = per_sample(fused), per_sample(truth)
    assert actual["rho"].shape == (3, H)
    assert_close(actual, expected)


@pytest.mark.parametrize("op", OPS)
def test_tensor_that_outlives_its_transform(op, device, backend):
    q, k, v, _ = inputs(device)
    escaped = []
    grad(lambda q: (escaped.append(q * 1), q.sum())[1])(q)
    k.requires_grad_()
    fused, _ = both(op)
    assert_close(fused(escaped[0], k, v, 1.0), fused(q, k, v, 1.0))

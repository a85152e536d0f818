"""What torch asks of the pooled layer: schemas, fakes, derivatives of every order, transforms, compilation, modes."""

import os
import subprocess
import sys

import pytest
import torch
from helpers.calls import raw_op
from helpers.pooled_linear_calls import D, layer, leaves, output_gradient, results
from helpers.sweep import some
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import infsa_kernels
from infsa_kernels import pooled_linear_infsa, reference

FORMS = [dict(masked=True), dict(tied=False, norm="plain", rho="scalar"), dict(bias=False, norm="", masked=True)]
MATRICES = ("x", "q_weight", "v_weight", "out_weight")
RAW = ("central_query", "score_pool")


@pytest.fixture(autouse=True)
def _on_every_backend(device, backend):
    torch._dynamo.reset()
    with torch.device(device):
        yield


def small(**form):
    return layer(**form, shape=(2, 4, 5), heads=2, head=2, v_head=1, out=2)


def raw_calls(name, dtype, masked, norm_eps):
    """Forward's arguments, and backward's, of a raw op on the backend "cpu" or "eager"."""
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    x, mask = torch.randn(2, 5, 6).to(dtype), (torch.arange(5) == torch.tensor([[3], [0]])) if masked else None
    if name == "central_query":
        tensors = x, torch.randn(3, 2, 6).to(dtype), torch.randn(3, 2, dtype=acc) if masked else None
        cotangents = [torch.randn(2, 3, 2, dtype=acc)]
    else:
        tensors = x, torch.randn(2, 3, 6, dtype=acc), torch.randn(2, 3, dtype=acc) if masked else None
        cotangents = [torch.randn(2, 3, 6, dtype=acc), torch.randn(2, 3, dtype=acc)]
    rest = norm_eps, 1e-6, mask
    return tensors, rest, cotangents


RAW_CALLS = [(torch.float64, True, 1e-5), (torch.bfloat16, False, None)]


@pytest.mark.parametrize("name", RAW)
@pytest.mark.parametrize("dtype, masked, norm_eps", some(RAW_CALLS, RAW_CALLS[0]))
@pytest.mark.one_in(2)
def test_opcheck_raw(name, dtype, masked, norm_eps, backend):
    output_mask = [masked, True, masked]
    tensors, rest, cotangents = raw_calls(name, dtype, masked, norm_eps)
    forward, backward = raw_op(f"{name}_fwd", backend).default, raw_op(f"{name}_bwd", backend).default
    outputs = forward(*tensors, *rest)
    saved = outputs if name == "central_query" else (outputs[0], outputs[2])
    leaf = [None if t is None else t.requires_grad_() for t in tensors]
    torch.library.opcheck(forward, (*leaf, *rest))
    torch.library.opcheck(backward, (*cotangents, *tensors, *saved, *rest, output_mask))


@pytest.mark.parametrize("form", some(FORMS, *FORMS[:2]), ids=str)
@pytest.mark.one_in(2)
def test_opcheck_public(form):
    call = small(**form)
    overload = "default" if isinstance(call["rho"], torch.Tensor) else "scalar_rho"
    args = [call.pop(name) for name in MATRICES]
    torch.library.opcheck(getattr(torch.ops.infsa.pooled_linear, overload), (*args, call.pop("num_heads")), call)


@pytest.mark.parametrize("form", some(FORMS, *FORMS[:2]), ids=str)
@pytest.mark.one_in(4)
def test_derivatives_of_two_orders(form):
    call = small(**form)
    names = list(leaves(call))

    def function(*tensors):
        return pooled_linear_infsa(**{**call, **dict(zip(names, tensors))})

    inputs = tuple(leaves(call).values())
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)
    with pytest.raises(NotImplementedError, match="has no forward-mode derivative"):
        torch.func.jvp(function, inputs, inputs)


def detached(call):
    return {n: t.detach() if isinstance(t, torch.Tensor) else t for n, t in call.items()}


@pytest.mark.parametrize("mapped", [("x",), ("q_weight",), ("x", "q_weight", "rho"), ("x", "padding_mask")], ids=str)
def test_vmap(mapped):
    """Per-sample gradients, ensembles of weights, and both: each as if called alone."""
    call = detached(small(masked=True))
    stacked = {n: torch.stack([call[n], call[n].roll(1, 0), call[n].flip(0)]) for n in mapped}

    def loss(given):
        return pooled_linear_infsa(**{**call, **given}).square().sum()

    differentiable = {n: t for n, t in stacked.items() if t.is_floating_point()}

    def gradients(given):
        return torch.func.grad(lambda some: loss({**given, **some}))({n: given[n] for n in differentiable})

    def weight_gradient(given):
        return torch.func.grad(lambda weight: loss({**given, "v_weight": weight}))(call["v_weight"])

    for function in (loss, gradients, weight_gradient):
        expected = [function({n: t[i] for n, t in stacked.items()}) for i in range(3)]
        actual = torch.func.vmap(function)(stacked)
        if isinstance(actual, dict):
            expected = {n: torch.stack([e[n] for e in expected]) for n in actual}
        else:
            expected = torch.stack(expected)
        assert_close(actual, expected)


def test_transforms_nest():
    call = detached(small())

    def loss(weight):
        return pooled_linear_infsa(**{**call, "q_weight": weight}).square().sum()

    def reference_loss(weight):
        return reference.pooled_linear(**{**call, "q_weight": weight}).square().sum()

    weight = call["q_weight"]
    assert_close(torch.func.grad(loss)(weight), torch.func.grad(reference_loss)(weight))
    assert_close(torch.func.jacrev(torch.func.grad(loss))(weight), torch.func.hessian(reference_loss)(weight))


@pytest.mark.parametrize("form", some(FORMS[:2], FORMS[0]), ids=str)
def test_compile(form):
    compiled = torch.compile(pooled_linear_infsa, fullgraph=True, dynamic=True)
    for length in (16, 33):
        call = layer(torch.float32, **form, shape=(2, length, D))
        dout = output_gradient(call)
        for name, t in results(pooled_linear_infsa, call, dout).items():
            assert_close(results(compiled, call, dout)[name], t, rtol=1e-4, atol=1e-5)


def test_autocast(device):
    """Tokens and matrices take autocast's dtype, inside vmap too; parameters get their gradients in their own.

    With a LayerNorm: tests/nn/test_autocast_norm.py.
    """
    call = layer(torch.float32, norm="")
    low = {n: (t.bfloat16() if n in MATRICES else t) for n, t in call.items()}
    expected = pooled_linear_infsa(**low)
    with torch.autocast(device, torch.bfloat16):
        out = pooled_linear_infsa(**call)
        assert_close(out, expected, rtol=0, atol=0)
        assert torch.func.vmap(lambda x: pooled_linear_infsa(**{**call, "x": x}))(call["x"][None]).dtype == out.dtype
        out.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in leaves(call).values())


def test_saved_tensors_are_small():
    """Of everything that grows with the number of tokens, only x is kept for the backward pass."""
    call = layer(torch.float32, tied=False, shape=(2, 301, 24))
    kept = []

    def pack(t):
        kept.append((t.untyped_storage().data_ptr(), t.numel()))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        pooled_linear_infsa(**call)
    own = call["x"].untyped_storage().data_ptr()
    assert own in dict(kept)
    assert max(size for where, size in kept if where != own) < 2 * 301


def test_flops():
    call = layer(torch.float32)
    with FlopCounterMode(display=False) as counter:
        out = pooled_linear_infsa(**call)
    counts = {op.__name__.split(".")[0]: n for op, n in counter.get_flop_counts()["Global"].items()}
    (B, tokens, D), (C, _), heads = call["x"].shape, call["q_weight"].shape, call["num_heads"]
    forward = {name: n for name, n in counts.items() if name.startswith(RAW)}
    assert sorted(forward.values()) == sorted([2 * B * tokens * D * C, 4 * B * tokens * D * heads])
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    counts = counter.get_flop_counts()["Global"]
    backward = [n for op, n in counts.items() if "_bwd" in op.__name__]
    assert sorted(backward) == sorted([6 * B * tokens * D * C, 10 * B * tokens * D * heads])


def test_backend_is_honoured(backend):
    called = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(func.name())
            return func(*args, **(kwargs or {}))

    with Recorder():
        pooled_linear_infsa(**layer()).sum().backward()
    suffix = infsa_kernels.ops.backends.SUFFIXES[backend]
    assert {name for name in called if name.startswith("infsa::")} == {
        f"infsa::{name}_{direction}{suffix}" for name in RAW for direction in ("fwd", "bwd")
    }


@pytest.mark.only_backend("cpu")
@pytest.mark.parametrize(("shape", "heads", "head"), [((1, 700, 130), 6, 20), ((1, 2100, 600), 10, 60)])
def test_any_number_of_threads_gives_the_same_bits(shape, heads, head):
    """Of the compiled kernels: torch's own products depend on it."""
    call = layer(torch.float32, tied=False, shape=shape, heads=heads, head=head)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5, 40):
            torch.set_num_threads(threads)
            found.append(raw_results(call))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


def raw_results(call):
    """Everything that the compiled kernels make; the per-image products between them are torch's."""
    tensors = raw_calls_of_layer(call)
    query, energy = torch.ops.infsa.central_query_fwd(*tensors[0])
    x, weight, bias, *rest = tensors[0]
    bwd = torch.ops.infsa.central_query_bwd(query, x, weight, bias, query, energy, *rest, [True] * 3)
    pooled, mass, score_sum = torch.ops.infsa.score_pool_fwd(*tensors[1])
    x, keys, bias, *rest = tensors[1]
    pool_bwd = torch.ops.infsa.score_pool_bwd(pooled, mass, x, keys, bias, pooled, score_sum, *rest, [True] * 3)
    return query, energy, *bwd, pooled, mass, score_sum, *pool_bwd


def raw_calls_of_layer(call):
    x, weight = call["x"].detach(), call["q_weight"].detach().unflatten(0, (call["num_heads"], -1))
    keys = weight.sum(1)[None].expand(x.shape[0], -1, -1)
    rest = 1e-5, 1e-6, None
    return (x, weight, weight.sum(-1), *rest), (x, keys, keys.sum(-1), *rest)


@pytest.mark.only_backend("cpu")
@pytest.mark.sweep
@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
def test_every_instruction_set(isa):
    """The tests of the arithmetic, once more, on every set of kernels that this CPU can run."""
    environment = {**os.environ, "INFSA_CPU_ISA": isa}
    probe = [sys.executable, "-c", "import infsa_kernels"]
    if subprocess.run(probe, env=environment, capture_output=True).returncode:
        pytest.skip(f"this CPU has no {isa}")
    tests = os.path.join(os.path.dirname(__file__), "test_pooled_linear.py")
    run = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "cpu-cpu", tests]
    done = subprocess.run(run, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]

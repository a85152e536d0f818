"""torch.compile, torch.export, AOTInductor and torch.jit.trace give eager's numbers, without graph breaks."""

import io

import pytest
import torch
from helpers.calls import OPS, Call
from helpers.framework_calls import DV, B, D, H, mask
from helpers.sweep import swept
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

import infsa_kernels
from infsa_kernels.ops.backends import SUFFIXES

LENGTHS = (16, 33, 7, 50, 64, 65, 100, 2, 31, 1)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make(op, length, device, tied=False, masked=False, learnable_rho=False):
    def random(d):
        return torch.randn(B, length, H, d, device=device).transpose(1, 2)

    return Call(
        op,
        random(D),
        None if tied else random(D),
        random(DV),
        rho=torch.rand(H, device=device) if learnable_rho else 0.9,
        key_padding_mask=mask(length + 1, device)[:, 1:] if masked else None,
    ).leaves()


def run(call):
    """Forward and gradients of a call, inside what is compiled or not."""
    out = call.run()
    return out, torch.autograd.grad(out.square().sum(), list(call.tensors().values()))


FORMS = ({}, {"tied": True}, {"masked": True}, {"learnable_rho": True})
COMPILED = [("aot_eager", form) for form in FORMS] + [("inductor", FORMS[1])]
COMPILED += [swept(("inductor", form)) for form in FORMS if form != FORMS[1]]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("compiler", "form"), COMPILED, ids=str)
@pytest.mark.one_in(4)
def test_dynamic_lengths(op, compiler, form, device, backend):
    """One graph, forward and backward, compiled at most twice (length 1 is a case of its own) for ten lengths."""
    counter = CompileCounterWithBackend(compiler)

    @torch.compile(backend=counter, fullgraph=True, dynamic=True)
    def forward(q, k, v, rho, key_padding_mask):
        return Call(op, q, k, v, 0.9 if rho is None else rho, 1e-6, key_padding_mask).run() * 2

    for length in LENGTHS:
        call = make(op, length, device, **form)
        rho = call.rho if form.get("learnable_rho") else None
        out = forward(call.q, call.k, call.v, rho, call.key_padding_mask)
        grads = torch.autograd.grad(out.square().sum() / 4, list(call.tensors().values()))
        assert_close((out / 2, tuple(grads)), run(call), rtol=1e-4, atol=1e-5)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("op", OPS)
@pytest.mark.one_in(2)
def test_public_functions_compile(op, device, backend):
    function = getattr(infsa_kernels, f"{op}_infsa")
    call = make(op, 12, device)
    arguments = call.q, call.k, call.v, torch.rand(H, device=device), 1e-6, mask(12, device), mask(12, device)
    for f in (function, lambda *args: infsa_kernels.infsa_attention(*args[:3], f"{op}_infsa", *args[3:4])):
        assert_close(torch.compile(f, backend="aot_eager", fullgraph=True)(*arguments), f(*arguments))


@pytest.mark.parametrize("op", OPS)
def test_a_tensor_rho_is_an_input_of_the_graph(op, device, backend):
    """As docs/nn.md asks for: a number would be compiled into it."""
    function, counter = getattr(infsa_kernels, f"{op}_infsa"), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    call = make(op, 9, device)
    for step in range(8):
        rho = torch.tensor(0.95 * (1 - step / 10), device=device)
        assert_close(compiled(call.q, call.k, call.v, rho), function(call.q, call.k, call.v, rho.item()))
    assert counter.frame_count == 1


def raw_calls(function, *args):
    """Which raw operators ran, as the profiler saw them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function(*args)
    return {event.name.removeprefix("infsa::") for event in profile.events() if event.name.startswith("infsa::")}


@pytest.mark.parametrize("op", OPS)
def test_backend_choice_inside_and_around(op, device):
    call = make(op, 9, device)
    usable = [
        n
        for n, why in infsa_kernels.explain_backend(call.op, call.q.device, call.q.dtype, call.q.shape).items()
        if not why
    ]
    raw = {name: f"{op}_fwd{infsa_kernels.ops.backends.SUFFIXES[name]}" for name in usable}

    def inside(q, k, v):
        with infsa_kernels.backend("eager"):
            return getattr(torch.ops.infsa, op)(q, k, v)

    def around(q, k, v):
        return getattr(torch.ops.infsa, op)(q, k, v)

    arguments = call.q, call.k, call.v
    inside = torch.compile(inside, backend="aot_eager", fullgraph=True)
    inside(*arguments)
    assert raw_calls(inside, *arguments) == {f"{op}_fwd_eager"}

    counter = CompileCounterWithBackend("aot_eager")
    around = torch.compile(around, backend=counter, fullgraph=True)
    for _ in range(2):
        around(*arguments)
        for name in usable:
            with infsa_kernels.backend(name):
                around(*arguments)
                assert raw_calls(around, *arguments) == {raw[name]}
        assert raw_calls(around, *arguments) == {raw[usable[0]]}
    assert counter.frame_count == 1 + len(usable)
    refused = next(name for name in SUFFIXES if name not in usable)
    with infsa_kernels.backend(refused), pytest.raises(RuntimeError, match=f"backend '{refused}' cannot run this call"):
        around(*arguments)


class Attention(torch.nn.Module):
    """Both operators, tied and not, with one learnable rho per head."""

    def __init__(self):
        super().__init__()
        self.rho = torch.nn.Parameter(torch.full((H,), 0.9))

    def forward(self, q, v, padding):
        tied = [Call(op, q, None, v, self.rho, 1e-6, padding, padding).run() for op in OPS]
        cross = [Call(op, q, v[..., :D] + 1, v, 0.5).run() for op in OPS]
        return tied + cross


def attention_inputs(batch, length, device):
    q, v = (torch.randn(batch, H, length, d, device=device) for d in (D, D + 2))
    return q, v, torch.arange(length, device=device).expand(batch, length) >= length - 2


@pytest.fixture
def exported(device, backend):
    """A module, its program of any batch and length, and inputs to compare them on."""
    module = Attention().to(device).requires_grad_(False)
    batch, length = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("length", min=4, max=4096)
    shapes = {0: batch, 2: length}, {0: batch, 2: length}, {0: batch, 1: length}
    program = torch.export.export(module, attention_inputs(3, 10, device), dynamic_shapes=shapes)
    return module, program, [attention_inputs(*sizes, device) for sizes in ((2, 4), (3, 10), (5, 77))]


def test_export(exported, device, backend):
    module, program, examples = exported
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    for p in (program, program.run_decompositions(), torch.export.load(buffer)):
        for arguments in examples:
            assert_close(p.module()(*arguments), module(*arguments))


def test_export_for_training(device, backend):
    module = Attention().to(device)
    arguments = attention_inputs(B, 10, device)
    trained = torch.export.export(module, arguments).module()
    for m in (module, trained):
        sum(out.square().sum() for out in m(*arguments)).backward()
    assert_close(trained.rho.grad, module.rho.grad)


@pytest.mark.one_in(2)
def test_aot_inductor_package(exported, device, backend, tmp_path):
    module, program, examples = exported
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "infsa.pt2"))
    compiled = torch._inductor.aoti_load_package(path)
    for arguments in examples:
        assert_close(compiled(*arguments), module(*arguments), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_jit_trace(op, device, backend):
    call = make(op, 9, device)

    def forward(q, k, v):
        return getattr(torch.ops.infsa, op)(q, k, v) + 1

    traced = torch.jit.trace(forward, (call.q, call.k, call.v))
    other = make(op, 13, device)
    assert_close(traced(other.q, other.k, other.v), forward(other.q, other.k, other.v))

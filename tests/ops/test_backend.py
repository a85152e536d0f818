"""`with infsa_kernels.backend(...)`, choose_backend and explain_backend."""

import threading
import warnings

import pytest
import torch
from helpers.calls import OPS
from helpers.framework_calls import RawCalls, make_call
from torch.utils.checkpoint import checkpoint

import infsa_kernels
from infsa_kernels.ops import backends
from infsa_kernels.ops.backends import SUFFIXES

CPU = torch.device("cpu")
SHAPE = (2, 3, 5, 8)
REASONS = infsa_kernels.explain_backend("linear", CPU, torch.float32, SHAPE)
USABLE = [name for name, reason in REASONS.items() if reason is None]


@pytest.fixture(params=OPS)
def call(request):
    return make_call(request.param, "plain", torch.float32, "cpu").leaves()


def backends_of(function, *args):
    """The backends whose raw operators ran, in order."""
    with RawCalls() as raw:
        function(*args)
    suffixes = {suffix: name for name, suffix in SUFFIXES.items() if name in USABLE}
    return [suffixes[suffix] for _, suffix, _ in raw.calls]


def test_automatic_choice_is_the_fastest_that_runs(call):
    assert backends_of(call.run) == [infsa_kernels.choose_backend(call.op, CPU, torch.float32, SHAPE)] == USABLE[:1]


@pytest.mark.parametrize("name", SUFFIXES)
def test_runs_on_that_backend_or_says_why_not(call, name):
    with infsa_kernels.backend(name):
        if name in USABLE:
            assert backends_of(call.run) == [name]
            assert backends_of(lambda: call.run().sum().backward()) == [name, name]
            return
        with pytest.raises(RuntimeError) as error:
            call.run()
    assert f"backend {name!r} cannot run this call" in str(error.value)
    assert REASONS[name] in str(error.value)


def test_nesting_exceptions_and_reuse(call):
    automatic, other = USABLE[0], USABLE[-1]
    mode = infsa_kernels.backend(other)

    def fail():
        assert backends_of(call.run) == [other]
        raise KeyError

    for _ in range(2):
        with pytest.raises(KeyError), mode:
            fail()
        assert backends_of(call.run) == [automatic]
    with infsa_kernels.backend(automatic):
        with mode:
            assert backends_of(call.run) == [other]
            with infsa_kernels.backend(automatic):
                assert backends_of(call.run) == [automatic]
            assert backends_of(call.run) == [other]
        assert backends_of(call.run) == [automatic]


def test_holds_for_one_thread(call):
    """Another thread, started inside the block, chooses for itself."""
    seen = []
    with infsa_kernels.backend("eager"):
        thread = threading.Thread(target=lambda: seen.append(backends_of(call.run)))
        thread.start()
        thread.join()
        assert backends_of(call.run) == ["eager"]
    assert seen == [USABLE[:1]]


def test_explicit_argument_wins(call):
    op = getattr(torch.ops.infsa, call.op)
    arguments = (call.q, call.k, call.v, 1e-6, None, None, None)
    with infsa_kernels.backend(USABLE[0]):
        assert backends_of(op, *arguments, "eager") == ["eager"]
        assert backends_of(lambda: op(*arguments, backend="eager")) == ["eager"]
        assert backends_of(op.default, *arguments) == USABLE[:1]
    # The default, said: no choice of the caller's.
    with infsa_kernels.backend("eager"):
        assert backends_of(op, *arguments, "") == backends_of(lambda: op(*arguments, backend="")) == ["eager"]


def test_backward_stays_on_the_backend_of_forward(call):
    with infsa_kernels.backend("eager"):
        out = call.run().sum()
    assert backends_of(out.backward) == ["eager"]


@pytest.mark.parametrize("backward", [torch.Tensor.backward, torch.autograd.backward])
@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_stays_on_the_backend(call, backward, reentrant):
    def block(q, k, v):
        call.q, call.k, call.v = q, k, v
        return call.run().sum()

    def step():
        backward(checkpoint(block, call.q, call.k, call.v, use_reentrant=reentrant))

    with infsa_kernels.backend(USABLE[0]), infsa_kernels.backend("eager"):
        assert backends_of(step) == ["eager"] * 3
    assert backends_of(step) == USABLE[:1] * 3


def test_unknown_names(call):
    with pytest.raises(ValueError, match="got 'gpu', expected one of 'cpu', 'cuda', 'triton', 'eager'"):
        infsa_kernels.backend("gpu")
    with pytest.raises(ValueError, match="no backend 'gpu'"):
        infsa_kernels.choose_backend(call.op, CPU, torch.float32, SHAPE, "gpu")
    with pytest.raises(ValueError, match="no backend 'gpu'"):
        getattr(torch.ops.infsa, call.op)(call.q, call.k, call.v, backend="gpu")


@pytest.mark.filterwarnings("ignore:infsa_kernels runs its slower")
def test_explanation_names_every_backend_and_reason():
    assert list(REASONS) == list(SUFFIXES)
    assert REASONS["eager"] is None
    assert REASONS["cuda"]
    for device in (CPU, torch.device("cuda", 0), torch.device("meta")):
        reasons = infsa_kernels.explain_backend("linear", device, torch.float32, SHAPE)
        chosen = infsa_kernels.choose_backend("linear", device, torch.float32, SHAPE)
        assert reasons[chosen] is None
        assert all(reason is None or len(reason) > 10 for reason in reasons.values())


def test_fallback_warns_once(call, monkeypatch, recwarn):
    monkeypatch.setattr(backends, "_extension_error", "there is none today")
    monkeypatch.setattr(backends, "_warned_of_fallback", False)
    for _ in range(3):
        assert backends_of(call.run) == ["eager"]
    (warning,) = [w for w in recwarn if "infsa_kernels" in str(w.message)]
    assert "slower 'eager' backend: 'cpu' cannot run: there is none today" in str(warning.message)
    assert issubclass(warning.category, UserWarning)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that Triton supports, for whatever only asks about it."""
    monkeypatch.setattr(backends, "_capability", lambda device: (9, 0))
    monkeypatch.delenv("INFSA_TRITON", raising=False)
    return torch.device("cuda", 0)


def chosen(op, device, dtype=torch.bfloat16, d=64):
    return infsa_kernels.choose_backend(op, device, dtype, (1, 4, 100, d))


@pytest.mark.parametrize("op", ["linear", "pure", "pooled_linear"])
def test_gpus_run_triton(op, gpu, monkeypatch):
    pytest.importorskip("triton")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen(op, gpu) == "triton"
        monkeypatch.setenv("INFSA_TRITON", "0")
        assert chosen(op, gpu) == "eager"
    assert infsa_kernels.choose_backend(op, gpu, torch.bfloat16, (1, 4, 100, 64), "triton") == "triton"


def test_what_triton_does_not_take_is_told(gpu, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(backends, "_warned_of_fallback", False)
    with pytest.warns(UserWarning, match="slower 'eager' backend: 'triton' cannot run: head_dim 512 is above 256"):
        assert chosen("pure", gpu, d=512) == "eager"


def test_amd_runs_what_is_proven(gpu, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(backends, "_warned_of_fallback", True)
    assert chosen("pure", gpu) == chosen("pooled_linear", gpu) == "triton" and chosen("linear", gpu) == "eager"
    assert "AMD" in infsa_kernels.explain_backend("linear", gpu, torch.bfloat16, (1, 4, 100, 64))["triton"]


@pytest.mark.parametrize(
    ("capability", "version", "words"),
    [
        ((7, 5), "3.9.0", "compute capability 7.5, the kernels need 8.0"),
        ((9, 0), "3.5.1", "Triton 3.5.1 is older than 3.6"),
        ((10, 0), "3.8.1", "Triton 3.8.1 is older than 3.9, the oldest these kernels for compute capability 10"),
        ((10, 3), "3.9.0", None),
        ((12, 0), "3.6.0", None),
    ],
)
def test_gpus_and_versions_of_triton(capability, version, words, gpu, monkeypatch):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(backends, "_capability", lambda device: capability)
    monkeypatch.setattr(triton, "__version__", version)
    monkeypatch.setattr(backends, "_why_no_triton", backends._why_no_triton.__wrapped__)
    reason = infsa_kernels.explain_backend("pure", gpu, torch.bfloat16, (1, 4, 100, 64))["triton"]
    assert reason is None if words is None else words in reason


def test_an_operator_without_compiled_kernels_says_so_and_runs_without_them(monkeypatch):
    monkeypatch.setitem(backends.OPERATORS, "new", frozenset({"eager"}))
    reasons = infsa_kernels.explain_backend("new", CPU, torch.float32, SHAPE)
    assert reasons["cpu"] == "infsa::new has no C++ kernels for the CPU"
    assert infsa_kernels.choose_backend("new", CPU, torch.float32, SHAPE) == "eager"

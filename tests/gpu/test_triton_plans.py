"""Plans: the second call of a kind starts what the first compiled, with the arguments that Triton itself would give it."""

import gc
import threading
import weakref
from dataclasses import replace
from unittest import mock

import pytest
import torch
from helpers.calls import OPS, Call, raw_op

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter has no plans", allow_module_level=True)

from helpers import packed_calls  # noqa: E402
from helpers.sweep import swept  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from infsa_kernels.ops import plans  # noqa: E402
from infsa_kernels.torch_private import OpOverload  # noqa: E402
from infsa_kernels.triton import first_use, private  # noqa: E402

by_op = pytest.mark.parametrize("op", OPS)


@pytest.fixture
def gpu(planned_gpu):
    return planned_gpu


def make(op, *, B=1, N=600, H=2, d=16, dtype=torch.bfloat16, tied=False, **options) -> Call:
    q, k, v = (torch.randn(B, N, H, d, dtype=dtype).transpose(1, 2) for _ in "qkv")
    return Call(op, q, None if tied else k, v, **options)


def run(call: Call, wanted=(True, True, True, True)) -> None:
    """Forward and backward of the raw operators."""
    raw = call.raw()
    out, *saved = raw_op(f"{call.raw_name}_fwd", "triton")(*raw)
    saved = [out, *saved] if call.op == "pure" else saved
    dout = torch.empty_like(out)
    raw_op(f"{call.raw_name}_bwd", "triton")(dout, *raw[:3], *saved, *raw[3:], list(wanted))


def seen(gpu, call: Call, **options) -> list:
    """What a call starts: kernels, and arguments with inputs by name and other tensors by what they are."""
    gpu.started.clear()
    run(call, **options)
    given = {**call.qkv(), "keys": call.key_padding_mask, "queries": call.query_padding_mask}
    names = {t.data_ptr(): name for name, t in given.items() if t is not None}

    def told(value):
        if isinstance(value, tuple):
            return tuple(map(told, value))
        if hasattr(value, "base"):
            return told(value.base), value.shape, value.strides, value.block_shape
        if isinstance(value, torch.Tensor):
            return names.get(value.data_ptr(), "made"), value.shape, value.stride(), value.dtype
        return value

    return [(s.kernel, s.programs, s.stream, [(kind, told(value)) for kind, value in s.arguments]) for s in gpu.started]


def unplanned(gpu, call: Call, **options) -> list:
    """The same by Triton's own way."""
    plans.forget()
    with mock.patch.object(plans, "PLANNED", ()):
        return seen(gpu, call, **options)


KINDS = {
    "short": {"N": 100},
    "long": {},
    "tied": {"tied": True},
    "tied, float32": {"tied": True, "dtype": torch.float32},
    "float16": {"dtype": torch.float16, "N": 70},
    "few": {"N": 20},
    "head dimension": {"d": 40},
    "masked": {
        "key_padding_mask": torch.arange(600)[None] % 4 == 1,
        "query_padding_mask": torch.arange(600)[None] % 3 == 1,
    },
    "rho": {"rho": torch.ones(2)},
    "floor": {"score_floor": 0.25},
}


def each(kinds):
    """Every operator with every kind; without the sweep, each kind with one of the two."""
    pairs = [(op, kind) for kind in kinds for op in OPS]
    return [
        pair if i % 4 in (0, 3) or pair[1] == "floor" else swept(pair)
        for i, pair in enumerate(pairs)
        if pair != ("pure", "floor")
    ]


@pytest.mark.parametrize(("op", "kind"), each(KINDS))
def test_a_plan_starts_what_triton_would(op, kind, gpu, by_triton):
    first, second = make(op, **KINDS[kind]), make(op, **KINDS[kind])
    run(first)
    by_triton.clear()
    found = seen(gpu, second)
    assert by_triton == []
    assert found == unplanned(gpu, second)
    assert len(found) == len(by_triton) >= 2


@by_op
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_packed_sequences_have_plans_too(op, tied, gpu, by_triton):
    """Wherever these begin: offsets are no part of a kind."""

    def call(lengths):
        return packed_calls.make(op, tied=tied, lengths=lengths, key_lengths=lengths[::-1], dtype=torch.bfloat16)

    run(call((700, 0, 5)))
    by_triton.clear()
    found = seen(gpu, call((700, 2, 3)))
    assert by_triton == []
    assert found == unplanned(gpu, call((700, 3, 2)))
    assert len(found) == len(by_triton) >= 4


CHANGES = {
    "length": lambda call: replace(call, **{n: t[:, :, :577] for n, t in call.qkv().items()}),
    "strides": lambda call: replace(call, q=call.q.contiguous()),
    "alignment": lambda call: replace(call, v=torch.randn(call.v.numel() + 1).to(call.v.dtype)[1:].view_as(call.v)),
    "dtype": lambda call: call.to(torch.float32),
    "tied": lambda call: replace(call, k=None),
    "mask": lambda call: replace(call, key_padding_mask=torch.zeros(1, 600, dtype=torch.bool)),
    "rho": lambda call: replace(call, rho=torch.ones(2)),
    "number": lambda call: replace(call, rho=0.5),
    "eps": lambda call: replace(call, eps=0.5),
}


@pytest.mark.parametrize(("op", "change"), each(CHANGES))
def test_a_call_of_another_kind_has_a_plan_of_its_own(op, change, gpu):
    call = make(op)
    run(call)
    changed = CHANGES[change](call)
    assert seen(gpu, changed) == seen(gpu, changed) == unplanned(gpu, changed)


@by_op
def test_gradients_that_are_wanted_are_a_kind(op, gpu):
    call = make(op)
    some = (True,) * 4, (False, True, False, False), (True, False, False, False)
    found = [[seen(gpu, call, wanted=wanted) for wanted in some] for _ in range(2)]
    assert found[0] == found[1] == [unplanned(gpu, call, wanted=wanted) for wanted in some]


def test_the_precision_of_float32_products_is_a_kind(gpu):
    call = make("pure", dtype=torch.float32, d=64)
    run(call)
    torch.set_float32_matmul_precision("high")
    try:
        assert seen(gpu, call) == unplanned(gpu, call)
    finally:
        torch.set_float32_matmul_precision("highest")


@by_op
def test_a_call_that_is_wrong_is_told_after_a_plan_as_before(op, gpu):
    call = make(op)
    run(call)
    q, k, v, *rest = call.raw()
    forward = raw_op(f"{op}_fwd", "triton")
    with pytest.raises(ValueError, match="v has shape"):
        forward(q, k, v[:, :, 1:], *rest)
    with pytest.raises(TypeError, match="v has dtype"):
        forward(q, k, v.float(), *rest)
    for eps in (-1.0, float("nan")):
        for _ in range(2):
            with pytest.raises(ValueError, match="eps is"):
                forward(q, k, v, eps, *rest[1:])


@by_op
def test_launches_follow_the_stream(op, gpu):
    call = make(op)
    run(call)
    gpu.started.clear()
    gpu.stream = 7
    run(call)
    assert {start.stream for start in gpu.started} == {7}


@by_op
def test_hooks_see_planned_launches(op, gpu, by_triton):
    call, entered, left = make(op), [], []
    run(call)
    gpu.started.clear()
    hooks = triton.knobs.runtime
    hooks.launch_enter_hook.add(lambda metadata: entered.append(metadata.get()["name"]))
    hooks.launch_exit_hook.add(lambda metadata: left.append(metadata.get()["name"]))
    try:
        run(call)
        assert entered == left == [start.kernel.split()[0] for start in gpu.started] and len(entered) >= 4
    finally:
        hooks.launch_enter_hook.calls.clear()
        hooks.launch_exit_hook.calls.clear()
    by_triton.clear()
    run(call)
    assert by_triton == [] and len(entered) == len(gpu.started) // 2


@by_op
def test_a_triton_with_other_insides_launches_every_call_itself(op, gpu, by_triton, monkeypatch):
    monkeypatch.setattr(private, "TAKEN", ["blocks", "stream", "function"])
    call = make(op)
    first = seen(gpu, call)
    before = len(by_triton)
    assert seen(gpu, call) == first
    assert len(by_triton) == 2 * before


@pytest.mark.parametrize("launcher", ["nvidia.driver.CudaLauncher", "amd.driver.HIPLauncher"])
def test_this_triton_has_the_insides_that_are_known(launcher):
    module, name = launcher.rsplit(".", 1)
    kind = getattr(pytest.importorskip(f"triton.backends.{module}"), name)

    class Compiled:
        run, function, packed_metadata = object.__new__(kind), 1, (4, 1, 0)

    assert private.started(Compiled()) == (Compiled.run, 1, (4, 1, 0))
    assert private.started(None) is None  # what the interpreter returns


@by_op
def test_a_plan_holds_no_tensor(op, gpu):
    call = make(op, key_padding_mask=torch.zeros(1, 600, dtype=torch.bool), rho=torch.ones(2))
    run(call)
    held = [weakref.ref(t) for t in (call.q, call.k, call.v, call.key_padding_mask, call.rho)]
    gpu.started.clear()
    del call
    gc.collect()
    assert [ref() for ref in held] == [None] * 5


@by_op
def test_so_many_plans_and_no_more(op, gpu, monkeypatch):
    monkeypatch.setattr(plans, "MOST", 3)
    before = {id(p): len(p._known) for p in plans._all}
    for N in range(550, 560):
        run(make(op, N=N))
        assert all(len(p._known) <= 3 for p in plans._all)
    assert sum(len(p._known) for p in plans._all) > sum(before.values())


def test_threads_share_plans(gpu):
    """Each thread meets the kinds in another order; what it starts is what it asked for."""
    calls = [make("linear", N=N, H=H) for N in (100, 600) for H in (1, 2, 3)]
    for call in calls:
        run(call)  # Triton's own compilation is not ours to test
    wanted = 5 * sum(len(seen(gpu, call)) for call in calls)
    gpu.started.clear()
    plans.forget()
    threads = [threading.Thread(target=lambda at=at: [run(c) for c in calls[at:] + calls[:at]]) for at in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(gpu.started) == wanted


@pytest.fixture
def redispatched(monkeypatch):
    """What went on from the Autograd key through torch's dispatcher."""
    on, found = OpOverload.redispatch, []

    def counted(op, *arguments):
        found.append(op.name())
        return on(op, *arguments)

    monkeypatch.setattr(OpOverload, "redispatch", counted)
    return found


@by_op
def test_plain_tensors_need_the_dispatcher_once(op, gpu, redispatched):
    run(make(op))
    assert redispatched == [] and len(gpu.started) >= 4


@by_op
def test_a_negated_view_is_one_for_the_dispatcher(op, gpu, redispatched):
    """Its memory holds the other sign, which kernels do not know."""
    call = make(op, dtype=torch.float32)
    call = replace(call, v=torch.complex(call.v, call.v).conj().imag)
    assert call.v.is_neg()
    found = repr(seen(gpu, call))
    assert "'q'" in found and "'v'" not in found
    assert len(redispatched) == 2


@by_op
def test_modes_see_what_has_a_plan(op, gpu):
    call, found = make(op), []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found.append(func.name())
            return func(*args, **(kwargs or {}))

    run(call)
    with Mode():
        run(call)
    assert {f"infsa::{op}_fwd_triton", f"infsa::{op}_bwd_triton"} <= set(found)


def test_what_failed_its_check_gets_no_plan(gpu, monkeypatch):
    call = make("pure")
    monkeypatch.setattr(first_use, "failure", lambda *arguments: "it is wrong")
    for _ in range(2):
        run(call)
    assert gpu.started == []
    monkeypatch.undo()


def test_a_check_leaves_no_plan_behind(gpu):
    """It runs kernels that nobody may trust yet."""
    variant = first_use.of("pure", "forward", make("pure").raw())
    first_use.check(variant, torch.device("cpu"))
    assert gpu.started and not any(p._known for p in plans._all)

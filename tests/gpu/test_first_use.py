"""The check before a kernel's first use: right kernels pass it, planted wrong ones do not, and what follows from either."""

import json
import subprocess
import warnings
from dataclasses import replace

import pytest
import torch
from helpers import packed_calls
from helpers.interpreter import needs_interpreter
from helpers.sweep import swept

pytest.importorskip("triton")

import infsa_kernels
from infsa_kernels.triton import (
    configs,
    first_use,
    known_attention,
    known_pooled,
    linear,
    linear_fold,
    pure,
    pure_varlen,
)

CPU = torch.device("cpu")
MODULES = {"linear": linear, "pure": pure}


def interpreted(test):
    return pytest.mark.interpreter(needs_interpreter(test))


@pytest.fixture
def small(monkeypatch):
    """Two heads, tiles of 32, and sequences that are cut into runs from 32 tokens on: the interpreter is slow."""
    tiles = {kernel: {256: configs.Pure(32, 32, 4, 1)} for kernel in ("fwd", "bwd_queries", "bwd_keys", "bwd_tied")}
    monkeypatch.setattr(configs, "PURE", dict.fromkeys(configs.PURE, tiles))
    monkeypatch.setattr(configs, "WHOLE", 32)
    monkeypatch.setattr(configs, "resident", lambda *kind: 1)
    monkeypatch.setattr(configs, "multiprocessors", lambda device: 12)
    monkeypatch.setattr(known_attention, "HEADS", (1, 2))


def variant(
    op="pure", direction="forward", dtype="float32", d=16, tied=False, masked="", **rest
) -> known_attention.Variant:
    rest |= {"offsets": "int64"} if op in known_attention.PACKED else {}
    rest = {"dv": d, "precision": "ieee" if dtype == "float32" else "", "token_major": True, "described": False} | rest
    return known_attention.Variant(op=op, direction=direction, dtype=dtype, d=d, tied=tied, masked=masked, **rest)


@interpreted
@pytest.mark.parametrize("op", MODULES)
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(
    "case",
    [
        {"tied": True},
        {"dtype": "bfloat16", "d": 20, "masked": "keys and queries", "token_major": False},
        swept({"masked": "keys"}),
        {"masked": "queries", "tied": True},
        swept({"dtype": "float16", "d": 17, "dv": 32}),
    ],
    ids=["tied", "masked", "keys", "queries", "odd"],
)
@pytest.mark.one_in(4)
def test_the_shipped_kernels_pass(op, direction, case, small):
    assert first_use.check(variant(op, direction, **case), CPU) is None


@interpreted
@pytest.mark.parametrize("op", known_attention.PACKED)
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(
    "case", [{"tied": True}, swept({"dtype": "bfloat16", "d": 20, "token_major": False})], ids=["tied", "odd"]
)
@pytest.mark.one_in(3)
def test_the_shipped_kernels_pass_packed(op, direction, case, small):
    assert first_use.check(variant(op, direction, **case), CPU) is None


@interpreted
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_sequence_that_is_read_too_far_fails(direction, small, monkeypatch):
    """By one token of the next one, as where its end is looked up wrongly."""
    kind = variant("pure_varlen", direction)
    right = getattr(pure_varlen, direction)

    def wrong(*arguments):
        arguments = list(arguments)
        at = next(i for i, a in enumerate(arguments) if isinstance(a, torch.Tensor) and a.dtype == torch.int64) + 1
        cu_seqlens = arguments[at] = arguments[at].clone()
        cu_seqlens[2] += 1
        return right(*arguments)

    monkeypatch.setattr(pure_varlen, direction, wrong)
    assert "is off by" in first_use.check(kind, CPU)


def test_a_packed_call_is_a_variant_of_its_own():
    kinds = []
    for index, tied in ((torch.int32, False), (torch.int64, False), (torch.int64, True)):
        call = packed_calls.make("pure", index=index, tied=tied)
        raw = call.raw()
        kinds.append(first_use.of("pure_varlen", "forward", raw))
        backward = torch.empty_like(raw[2]), *raw[:3], raw[2], torch.empty(9, 3), *raw[3:]
        assert first_use.of("pure_varlen", "backward", backward) == replace(kinds[-1], direction="backward")
    assert [(v.offsets, v.tied, v.d, v.dv, v.token_major, v.masked) for v in kinds] == [
        ("int32", False, 16, 24, True, ""), ("int64", False, 16, 24, True, ""), ("int64", True, 16, 24, True, "")
    ]  # fmt: skip
    assert str(kinds[0]).endswith("token-major, ieee, int32 offsets")
    assert {v.op for v in first_use.usual(CPU)} == {
        "linear",
        "linear_floor",
        "pure",
        *known_attention.PACKED,
        *known_pooled.OPS,
    }


def last_row_is_forgotten(run, calls):
    out, *rest = run()
    out[:, :, -1:] = torch.nan
    return out, *rest


def one_key_is_lost(run, calls):
    out, norm = run()
    return out, (norm.square() - norm[0, 0] * 0 - 1e-2).sqrt()


def heads_race(run, calls):
    out, *rest = run()
    out[0, 1] = out[0, 1].nextafter(torch.tensor(1e9))
    return out, *rest


def runs_race(run, calls):
    out, *rest = run()
    return (out.nextafter(torch.tensor(1e9)) if calls == 3 else out), *rest


def the_scale_is_wrong(run, calls):
    out, *rest = run()
    return out * (1 + 1e-4), *rest


PLANTED = {
    last_row_is_forgotten: "result 0 is off by nan",
    one_key_is_lost: "result 1 is off by",
    heads_race: "result 0 differs between heads of the same content, at 97 queries and 64 keys",
    runs_race: "result 0 differs between runs",
    the_scale_is_wrong: "result 0 is off by",
}


def plant(fault, monkeypatch):
    right, calls = pure.forward, []

    def wrong(*arguments):
        calls.append(arguments)
        return fault(lambda: right(*arguments), len(calls))

    monkeypatch.setattr(pure, "forward", wrong)


@interpreted
@pytest.mark.parametrize("fault", PLANTED, ids=lambda fault: fault.__name__)
def test_a_wrong_kernel_fails(fault, small, monkeypatch):
    plant(fault, monkeypatch)
    assert PLANTED[fault] in first_use.check(variant(), CPU)


@interpreted
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_wrong_sum_of_the_partial_sums_fails(direction, small, monkeypatch):
    right = linear_fold.Fold.__call__

    def wrong(fold, parts, *more):
        return right(fold, parts * 1.001, *more)

    monkeypatch.setattr(linear_fold.Fold, "__call__", wrong)
    assert "at 65 queries" in first_use.check(variant("linear", direction, d=64), CPU)


@interpreted
@pytest.mark.parametrize("outside", ["before", "after"])
def test_reading_outside_a_head_fails(outside, small, monkeypatch):
    def shifted(q, k, v, *rest):
        step = -1 if outside == "before" else 1
        at = k.storage_offset() + step * k.stride(2)
        return right(q, k.as_strided(k.shape, k.stride(), at), v, *rest)

    right = pure.forward
    monkeypatch.setattr(pure, "forward", shifted)
    assert "off by nan" in first_use.check(variant(), CPU)


@interpreted
@pytest.mark.parametrize("wrong", ["scaled", "not written"])
def test_a_gradient_that_is_wrong_fails(wrong, small, monkeypatch):
    def backward(*arguments):
        *taken, (dq, dk, dv, drho) = arguments
        if wrong == "scaled":
            right(*arguments)
            dk *= 1.01
        else:
            right(*taken, (dq, None, dv, drho))

    right = linear.backward
    monkeypatch.setattr(linear, "backward", backward)
    assert "result 1 is off by" in first_use.check(variant("linear", "backward"), CPU)


@pytest.fixture
def checked(tmp_path, monkeypatch):
    """Calls on the CPU are checked, by a check that says what the test puts into ``says``; verdicts lie in tmp_path."""

    class Checked:
        says, seen = None, []

        def check(self, variant, device):
            self.seen.append(variant)
            if isinstance(self.says, Exception):
                raise self.says
            return self.says

    found = Checked()
    found.seen = []
    monkeypatch.setattr(first_use, "CHECKED", ("cpu",))
    monkeypatch.setattr(first_use, "check", found.check)
    monkeypatch.setattr(first_use, "_verdicts", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setenv("INFSA_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("INFSA_TRITON", raising=False)
    return found


def forget(monkeypatch):
    """As a new process."""
    monkeypatch.setattr(first_use, "_verdicts", {})


def call(**changes):
    q, v = torch.ones(1, 2, 8, 16), torch.ones(1, 2, 8, changes.get("dv", 16))
    masks = changes.get("mask"), changes.get("query_mask")
    return first_use.failure("pure", "forward", (q, None, v, 1e-6, 1.0, None, *masks))


def test_a_variant_is_checked_once_on_a_machine(checked, tmp_path, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            assert call() is None
            forget(monkeypatch)
        mask = torch.zeros(1, 8, dtype=torch.bool)
        assert call(dv=32) is call(mask=mask) is call(query_mask=mask) is call(mask=mask, query_mask=mask) is None
    seen = [(v.dv, v.masked) for v in checked.seen]
    assert seen == [(16, ""), (32, ""), (16, "keys"), (16, "queries"), (16, "keys and queries")]
    files = list(tmp_path.rglob("*.json"))
    assert len(files) == 5 and not list(tmp_path.rglob("*.part"))
    assert {json.loads(file.read_text())["failure"] for file in files} == {None}


def test_a_failure_is_told_once_and_remembered(checked, monkeypatch):
    checked.says = "result 0 is off by 3"
    told = (
        r"does not use its Triton kernel for infsa::pure forward, float32, .*: result 0 is off by 3; please report it"
    )
    with pytest.warns(UserWarning, match=told):
        assert call() == "result 0 is off by 3"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert call() == "result 0 is off by 3"
    forget(monkeypatch)
    with pytest.warns(UserWarning, match=told):  # a new process tells it anew, without checking
        call()
    assert len(checked.seen) == 1
    assert list(first_use.known(CPU).values()) == ["result 0 is off by 3"]


def test_what_raises_is_a_failure_of_this_process_only(checked, monkeypatch):
    checked.says = RuntimeError("Failed to find C compiler. Please specify via CC environment variable\nmore")
    told = "it raised RuntimeError: Failed to find C compiler. Please specify via CC environment variable; please"
    with pytest.warns(UserWarning, match=told):
        assert call()
    forget(monkeypatch)
    checked.says = None  # a compiler was installed
    assert call() is None and len(checked.seen) == 2


@pytest.mark.parametrize("content", ["", "{", '{"verdict": 1}'])
def test_a_damaged_verdict_is_made_anew(content, checked, tmp_path, monkeypatch):
    call()
    (file,) = tmp_path.rglob("*.json")
    file.write_text(content)
    forget(monkeypatch)
    assert call() is None and len(checked.seen) == 2
    assert json.loads(file.read_text())["failure"] is None


def test_a_folder_that_cannot_be_written_costs_a_check_in_every_process(checked, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("INFSA_CACHE_DIR", str(tmp_path / "file"))
    assert call() is None
    forget(monkeypatch)
    assert call() is None and len(checked.seen) == 2


@pytest.mark.parametrize("change", ["driver", "sources", "GPU"])
def test_a_verdict_is_true_for_one_machine(change, checked, monkeypatch):
    call()
    forget(monkeypatch)
    machine = first_use.verdicts.machine(CPU) | {change: "another"}
    monkeypatch.setattr(first_use.verdicts, "machine", lambda device, backend: machine)
    call()
    assert len(checked.seen) == 2


def test_trust_is_asked_for_by_the_environment(checked, monkeypatch):
    monkeypatch.setenv("INFSA_TRITON", "1")
    checked.says = "wrong"
    assert call() is None and not checked.seen


def test_a_first_call_inside_a_capture_is_refused(checked, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(
        RuntimeError, match=r"infsa::pure: its first call .* inside the capture of a CUDA graph.*warm-up"
    ):
        call()
    assert not checked.seen


def test_a_call_after_the_warm_up_is_captured(checked, monkeypatch):
    call()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert call() is None


@interpreted
@pytest.mark.parametrize("op", MODULES)
def test_an_operator_whose_kernel_failed_runs_torch_operations(op, checked, monkeypatch):
    def never(*arguments):
        raise AssertionError("the Triton kernel was run")

    for direction in ("forward", "backward"):
        monkeypatch.setattr(MODULES[op], direction, never)
    checked.says = "result 0 is off by 3"
    q, k, v = torch.randn(3, 1, 2, 8, 16)

    def call():
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        out = getattr(torch.ops.infsa, op)(*leaves)
        return out, *torch.autograd.grad(out.sum(), leaves)

    with pytest.warns(UserWarning, match="does not use its Triton kernel"), infsa_kernels.backend("triton"):
        found = call()
    assert [v.direction for v in checked.seen] == ["forward", "backward"]
    with infsa_kernels.backend("eager"):
        assert all(map(torch.equal, found, call()))


@interpreted
def test_each_check_of_all_is_a_process(monkeypatch, tmp_path):
    """`python -m infsa_kernels.info --check`: what raises there is told, and what ends the process ends that one alone."""

    def run(command, **options):
        seen.append(json.loads(command[-1])["op"])
        if seen[-1] == "passes":
            return subprocess.CompletedProcess(command, 0, '{"failure": null}', "")
        if seen[-1] == "dies":
            return subprocess.CompletedProcess(command, -6, "", "...\nCUDA error: an illegal memory access\n")
        return real(command, **options)

    seen, real = [], subprocess.run
    monkeypatch.setenv("INFSA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(first_use, "usual", lambda device: [variant(op) for op in ("dies", "unknown", "passes")])
    monkeypatch.setattr(subprocess, "run", run)
    died, raised, passed = (reason for _, reason in first_use.check_all(CPU))
    assert died == "its process ended: CUDA error: an illegal memory access"
    assert raised.startswith("it raised KeyError") and passed is None
    assert first_use.known(CPU) == {}  # what raised may be mended: it is not written down


@interpreted
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_defaults_of_the_program_do_not_reach_the_check(direction, small):
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            assert first_use.check(variant("linear", direction, masked="keys and queries"), CPU) is None
    finally:
        torch.set_default_dtype(torch.float32)

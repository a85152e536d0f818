"""The check before first use of the pooled layer's kernels: right ones pass it, planted wrong ones do not."""

import importlib
from dataclasses import replace

import pytest
import torch
from helpers.interpreter import needs_interpreter
from helpers.sweep import some

pytest.importorskip("triton")

from infsa_kernels.triton import central_query, configs, first_use, known_pooled, token_rows
from infsa_kernels.triton.known_calls import raw_of

pytestmark = [pytest.mark.interpreter, needs_interpreter]

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Two splits of several tiles each: the interpreter is slow."""
    monkeypatch.setattr(configs, "multiprocessors", lambda device: 2)


def variant(op="central_query", direction="forward", dtype="float32", **form) -> known_pooled.Variant:
    form = {"heads": 2, "d": 5 if op == "central_query" else 0, "width": 24} | form
    form = dict.fromkeys(("biased", "normalised", "masked", "large"), False) | {"dense": True} | form
    precision = "ieee" if dtype == "float32" else ""
    return known_pooled.Variant(op=op, direction=direction, dtype=dtype, precision=precision, **form)


CASES = {
    "plain": {},
    "large": {"dtype": "bfloat16", "d": 16, "biased": True, "masked": True, "large": True},
    "everything": {"biased": True, "normalised": True, "masked": True},
    "bfloat16": {"dtype": "bfloat16", "biased": True, "normalised": True},
    "float16": {"dtype": "float16", "masked": True, "width": 33, "normalised": True},
    "apart": {"dense": False, "masked": True, "width": 33, "heads": 3},
}
directions = pytest.mark.parametrize("direction", ["forward", "backward"])


@pytest.mark.parametrize("op", known_pooled.OPS)
@directions
@pytest.mark.parametrize("case", some(CASES, "everything", "bfloat16", "apart", "large"))
@pytest.mark.one_in(4)
def test_the_shipped_kernels_pass(op, direction, case):
    if op != "central_query" and case == "large":
        pytest.skip("its tiles have one size")
    assert first_use.check(variant(op, direction, **CASES[case]), CPU) is None


def plant(op, direction, fault, monkeypatch):
    """A fault in the module of an operator: what changes its results, named, in some call."""
    module = importlib.import_module(raw_of(op).kernels["triton"], "infsa_kernels")
    right, raw, calls = getattr(module, direction), raw_of(op), []

    def wrong(*arguments):
        calls.append(arguments)
        results = right(*arguments)
        if direction == "forward":
            return tuple(fault(dict(zip(raw.forward.results, results)), len(calls)).values())
        given = dict(zip(raw.backward.results, arguments[-1]))
        for name, t in fault({n: t.clone() for n, t in given.items()}, len(calls)).items():
            given[name].copy_(t)

    monkeypatch.setattr(module, direction, wrong)


def scaled(name):
    return lambda found, calls: found | {name: found[name] * (1 + 1e-4)}


def last_token_is_forgotten(found, calls):
    found["dx"][:, -1] = torch.nan
    return found


def heads_race(found, calls):
    first = next(iter(found.values()))
    first[0, 1] = first[0, 1].nextafter(torch.tensor(1e9))
    return found


def runs_race(found, calls):
    first = next(iter(found))
    return found | ({first: found[first].nextafter(torch.tensor(1e9))} if calls == 3 else {})


PLANTED = [("forward", fault, told) for fault, told in (
    (heads_race, "result 0 differs between heads of the same content"),
    (runs_race, "result 0 differs between runs"),
)] + [("backward", last_token_is_forgotten, "result 0 is off by nan")]  # fmt: skip


@pytest.mark.parametrize("op", known_pooled.OPS)
@pytest.mark.parametrize(("direction", "fault", "told"), PLANTED, ids=lambda value: getattr(value, "__name__", ""))
def test_a_wrong_kernel_fails(op, direction, fault, told, monkeypatch):
    plant(op, direction, fault, monkeypatch)
    assert told in first_use.check(variant(op, direction, biased=True), CPU)


@pytest.mark.parametrize("op", known_pooled.OPS)
@directions
def test_every_result_is_looked_at(op, direction, monkeypatch):
    raw = raw_of(op)
    for number, name in enumerate((raw.forward if direction == "forward" else raw.backward).results):
        with monkeypatch.context() as patch:
            plant(op, direction, scaled(name), patch)
            told = first_use.check(variant(op, direction, biased=True, normalised=True), CPU)
            assert told.startswith(f"result {number} is off by"), name


def test_a_run_of_tokens_that_no_program_takes_fails(monkeypatch):
    right = central_query.Tiling.splits

    def wrong(*arguments):
        splits, tokens = right(*arguments)
        return max(1, splits - 1), tokens

    monkeypatch.setattr(central_query.Tiling, "splits", wrong)
    assert "is off by" in first_use.check(variant(), CPU)


@directions
def test_rows_that_are_not_normalised_fail(direction, monkeypatch):
    right = token_rows.plan_statistics

    def wrong(x, norm_eps, *more):
        return right(x, norm_eps + 1e-2, *more)

    monkeypatch.setattr(central_query, "plan_statistics", wrong)
    monkeypatch.setattr(token_rows, "plan_statistics", wrong)
    assert "is off by" in first_use.check(variant(direction=direction, normalised=True), CPU)


def test_what_is_compiled_anew_is_a_variant_of_its_own():
    x, weight, bias = torch.randn(2, 9, 24), torch.randn(3, 5, 24), torch.randn(3, 5)
    mask, saved = torch.zeros(2, 9, dtype=torch.bool), (torch.randn(2, 3, 5), torch.randn(2, 3))
    plain = first_use.of("central_query", "forward", (x, weight, None, None, 1e-6, None))
    assert plain == variant(heads=3)
    for call, change in (
        ((x, weight, bias, None, 1e-6, None), {"biased": True}),
        ((x, weight, None, 1e-5, 1e-6, None), {"normalised": True}),
        ((x, weight, None, None, 1e-6, mask), {"masked": True}),
        ((x.mT.contiguous().mT, weight, None, None, 1e-6, None), {"dense": False}),
        ((x.half(), weight.half(), None, None, 1e-6, None), {"dtype": "float16", "precision": ""}),
    ):
        assert first_use.of("central_query", "forward", call) == replace(plain, **change)
        backward = (saved[0], *call[:3], *saved, *call[3:])
        assert first_use.of("central_query", "backward", backward) == replace(plain, direction="backward", **change)
    assert str(plain) == "infsa::central_query forward, float32, 24 channels, 3 heads of 5, ieee"
    many, of_heads = torch.randn(2, 128, 24).half(), (torch.randn(3, 16, 24).half(), None, None, 1e-6, None)
    halves = replace(plain, dtype="float16", precision="", d=16)
    assert first_use.of("central_query", "forward", (many, *of_heads)) == replace(halves, large=True)
    assert first_use.of("central_query", "forward", (many[:, 1:], *of_heads)) == halves


@pytest.mark.parametrize("large", [False, True])
def test_a_check_runs_the_tiles_of_its_variant(large, monkeypatch):
    asked = variant(dtype="float16", d=16, large=large)
    for known in known_pooled.calls(asked, CPU):
        with known.around():
            assert first_use.of("central_query", "forward", known.arguments) == asked, known.where

"""The benchmark: its formulas, its gate, its numbers and its files, on sizes that take no time."""

import json
import math
import subprocess
import sys

import pytest
import torch

from bench import curves, goals, layer, machine, measure, report, rows, run
from bench.cases import Case, plan
from bench.image import photograph, queries_keys_values
from bench.sweep import Settings, Sweep
from bench.truth import Truth, pure_rows
from bench.ways import WAYS
from infsa_kernels import reference

CPU = torch.device("cpu")


def small_limits(patch):
    patch.setattr(machine, "READ_BYTES", 1 << 20)
    patch.setitem(machine.GEMM_SIZE, "cpu", 64)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A whole run, of two tiny pictures, and the folder of its files."""
    out = tmp_path_factory.mktemp("bench")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # with more, every small loop waits for whatever else runs on the machine
    with pytest.MonkeyPatch.context() as patch:
        small_limits(patch)
        arguments = ["--device", "cpu", "--sizes", "32,64", "--peers", "eager,sdpa", "--budget", "0.01"]
        code = run.main([*arguments, "--out", str(out)])
    torch.set_num_threads(threads)
    assert code == 0
    return json.loads((out / "results.json").read_text()), out


def test_a_run_writes_rows_plots_and_a_table(results):
    found, out = results
    assert {p.name for p in out.iterdir()} == {
        "results.json", "table.txt",
        "overview.png", "latency.png", "speed_up.png", "memory.png", "limit.png", "accuracy.png",
    }  # fmt: skip
    table = (out / "table.txt").read_text()
    assert "Linear-InfSA" in table
    assert "Pure InfSA" in table
    assert "Pooled layer" in table
    assert "WRONG" not in table
    assert {"commit", "torch", "device", "threads", "cores", "isa", "backend", "date"} <= found["environment"].keys()
    for candidate in ("infsa", "eager", "sdpa"):
        mine = [r for r in found["rows"] if r["candidate"] == candidate and r["sweep"]]
        assert {(r["op"], r["N"], r["direction"]) for r in mine} == {
            (op, N, direction) for op in ("linear", "pure") for N in (4, 16) for direction in ("fwd", "bwd", "fwd+bwd")
        }


def test_every_row_has_its_figures(results):
    timed = {"status": str, "median_s": float, "p20_s": float, "p80_s": float, "samples": int}
    own = {
        "bytes": int,
        "flops": int,
        "bytes_per_s": float,
        "flops_per_s": float,
        "share_of_limit": float,
        "error": float,
    }
    for row in results[0]["rows"]:
        assert row["status"] in rows.STATUSES
        expected = timed | (own if row["candidate"] in ("infsa", "eager") else {})
        assert all(isinstance(row[name], kind) for name, kind in expected.items()), row
        assert 0 < row["p20_s"] <= row["median_s"] <= row["p80_s"]
        if row["candidate"] == "infsa":
            assert row["error"] <= row["bound"]


def test_pooled_layer_is_gated_and_timed_beside_the_plain_path(results):
    found = results[0]["layer"]
    assert {(r["N"], r["direction"], r["candidate"]) for r in found} == {
        (N, direction, name) for N in (4, 16) for direction in ("fwd", "fwd+bwd") for name in ("pooled", "plain")
    }
    assert all(r["status"] == "ok" and r["median_s"] > 0 for r in found)
    assert all(r["error"] <= r["bound"] for r in found if r["candidate"] == "pooled")


def test_a_wrong_pooled_layer_is_refused(monkeypatch):
    monkeypatch.setattr(layer, "pooled", lambda *tensors: layer.plain(*tensors)[:, 0] * 1.001)
    tensors = layer.inputs(32, torch.float32, CPU)
    verdict = layer.judge(tensors, torch.ones(1, layer.D))
    assert verdict["status"] == "wrong"


def test_bytes_and_flops_by_hand():
    # 3 tokens, 2 heads of 5, float32: a tensor of tokens is 30 numbers, 120 bytes; one row per head is 40 bytes.
    linear, pure = Case("linear", 3, 2, 5), Case("pure", 3, 2, 5)
    assert linear.traffic("fwd") == 2 * 120 + 40  # read q, v; write the context
    assert linear.traffic("bwd") == 2 * 120 + 40 + 2 * 120  # read q, v, dout; write dq, dv
    assert Case("linear", 3, 2, 5, tied=False).traffic("fwd+bwd") == 3 * 120 + 40 + 6 * 120 + 40
    assert pure.traffic("fwd") == 2 * 120 + 120
    assert pure.traffic("bwd") == 2 * 120 + 2 * 120 + 2 * 120  # read q, v, out, dout; write dq, dv
    assert Case("pure", 3, 2, 5, dtype=torch.bfloat16).traffic("fwd") == pure.traffic("fwd") // 2
    # Linear forward, per number of q: square and sum of the norm, product and sum of qbar; of k, v: product and sum.
    assert linear.flops("fwd") == 2 * (15 * 4 + 15 * 2 + 15 * 2)
    # Pure: S = q k, P v; backward S again, dP = dO v, dv = P dO, dq = dS k, dk = dS q. A product is 2 * 3 * 3 * 5.
    assert pure.flops("fwd") == 2 * 2 * 90
    assert pure.flops("fwd+bwd") == 2 * 7 * 90


@pytest.mark.parametrize("tied", [True, False])
def test_pure_rows_are_rows_of_the_reference(tied):
    q, k, v, dout = torch.randn(4, 50, 8, dtype=torch.float64).unbind()
    inputs = {"q": q, "v": v} if tied else {"q": q, "k": k, "v": v}
    chosen = torch.tensor([3, 20, 49])
    decided, found = pure_rows(inputs, dout, chosen, torch.float64, gradients=True)
    leaves = {n: t.clone().requires_grad_() for n, t in inputs.items()}
    out = reference.pure(leaves["q"], leaves.get("k", leaves["q"]), leaves["v"], 0.95, 1e-6)
    grads = torch.autograd.grad(out, list(leaves.values()), dout)
    for name, whole in {"out": out, **{f"d{n}": g for n, g in zip(leaves, grads)}}.items():
        torch.testing.assert_close(found[name], whole[chosen], rtol=1e-11, atol=1e-13)
    assert decided.all()


@pytest.mark.parametrize("op", ["linear", "pure"])
@pytest.mark.parametrize("what", ["out", "dv", "dq"])
def test_the_gate_sees_one_wrong_number(op, what):
    case = plan([op], [64], torch.float32)[0]
    inputs = case.inputs(*queries_keys_values(64), device=CPU)
    leaves = {n: t.detach().requires_grad_() for n, t in inputs.items()}
    out = WAYS["infsa"].prepare(op)(leaves["q"], leaves["q"], leaves["v"])
    dout = torch.randn_like(out)
    dq, dv = torch.autograd.grad(out, [leaves["q"], leaves["v"]], dout)
    results = {"out": out.detach(), "dq": dq, "dv": dv}
    truth = Truth(case, inputs, dout, gradients=True)
    assert truth.judge(results).right
    wrong = results[what].clone(memory_format=torch.contiguous_format)
    wrong.view(-1)[wrong.numel() // 3] += 1e-4 * wrong.abs().max()
    verdict = truth.judge(results | {what: wrong})
    assert not verdict.right
    assert verdict.what == what
    wrong.view(-1)[7] = math.nan
    assert not truth.judge(results | {what: wrong}).right


def test_a_wrong_kernel_gets_no_time_and_no_speed_up(monkeypatch, capsys, tmp_path):
    small_limits(monkeypatch)
    right = WAYS["infsa"].prepare("linear")
    monkeypatch.setattr(WAYS["infsa"], "prepare", lambda op: lambda q, k, v: right(q, k, v) * 1.5)
    arguments = ["--only", "linear", "--sizes", "32", "--peers", "eager", "--budget", "0.01", "--device", "cpu"]
    assert run.main([*arguments, "--out", str(tmp_path)]) == 1
    table = capsys.readouterr().out
    assert "WRONG" in table
    for row in json.loads((tmp_path / "results.json").read_text())["rows"]:
        if row["candidate"] == "infsa":
            assert row["status"] == "wrong"
            assert "allowed" in row["reason"]
            assert not {"median_s", "bytes_per_s", "flops_per_s", "share_of_limit"} & row.keys()


def test_what_would_take_too_long_is_a_row_and_is_not_run(monkeypatch):
    ceilings = {"gemm": 1e6, "gemm_way": "torch.mm", "read_way": "torch.sum"}
    settings = Settings(CPU, torch.float32, ("eager", "sdpa"), budget=0.01, limit=1e-3)
    sweep = Sweep(settings, ceilings, lambda what: None)
    monkeypatch.setattr(WAYS["sdpa"], "prepare", lambda op: pytest.fail("it ran"))
    case = Case("pure", 1024, 16, 64)
    assert sweep.skip(case, "sdpa", "fwd") == {"status": "skipped", "reason": "would take ~4295 s"}
    monkeypatch.setattr("bench.sweep.available_memory", lambda device: 1 << 20)
    assert sweep.skip(case, "eager", "fwd") == {"status": "out of memory", "reason": "would need ~0 GB"}
    # A time that was measured is scaled by the candidate's growth.
    sweep.remember(Case("linear", 100, 64, 16), "sdpa", "fwd", measure.Observation([[0.5]], [2000], 0))
    assert sweep.foresee(Case("linear", 400, 64, 16), "sdpa", "fwd") == (8.0, 8000)


def test_failures_become_rows():
    assert rows.failure(torch.OutOfMemoryError("CUDA out of memory"))["status"] == "out of memory"
    assert (
        rows.failure(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"))["status"]
        == "out of memory"
    )
    assert rows.failure(RuntimeError("std::bad_alloc"))["status"] == "out of memory"
    assert rows.failure(NotImplementedError("no\nway")) == {
        "status": "unsupported",
        "reason": "NotImplementedError: no",
    }


def test_slopes_of_synthetic_times():
    def row(N, seconds, candidate):
        return {"op": "pure", "direction": "fwd", "candidate": candidate, "sweep": True, "status": "ok", "N": N} | {
            "median_s": seconds
        }

    # A constant start-up below N = 1024 must not flatten the slope.
    found = [row(N, max(1e-3, 2e-9 * N**2), "infsa") for N in (196, 1024, 4096, 16384)] + [row(196, 1.0, "eager")]
    (slope,) = curves.slopes(found)
    assert (slope["candidate"], slope["from_N"]) == ("infsa", 1024)
    assert slope["exponent"] == pytest.approx(2)
    assert math.exp(slope["offset"]) == pytest.approx(2e-9)


def test_goals_are_reached_missed_or_not_measured():
    case = goals.LINEAR | {"status": "ok", "direction": "fwd"}
    times = {"infsa": 2.0, "eager": 50.0, "read Q, Q, V": 1.0}
    found = goals.compare(
        {
            "environment": {"device_type": "cpu"},
            "rows": [case | {"candidate": name, "median_s": t} for name, t in times.items()],
            "layer": [
                goals.LAYER | {"status": "ok", "direction": "fwd", "candidate": name, "median_s": t}
                for name, t in {"pooled": 1.0, "plain": 3.0}.items()
            ],
            "dispatch": {"public": 20e-6, "kernel": 10e-6},
        }
    )
    by_name = {g["goal"]: (g["value"], g["reached"]) for g in found}
    assert by_name["Linear forward: time over its own read of Q, Q, V"] == (2.0, False)
    assert by_name["Linear forward: times faster than eager"] == (25.0, True)
    assert by_name["Pure forward: times faster than SDPA"] == (None, None)
    assert by_name["Pooled layer forward: times faster than the plain path"] == (3.0, True)
    assert by_name["Pooled layer forward + backward: times faster than the plain path"] == (None, None)
    assert by_name["Dispatch of a tiny forward: us beyond its C++ operator"] == (pytest.approx(10), True)


TWO_LAPS = """
import torch
from bench import measure

def action(lap):
    torch.ones(20_000_000).sum()  # 80 MB, freed at once
    lap()
    return [torch.ones(5_000_000)]

seen, kept = measure.observe(action, torch.device("cpu"), warm_up=False)
print(*seen.peaks, seen.result_bytes, sum(t.nbytes for t in kept))
"""


def test_peak_memory_is_that_of_the_lap():
    """In a process of its own: what other tests leave to the allocator and to the garbage collector is none of it."""
    memory = measure.HostMemory()
    memory.start()
    if memory.peaks is None:
        pytest.skip("this system has no resettable high-water mark")
    run = subprocess.run([sys.executable, "-c", TWO_LAPS], cwd=machine.ROOT, capture_output=True, text=True, check=True)
    first, second, *result_bytes = map(int, run.stdout.split())
    assert first == pytest.approx(80e6, abs=4e6)
    assert second == pytest.approx(20e6, abs=4e6)
    assert result_bytes == [20_000_000] * 2


def test_samples_are_taken_in_turn():
    calls = []
    actions = {name: (lambda lap, name=name: calls.append(name) or []) for name in ("a", "b")}
    seen = {name: measure.Observation([[1.0]], None, 0) for name in actions}
    measure.interleave(actions, seen, budget=1.0, device=CPU)
    assert calls == ["a", "b"] * 3
    assert all(len(s.samples) == 3 for s in seen.values())


def test_the_photograph_has_detail_at_every_size():
    for pixels in (64, 512, 1024):
        picture = photograph(pixels)
        assert picture.shape == (pixels, pixels, 3)
        assert picture.min() >= 0
        assert picture.max() <= 1
        assert picture.std() > 0.2
    q, k, v = queries_keys_values(64)
    assert q.shape == k.shape == v.shape == (16, 1024)
    assert not torch.equal(q, k)
    assert torch.equal(q, queries_keys_values(64)[0])


@pytest.mark.parametrize(("seconds", "text"), [(2.5e-6, "2.50 us"), (0.0314, "31.4 ms"), (123.4, "123 s")])
def test_durations(seconds, text):
    assert report.durations(seconds, seconds, seconds)[0] == text

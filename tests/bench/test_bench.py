"""The benchmark's engine: its formulas, its gate, its timer and its rows, on sizes that take no time."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.bench_rows import turn

from bench import engine, gate, image, peers, rows, timer
from bench.peers.infsa import flops, pure_rows, traffic
from bench.subject import Subject
from infsa_kernels import reference

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setitem(peers.machine.GEMM_SIZE, "cpu", 64)
    monkeypatch.setattr(timer, "CACHE_BYTES", {"cpu": 1 << 16})
    monkeypatch.setattr(gate, "_verdicts", {})
    monkeypatch.setattr(gate, "_known", {})
    for cached in (peers.machine.matrices, peers.machine.fastest_product):
        cached.cache_clear()


def measure(*names, **fields):
    return engine.measure(turn(*names, **fields), CPU, 1e-3)


# -- rows --


@pytest.mark.parametrize("phase", ["fwd", "train"])
@pytest.mark.parametrize("level", ["operator", "layer", "model"])
def test_every_level_measures_and_checks(level, phase):
    found = measure("linear_infsa", "pure_infsa", "agent", level=level, phase=phase)
    assert len(found) == 3 * (1 if phase == "fwd" else 2)
    for row in found:
        assert row["status"] == "ok", row
        assert row["pass"] == "fwd" if phase == "fwd" else row["pass"] in ("bwd", "train")
        assert 0 < row["p20_s"] <= row["median_s"] <= row["p80_s"]
        assert row["error"] <= row["bound"]
        assert ("gradients" in row["checked"]) == (phase == "train" or level != "operator")
        assert ("linear_infsa" in row["beside"]) == (level != "model" and row["name"] != "linear_infsa")
        assert row["parameters"] > 0
        assert "joules" not in row
        assert set(row.get("parts_s", ())) == ({"patches", "attention", "MLP"} if level == "model" else set())
    if phase == "train":
        assert all(next(r for r in found if r["name"] == row["name"] and r["pass"] == "train")["median_s"] >= row["median_s"]
                   for row in found)  # fmt: skip


def test_limits_of_the_machine_take_their_turn():
    found = measure("linear_infsa", "pure_infsa", "read", "gemm", "tiny", anchors=("linear_infsa", "read", "gemm"))
    by_name = {row["name"]: row for row in found}
    for name, limit, count in (("linear_infsa", "read", 1), ("pure_infsa", "gemm", 4 * 49 * 49 * 64 / (2 * 64**3))):
        row = by_name[name]
        assert row["limit"] == limit
        assert row["share_of_limit"] == pytest.approx(count * by_name[limit]["median_s"] / row["median_s"])
    assert by_name["linear_infsa"]["bytes_per_s"] == pytest.approx(traffic("linear", "fwd", True, 49 * 256, 256)
                                                                   / by_name["linear_infsa"]["median_s"])  # fmt: skip
    assert by_name["read"]["bytes_per_s"] == pytest.approx(2 * 49 * 256 / by_name["read"]["median_s"])
    assert by_name["gemm"]["flops_per_s"] == pytest.approx(2 * 64**3 / by_name["gemm"]["median_s"])
    assert {"cold_s", "warm_s"} <= by_name["linear_infsa"].keys()


@pytest.mark.parametrize("phase", ["fwd", "train"])
def test_limits_of_the_machine_take_their_turn_beside_layers(phase):
    found = measure("linear_infsa", "pure_infsa", level="layer", phase=phase, anchors=("linear_infsa", "gemm"))
    by_name = {(row["name"], row["pass"]): row for row in found}
    # N = 49, D = 64: Linear's one projection and two products with 4 heads; Pure's three projections and two N x N products.
    least = {"linear_infsa": (49 * 64 * (2 * 64 + 4 * 4), 49 * 64 * (6 * 64 + 10 * 4)),
             "pure_infsa": (6 * 49 * 64**2 + 4 * 49**2 * 64, 12 * 49 * 64**2 + 10 * 49**2 * 64)}  # fmt: skip
    for (name, which), row in by_name.items():
        fwd, bwd = least[name]
        assert row["limit"] == "gemm"
        assert row["flops"] == {"fwd": fwd, "bwd": bwd, "train": fwd + bwd}[which]
        assert row["share_of_limit"] == pytest.approx(
            row["flops"] / (2 * 64**3) * row["beside"]["gemm"] / row["median_s"]
        )


@pytest.mark.parametrize("layout", ["bnhd", "bhnd"])
@pytest.mark.parametrize(("dtype", "batch"), [("fp32", 1), ("bf16", 2)])
def test_dtypes_layouts_and_batches(layout, dtype, batch):
    for row in measure(
        "linear_infsa", "pure_infsa_untied", "softmax", layout=layout, dtype=dtype, batch=batch, phase="train"
    ):
        assert row["status"] == "ok", row
        assert (row["layout"], row["dtype"], row["batch"]) == (layout, dtype, batch)


def test_a_backend_is_named_and_a_graph_has_its_backward_pass_alone():
    (row,) = measure("linear_infsa@eager", phase="train", way="graph")
    assert (row["status"], row["pass"], row["label"]) == ("ok", "bwd", "Linear-InfSA on eager")


def test_what_is_not_installed_says_so():
    names = ("flash_attention_3", "flash_attention_4", "triton_sigmoid", "linear_attention_flash", "gated_deltanet_fla")
    for row in measure(*names, "simple_linear_fla", "softmax"):
        if row["name"] != "softmax":
            assert row["status"] == "unsupported"
            assert "is not installed" in row["reason"] or "needs a GPU" in row["reason"]


def test_failures_become_rows(monkeypatch):
    failure = engine.failure
    assert failure(torch.OutOfMemoryError("CUDA out of memory"))["status"] == "out of memory"
    assert (
        failure(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"))["status"] == "out of memory"
    )
    assert failure(RuntimeError("std::bad_alloc"))["status"] == "out of memory"
    assert failure(NotImplementedError("no\nway")) == {"status": "unsupported", "reason": "NotImplementedError: no"}
    monkeypatch.setattr(peers.mean.Mean, "core", lambda *_: 1 / 0)
    found = {row["name"]: row["status"] for row in measure("mean", "softmax")}
    assert found == {"mean": "unsupported", "softmax": "ok"}  # one that fails costs its own row


# -- the gate --


def test_a_wrong_mechanism_gets_no_time(monkeypatch):
    right = peers.mlla.MLLA.core
    monkeypatch.setattr(peers.mlla.MLLA, "truth", lambda self, q, k, v, rows: right(self, q, k, v)[:, :, rows] * 1.01)
    (row,) = measure("mlla", level="layer")
    assert row["status"] == "wrong"
    assert "allowed" in row["reason"]
    assert not {"median_s", "share_of_limit"} & row.keys()


@pytest.mark.parametrize("level", ["operator", "layer"])
def test_a_wrong_kernel_gets_no_time(monkeypatch, level):
    owner, name = (
        (torch.ops.infsa, "linear") if level == "operator" else (peers.infsa.infsa_kernels, "pooled_linear_infsa")
    )
    right = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: right(*args, **kwargs) * 1.001)
    for row in measure("linear_infsa", level=level, phase="train"):
        assert row["status"] == "wrong"
        assert not {"median_s", "bytes_per_s", "flops_per_s", "share_of_limit"} & row.keys()


@pytest.mark.parametrize("level", ["layer", "model"])
@pytest.mark.parametrize("name", ["softmax", "linear_infsa"])
def test_what_is_wrong_only_at_the_size_that_is_measured_gets_no_time(monkeypatch, level, name):
    """Layers and models are compared whole at a small size, and at their own as far as float64 is cheap there."""
    owner, function = (peers.softmax.F, "scaled_dot_product_attention")
    if name == "linear_infsa":
        owner, function = peers.infsa.infsa_kernels, "pooled_linear_infsa"
    right = getattr(owner, function)

    def wrong_for_long(x, *args, **kwargs):
        return right(x, *args, **kwargs) * (1.001 if x.shape[-2] > 196 else 1)

    monkeypatch.setattr(owner, function, wrong_for_long)
    assert {row["status"] for row in measure(name, level=level, pixels=224)} == {"ok"}
    assert {row["status"] for row in measure(name, level=level, pixels=256)} == {"wrong"}


def test_a_layer_is_examined_once_for_both_its_passes(monkeypatch):
    whole = []
    real = gate._whole
    monkeypatch.setattr(gate, "_whole", lambda subject, *args: whole.append(subject.tokens) or real(subject, *args))
    measure("softmax", "linear_infsa", level="layer")
    assert sorted(whole) == [49, 196, 196]
    assert all("gradients at 224 pixels" in row["checked"] for row in measure("softmax", level="layer", phase="train"))
    assert len(whole) == 3
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    measure("softmax", level="layer", way="compile")
    assert whole[3:] == [49]  # the compiled function itself


@pytest.mark.parametrize("name", ["linear_infsa", "pure_infsa"])
@pytest.mark.parametrize("what", ["out", "dv", "dq"])
def test_the_gate_sees_one_wrong_number(monkeypatch, name, what):
    call, spoil = gate._call, []

    def spoiled(*args):
        found = call(*args)
        t = found[what].clone(memory_format=torch.contiguous_format)
        for change in spoil:
            change(t.view(-1))
        return found | {what: t}

    def verdict(*changes):
        spoil[:] = changes
        gate._verdicts.clear()
        return gate.examine(subject, subject.function())

    def one_wrong(t):
        t[len(t) // 3] += 1e-4 * t.abs().max()

    def one_nan(t):
        t[7] = math.nan

    monkeypatch.setattr(gate, "_call", spoiled)
    subject = Subject(turn(phase="train"), name, CPU)
    assert verdict().right
    wrong = verdict(one_wrong)
    assert not wrong.right
    assert wrong.what == what
    assert not verdict(one_nan).right


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


def test_float64_does_not_need_the_backend_under_test(monkeypatch):
    allowed = {}
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def spy(q, *args, **kwargs):
        allowed.setdefault(q.dtype, torch.backends.cuda.math_sdp_enabled())
        return sdpa(q, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    found = measure("sdpa_flash", "linformer", level="layer", phase="train")
    assert {row["status"] for row in found} == {"ok"}
    assert allowed[torch.float64]
    (row, _) = measure("sdpa_flash", level="layer", phase="train")
    assert row["status"] == "ok"


# -- formulas --


def test_bytes_and_flops_by_hand():
    # 3 tokens, 2 heads of 5, float32: a tensor of tokens is 30 numbers, 120 bytes; one row per head is 40 bytes.
    assert traffic("linear", "fwd", True, 120, 40) == 2 * 120 + 40  # read q, v; write the context
    assert traffic("linear", "bwd", True, 120, 40) == 2 * 120 + 40 + 2 * 120  # read q, v, dout; write dq, dv
    assert traffic("linear", "train", False, 120, 40) == 3 * 120 + 40 + 6 * 120 + 40
    assert traffic("pure", "fwd", True, 120, 40) == 2 * 120 + 120
    assert traffic("pure", "bwd", True, 120, 40) == 2 * 120 + 2 * 120 + 2 * 120  # read q, v, out, dout; write dq, dv
    # Linear forward, per number of q: square and sum of the norm, product and sum of qbar; of k, v: product and sum.
    assert flops("linear", "fwd", 1, 2, 3, 5) == 2 * (15 * 4 + 15 * 2 + 15 * 2)
    # Pure: S = q k, P v; backward S again, dP = dO v, dv = P dO, dq = dS k, dk = dS q. A product is 2 * 3 * 3 * 5.
    assert flops("pure", "fwd", 1, 2, 3, 5) == 2 * 2 * 90
    assert flops("pure", "train", 1, 2, 3, 5) == 2 * 7 * 90


def test_slopes_of_synthetic_times():
    # A constant start-up below N = 1024 must not flatten the slope.
    assert rows.slope([(N, max(1e-3, 2e-9 * N**2)) for N in (196, 1024, 4096, 16384)]) == pytest.approx(2)
    assert rows.slope([(196, 1.0)]) is None


@pytest.mark.parametrize(("seconds", "text"), [(2.5e-6, "2.50 us"), (0.0314, "31.4 ms"), (123.4, "123 s")])
def test_durations(seconds, text):
    assert rows.durations(seconds, seconds, seconds)[0] == text


# -- the timer --


ROOT = Path(__file__).parents[2]

TWO_LAPS = """
import torch
from bench import timer

def action(lap):
    torch.ones(20_000_000).sum()  # 80 MB, freed at once
    lap()
    return [torch.ones(5_000_000)]

seen, kept = timer.observe(action, torch.device("cpu"), warm_up=False)
print(*seen.peaks, seen.result_bytes, sum(t.nbytes for t in kept))
"""


def test_peak_memory_is_that_of_the_lap():
    """In a process of its own: what other tests leave to the allocator and to the garbage collector is none of it."""
    memory = timer.Memory(CPU)
    memory.start()
    if memory.peaks is None:
        pytest.skip("this system has no resettable high-water mark")
    run = subprocess.run([sys.executable, "-c", TWO_LAPS], cwd=ROOT, capture_output=True, text=True, check=True)
    first, second, *result_bytes = map(int, run.stdout.split())
    assert first == pytest.approx(80e6, abs=4e6)
    assert second == pytest.approx(20e6, abs=4e6)
    assert result_bytes == [20_000_000] * 2


def test_samples_are_taken_in_turn():
    calls = []
    actions = {name: (lambda lap, name=name: calls.append(name) or []) for name in ("a", "b")}
    seen = {name: timer.Observation([[1.0]], None, 0) for name in actions}
    timer.interleave(actions, seen, budget=1.0, device=CPU)
    assert calls == ["a", "b"] * 2  # and the one that was observed
    assert all(len(s.samples) == 3 for s in seen.values())


def test_caches_are_emptied_for_the_cold_samples_alone(monkeypatch):
    events = []
    monkeypatch.setattr(timer, "_cache", lambda device: events.append("cold") or torch.empty(1))
    seen = {"a": timer.Observation([[1e-3]], None, 0)}
    timer.interleave({"a": lambda lap: events.append("call") or []}, seen, budget=1e-9, device=CPU)
    warm, cold = events[: events.index("cold")], events[events.index("cold") :]
    assert set(warm) == {"call"} and len(seen["a"].samples) == 3
    assert cold == ["cold", "call"] * timer.OTHER_SAMPLES and len(seen["a"].other) == timer.OTHER_SAMPLES


@pytest.mark.parametrize(
    ("seconds", "warm_up", "calls"), [(0.1, False, [False, False]), (20.0, False, [False]), (20.0, True, [True])]
)
def test_a_cold_call_counts_only_if_it_is_long(monkeypatch, seconds, warm_up, calls):
    asked = []

    def observe(action, device, warm_up):
        asked.append(warm_up)
        return timer.Observation([[seconds]], None, 0), []

    monkeypatch.setattr(timer, "observe", observe)
    timer.first(None, CPU, warm_up)
    assert asked == calls


# -- the picture --


def test_the_photograph_has_detail_at_every_size():
    for pixels in (64, 512, 1024):
        picture = image.photograph(pixels)
        assert picture.shape == (pixels, pixels, 3)
        assert picture.min() >= 0
        assert picture.max() <= 1
        assert picture.std() > 0.2
    q, k, v = image.inputs("operator", 64)
    assert q.shape == k.shape == v.shape == (1, 16, 1024)
    assert not torch.equal(q, k)
    image.inputs.cache_clear()
    assert torch.equal(q, image.inputs("operator", 64)[0])


def test_what_repeats_in_a_large_picture_is_projected_once(monkeypatch):
    (large,) = image.inputs("layer", 2048)
    monkeypatch.setattr(image, "PERIOD", 1 << 20)
    image.inputs.cache_clear()
    torch.testing.assert_close(large, image.inputs("layer", 2048)[0], rtol=0, atol=1e-4)
    image.inputs.cache_clear()

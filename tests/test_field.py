"""The benchmark against the field: the order of its points, what they become, and what survives one that fails."""

import json
import os
import signal

import pytest
import torch
from field_rows_made import ENVIRONMENT, row

from bench import field, field_rows, peers, point
from bench.worker import Worker

CPU = torch.device("cpu")


# -- the plan --


def test_points_come_in_the_order_of_their_worth():
    names = ["linear_infsa", "softmax", "mlla", "mlla+local"]
    points = field.plan("layer", names, [2048, 224, 1024], "cpu")
    found = [(p["name"], p["pixels"], p["phase"], p["way"]) for p in points]
    assert len(set(found)) == len(found) == 6 * (4 + 1 + 3)  # eager; softmax by its math; the peers compiled
    assert found[:4] == [("linear_infsa", 224, "fwd", "eager"), ("softmax", 224, "fwd", "eager"),
                         ("softmax", 224, "fwd", "sdpa:math"), ("mlla", 224, "fwd", "eager")]  # fmt: skip
    assert found.index(("mlla", 2048, "train", "eager")) < found.index(("mlla", 1024, "fwd", "compile"))
    assert found.index(("mlla", 1024, "train", "compile")) < found.index(("mlla+local", 224, "fwd", "eager"))
    assert found.index(("mlla+local", 2048, "train", "eager")) < found.index(("mlla", 224, "fwd", "compile"))
    assert not [f for f in found if f[0] == "linear_infsa" and f[3] == "compile"]
    assert {p["way"] for p in field.plan("layer", names, [224], "cpu", compiled=False)} == {"eager", "sdpa:math"}
    cuda = {p["way"] for p in field.plan("operator", ["softmax"], [224], "cuda")}
    assert cuda == {"eager", "compile", "sdpa:flash", "sdpa:efficient", "sdpa:cudnn", "sdpa:math"}


def test_models_are_the_papers_two_depths_from_small_to_large():
    points = field.plan("model", ["linear_infsa", "softmax"], [1024, 224], "cpu")
    assert {(p["depth"], p["pixels"], p["phase"], p["way"]) for p in points} == {
        (depth, pixels, phase, "eager") for depth in (4, 24) for pixels in (224, 1024) for phase in ("fwd", "train")
    }
    assert (points[0]["depth"], points[0]["pixels"], points[0]["phase"]) == (4, 224, "fwd")
    assert (points[-1]["depth"], points[-1]["pixels"], points[-1]["phase"]) == (24, 1024, "train")


def test_minutes_bound_the_whole_field():
    assert sum(field.MINUTES["cpu"].values()) < 20
    assert sum(field.MINUTES["cuda"].values()) < 10


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["layer", "--only", "lunch"], "no mechanism lunch"),
        (["layer", "--sizes", "100"], "multiple of 16"),
        (["all"], "'all'"),
    ],
)
def test_wrong_arguments_are_refused(arguments, said, capsys):
    with pytest.raises(SystemExit):
        field.parse(arguments)
    assert said in capsys.readouterr().err


# -- what a smaller picture tells --


def test_what_would_take_too_long_is_not_tried():
    def why(smaller, limit=10, **fields):
        return field.too_long(row(smaller["name"], pixels=2048, level=smaller["level"], **fields), [smaller], limit)

    # 16 times as long for four times as many tokens if quadratic, 4 times if not.
    assert "~16 s" in why(row("softmax", level="operator", median_s=1.0))
    assert why(row("mlla", median_s=1.0)) is None
    assert "~8 s" in why(row("mlla", median_s=2.0))
    # With projections, 4 N D (2 D + N): 4 x 18 / 6 from 4,096 tokens to 16,384.
    assert "~12 s" in why(row("softmax", median_s=1.0))
    assert why(row("softmax", status="out of memory")) == "out of memory at 1024 pixels"
    assert why(row("softmax", status="unsupported")) is None
    assert why(row("softmax", phase="train", median_s=9.0)) is None  # another measurement
    assert field.too_long(row("softmax", pixels=1024), [row("softmax", pixels=1024, median_s=99.0)], 1) is None


# -- a worker --


def test_a_death_and_a_time_limit_are_rows_and_the_next_point_is_measured():
    tiny = {
        "level": "operator",
        "device": "cpu",
        "dtype": "fp32",
        "name": "mean",
        "pixels": 112,
        "phase": "fwd",
        "way": "eager",
    }
    with Worker("cpu", 0.001) as worker:
        assert worker.environment["device_type"] == "cpu"
        assert worker.measure(tiny, 60)["status"] == "ok"
        late = worker.measure(tiny | {"pixels": 8192}, 0.05)
        assert (late["status"], late["name"]) == ("time limit", "mean")
        worker.measure(tiny, 60)
        os.kill(worker._process.pid, signal.SIGKILL)
        assert worker.measure(tiny, 60)["status"] == "out of memory"
        assert worker.measure(tiny, 60)["status"] == "ok"
        os.kill(worker._process.pid, signal.SIGTERM)
        assert worker.measure(tiny, 60)["reason"] == "its process ended with code -15"


def test_a_worker_that_does_not_start_says_so(tmp_path):
    with pytest.raises(RuntimeError, match="did not start"), Worker("cpu", 0.001, tmp_path):
        pass


# -- points, in this process --


@pytest.mark.parametrize("phase", ["fwd", "train"])
@pytest.mark.parametrize("level", ["operator", "layer", "model"])
def test_every_level_measures_and_checks(level, phase):
    base = {"level": level, "device": "cpu", "dtype": "fp32", "pixels": 112, "phase": phase, "way": "eager"}
    for name in ("linear_infsa", "pure_infsa", "agent"):
        found = point.measure({**base, "name": name, **({"depth": 4} if level == "model" else {})}, CPU, 1e-3, dim=64)
        assert found["status"] == "ok", found
        assert 0 < found["p20_s"] <= found["median_s"] <= found["p80_s"]
        assert found["error"] <= found["bound"]
        assert ("gradient_error" in found) == (phase == "train" and level != "model")
        assert ("backward_s" in found) == (phase == "train")
        assert ("baseline_s" in found) == (level != "model" and name != "linear_infsa")
        assert found["parameters"] > 0
        assert "joules" not in found


def test_float64_does_not_need_the_backend_under_test(monkeypatch):
    right, math_allowed = peers.Softmax.core, {}

    def core(self, q, k, v):
        math_allowed.setdefault(q.dtype, torch.backends.cuda.math_sdp_enabled())
        return right(self, q, k, v)

    monkeypatch.setattr(peers.Softmax, "core", core)
    base = {"level": "layer", "device": "cpu", "dtype": "fp32", "pixels": 112, "phase": "train", "name": "softmax"}
    assert point.measure({**base, "way": "sdpa:flash"}, CPU, 1e-3, dim=64)["status"] == "ok"
    assert math_allowed == {torch.float64: True, torch.float32: False}


def test_a_wrong_mechanism_gets_no_time(monkeypatch):
    right = peers.MLLA.core
    monkeypatch.setattr(peers.MLLA, "truth", lambda self, q, k, v, rows: right(self, q, k, v)[:, :, rows] * 1.01)
    base = {"level": "layer", "device": "cpu", "dtype": "fp32", "pixels": 112, "phase": "fwd", "way": "eager"}
    found = point.measure({**base, "name": "mlla"}, CPU, 1e-3, dim=64)
    assert found["status"] == "wrong"
    assert "median_s" not in found


def test_what_does_not_run_here_says_why():
    base = {"level": "layer", "device": "cpu", "dtype": "fp32", "pixels": 112, "phase": "fwd"}
    found = point.measure({**base, "name": "gated_deltanet", "way": "eager"}, CPU, 1e-3, dim=64)
    assert (found["status"], "GPU" in found["reason"]) == ("unsupported", True)


# -- a run: rows are appended, and not measured twice --


asked = []


class FakeWorker:
    environment = ENVIRONMENT

    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def measure(self, point, limit):
        asked.append(point)
        ok = {"status": "ok", "median_s": 1e-3, "p20_s": 1e-3, "p80_s": 1e-3, "samples": 3, "parameters": 1}
        return {**point, **({"status": "time limit", "reason": "slow"} if point["name"] == "softmax" else ok)}


def test_a_run_is_resumed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(field, "Worker", FakeWorker)
    words = "layer --only mean,softmax --sizes 224,512 --device cpu --quick --out"
    arguments = [*words.split(), str(tmp_path)]

    def measured(*more):
        asked.clear()
        assert field.main([*arguments, *more]) == 0
        return len(asked)

    assert measured("--minutes", "0.001") == 0
    path = tmp_path / "rows.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert {r["status"] for r in rows} == {"not reached"}
    assert measured("--minutes", "0.1") == 12  # the fake's time limits came before the points' own
    assert {r["status"] for r in field_rows.load(path) if r["name"] == "softmax"} == {"not reached"}
    # Two passes of softmax and of softmax by its math; not tried where a smaller picture took too long.
    assert measured() == 4
    assert "Mean pooling" in capsys.readouterr().out
    loaded = field_rows.load(path)
    assert len(loaded) == len({field_rows.key(r) for r in loaded}) == 12
    assert {r["reason"] for r in loaded if r["status"] == "time limit"} == {"slow", "time limit at 224 pixels"}
    assert measured() == 0
    assert measured("--again") == 8
    monkeypatch.setattr(FakeWorker, "environment", ENVIRONMENT | {"commit": "def"})
    assert measured() == 8

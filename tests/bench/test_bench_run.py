"""What the benchmark plans, how it runs it, and what survives one that fails."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from helpers.bench_rows import ENVIRONMENT, row, turn

from bench import __main__ as bench
from bench import cases, engine, machine, peers, rows, run
from bench.worker import Worker

# -- the plan --


def flat(plan):
    return [(name, t["pixels"], t["phase"], t["way"]) for t in plan for name in t["names"]]


def test_turns_come_in_the_order_of_their_worth():
    found = flat(cases.everything("layer", "cpu"))
    assert len(set(found)) == len(found)
    assert [f[0] for f in found[:3]] == ["linear_infsa", "pure_infsa", "softmax"]
    assert found[0][1:] == (224, "fwd", "eager")
    assert found.index(("mlla", 2048, "train", "eager")) < found.index(("mlla", 1024, "fwd", "compile"))
    assert found.index(("mlla", 1024, "train", "compile")) < found.index(("mlla+local", 224, "fwd", "eager"))
    assert found.index(("mlla+local", 2048, "train", "eager")) < found.index(("mlla", 224, "fwd", "compile"))
    assert not [f for f in found if f[0] == "linear_infsa" and f[3] == "compile"]
    assert {f[3] for f in flat(cases.everything("layer", "cpu", quick=True))} == {"eager"}
    cuda = {f[0] for f in flat(cases.everything("operator", "cuda")) if f[0].startswith("sdpa")}
    assert cuda == {"sdpa_flash", "sdpa_efficient", "sdpa_cudnn", "sdpa_math"}


def test_models_are_the_papers_two_depths_from_small_to_large():
    plan = cases.everything("model", "cpu")
    mine = [t for t in plan if t["pixels"] in (224, 1024) and t["names"][0] in ("linear_infsa", "softmax")]
    assert {(t["depth"], t["pixels"], t["phase"], t["way"]) for t in mine} == {
        (depth, pixels, phase, "eager") for depth in (4, 24) for pixels in (224, 1024) for phase in ("fwd", "train")
    }
    assert (mine[0]["depth"], mine[0]["pixels"], mine[0]["phase"]) == (4, 224, "fwd")
    assert (mine[-1]["depth"], mine[-1]["pixels"], mine[-1]["phase"]) == (24, 1024, "train")


def test_every_mechanism_of_the_related_papers_has_its_turn_on_every_machine():
    for device in ("cpu", "cuda"):
        found = {
            n for level in cases.LEVELS for t in cases.everything(level, device) for n in (*t["names"], *t["anchors"])
        }
        assert set(peers.MECHANISMS) <= found


def test_minutes_bound_the_whole_benchmark():
    assert all(minutes["main"] <= 3 for minutes in cases.MINUTES.values())
    assert sum(cases.MINUTES["cpu"].values()) - 3 <= 30
    assert sum(cases.MINUTES["cuda"].values()) - 3 <= 12


def test_the_main_figures_are_few():
    found = [(n, t["level"], t["pixels"], t["phase"]) for t in cases.main("cpu") for n in t["names"]]
    assert len(set(found)) == len(found) <= 80
    assert {f[1] for f in found} == set(cases.LEVELS)
    assert set(peers.PAPER) <= {f[0] for f in found if f[1] == "layer"}


def test_goals_of_a_gpu_are_all_in_its_plan():
    from bench import goals

    plan = cases.goals("cuda")
    for goal in goals.GPU:
        for name, more in ((goal.case["name"], {}), (goal.other, goal.other_case or {})):
            case = goal.case | more
            fit = [
                t
                for t in plan
                if all(t.get(f) == v for f, v in case.items() if f != "name") and goal.which in engine.passes(t)
            ]
            assert name in {n.partition("@")[0] for t in fit for n in t["names"]}, goal.what


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "lunch"], "no lunch; there are linear_infsa"),
        (["--sizes", "100"], "multiple of 16"),
        (["--level", "all"], "no all; there are operator"),
        (["--way", "slow"], "no slow"),
        (["--depth", "7"], "no 7; there are 4, 24"),
    ],
)
def test_wrong_arguments_are_refused(arguments, said, capsys):
    with pytest.raises(SystemExit):
        bench.parse(arguments)
    assert said in capsys.readouterr().err


# -- what a smaller picture tells --


def test_what_would_take_too_long_is_not_tried():
    def why(smaller, limit=10, **fields):
        case = smaller | {"pixels": 2048, "phase": "fwd"} | fields
        return cases.too_long(case, smaller["name"], [smaller], limit)

    # 16 times as long for four times as many tokens if quadratic, 4 times if not.
    assert "~16 s" in why(row("softmax", level="operator", median_s=1.0))
    assert why(row("mlla", median_s=1.0)) is None
    assert "~8 s" in why(row("mlla", median_s=2.0))
    # With projections, 4 N D (2 D + N): 4 x 18 / 6 from 4,096 tokens to 16,384.
    assert "~12 s" in why(row("softmax", median_s=1.0))
    assert why(row("softmax", status="out of memory")) == "out of memory at 1024 pixels"
    assert why(row("softmax", status="unsupported")) is None
    assert why(row("softmax", which="train", median_s=9.0)) is None  # another measurement
    assert why(row("softmax", median_s=9.0), dtype="bf16") is None
    assert why(row("softmax", median_s=99.0), pixels=1024) is None


# -- a worker --


def test_a_death_and_a_time_limit_are_rows_and_the_rest_is_measured():
    with Worker("cpu", 0.001) as worker:
        assert worker.environment["device_type"] == "cpu"
        (found,) = worker.measure(turn("mean"), 60)
        assert found["status"] == "ok"
        assert 0 <= found["other_load"] <= 1  # the worker knows its own: the one that works
        (late,) = worker.measure(turn("mean", pixels=8192), 0.05)
        assert (late["status"], late["name"]) == ("time limit", "mean")
        for number, status, reason in (
            (signal.SIGTERM, "unsupported", "code -15"),
            (signal.SIGKILL, "out of memory", "killed"),
        ):

            def kill(name):
                if name == "linformer":
                    os.kill(worker._process.pid, number)

            found = {r["name"]: r for r in worker.measure(turn("mean", "linformer"), 60, kill)}
            assert (found["linformer"]["status"], found["mean"]["status"]) == (status, "ok")
            assert reason in found["linformer"]["reason"]
        (over,) = worker.measure(turn("mean"), 60, end=time.monotonic())
        assert over["status"] == "not reached"


def test_a_worker_that_does_not_start_says_so(tmp_path):
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "__init__.py").touch()
    with pytest.raises(RuntimeError, match=r"did not start[^$]*No module named"), Worker("cpu", 0.001, tmp_path):
        pass


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

    def measure(self, turn, limit, tell=None, end=None):
        asked.extend((name, turn["pixels"], turn["phase"]) for name in turn["names"])
        ok = {
            "status": "ok",
            "other_load": 0.25,
            "median_s": 1e-3,
            "p20_s": 1e-3,
            "p80_s": 1e-3,
            "samples": 3,
            "parameters": 1,
        }
        slow = {"status": "time limit", "reason": "slow"}
        return [engine.blank(turn, name, which) | (slow if name == "softmax" else ok)
                for name in turn["names"] for which in engine.passes(turn)]  # fmt: skip


def test_a_run_is_resumed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(run, "Worker", FakeWorker)
    words = "--level layer --only mean,softmax --sizes 224,512 --device cpu --quick --out"
    arguments = [*words.split(), str(tmp_path)]

    def measured(*more):
        asked.clear()
        assert bench.main([*arguments, *more]) == 0
        return len(asked)

    assert measured("--minutes", "0.001") == 0
    path = tmp_path / "rows.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert {r["status"] for r in found} == {"not reached"}
    # Two passes of both at 224, and of the one that is not too slow at 512.
    assert measured() == 6
    assert "Mean pooling" in capsys.readouterr().out
    loaded = rows.load(path)
    assert {r["environment"]["other_load"] for r in loaded if r["status"] == "ok"} == {0.25}
    assert not any("other_load" in r for r in loaded)
    assert len(loaded) == len({rows.key(r) for r in loaded}) == 12
    assert {r["reason"] for r in loaded if r["status"] == "time limit"} == {"slow", "time limit at 224 pixels"}
    assert measured() == 0
    assert measured("--again") == 6
    monkeypatch.setattr(FakeWorker, "environment", ENVIRONMENT | {"commit": "def"})
    assert measured() == 6


def test_a_plan_is_listed_without_measuring(tmp_path, capsys):
    assert bench.main(["--all", "--quick", "--plan", "--device", "cpu", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    for level in cases.LEVELS:
        assert re.search(rf"^{level}: \d+ turns of \d+ rows, at most 1.5 minutes$", said, re.M)
    assert "\n  layer 224² x1 fwd eager: linear_infsa, pure_infsa, softmax," in said
    assert not list(tmp_path.iterdir())


def test_a_new_measurement_ends_with_one_screen(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(run, "Worker", FakeWorker)
    assert bench.main(["--device", "cpu", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert "What limits what" in said.out
    assert "Linear-InfSA, operator, N = 4,096" in said.out
    assert str(tmp_path / "report.html") in said.out
    assert len(said.out.splitlines()) <= 50
    assert max(map(len, said.out.splitlines())) <= 170
    assert re.search(r"0:00 of at most 3 minutes gone, .* left  1/\d+ operator 1024² x1 fwd eager", said.err)


def test_a_tiny_run_from_end_to_end(tmp_path):
    """The command itself, in its own process and with its worker: rows, plots, table and page."""
    words = "--level operator --only linear_infsa,mean --sizes 112 --phase fwd --device cpu --budget 0.001 --out"
    command = [sys.executable, "-m", "bench", *words.split(), str(tmp_path)]
    done = subprocess.run(
        command, cwd=machine.ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert {r["status"] for r in rows.load(tmp_path / "rows.jsonl")} == {"ok"}
    written = {p.name for p in tmp_path.iterdir()}
    assert {"rows.jsonl", "table.txt", "report.html", "operator_speed_up.png"} <= written
    assert "Linear-InfSA" in (tmp_path / "table.txt").read_text()
    assert "WRONG" not in done.stdout

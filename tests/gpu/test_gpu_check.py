"""`make gpu-check`, without a GPU: every part of it runs on the CPU in Triton's interpreter, and its arithmetic is checked."""

import json
import os
import subprocess
import sys

import pytest
from helpers.bench_rows import row
from helpers.interpreter import needs_interpreter

from bench import goals, gpu_check, machine, rows


def python(*arguments):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *map(str, arguments)]
    return subprocess.run(command, env=environment, cwd=machine.ROOT, capture_output=True, text=True)


@needs_interpreter
@pytest.mark.sweep
def test_a_dry_run_passes_every_part_and_ends_with_the_table(tmp_path):
    run = python("bench.gpu_check", "--dry-run", "--out", tmp_path)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    found = json.loads((tmp_path / "tests.json").read_text())
    assert found == {"gpu_kernels": {"passed": True, "tests": "8 passed"}}
    assert {r["status"] for r in rows.load(tmp_path / "rows.jsonl")} == {"ok"}
    assert json.loads((tmp_path / "tune.json").read_text())["best"]
    assert {line[0] for line in run.stdout.splitlines()[-len(goals.GPU) :]} == set("123456789")
    assert run.stdout.splitlines()[-1].startswith("10 Pooled layer")
    assert (tmp_path / "operator_roofline.png").exists()


def test_what_was_found_wrong_makes_the_whole_fail(tmp_path, capsys):
    found = {"tables": {"passed": True, "tests": "3 passed"}}
    wrong = gpu("linear_infsa@cuda", 1.0) | {"status": "wrong", "reason": "far off"}
    for tests, lines, code in (
        (found, [gpu("linear_infsa@cuda", 1.0)], 0),
        (found, [wrong], 1),
        (found | {"masks": {"passed": False, "tests": "1 failed"}}, [], 1),
    ):
        (tmp_path / "tests.json").write_text(json.dumps(tests))
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert gpu_check.report(tmp_path) == code
    said = capsys.readouterr().out
    assert "WRONG: linear_infsa@cuda N=65536 fwd: far off" in said
    assert "tests of masks                FAILED: 1 failed" in said


def test_it_says_what_is_missing(tmp_path):
    pytest.importorskip("triton")
    assert "no part lunch" in python("bench.gpu_check", "--parts", "lunch", "--out", tmp_path).stderr


def test_it_needs_no_package_that_a_lent_machine_lacks():
    pytest.importorskip("triton")
    code = """
import sys
for name in ("rich", "tqdm", "skimage", "hypothesis", "packaging"):
    sys.modules[name] = None
import bench.gpu_check, bench.tune, infsa_kernels.triton.linear, infsa_kernels.triton.pure
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=machine.ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def gpu(name, seconds, pixels=4096, which="fwd", **fields):
    heads = {"H": 16, "d": 64} if name.startswith("pure") else {"H": 64, "d": 16}
    facts = {"environment": {"device_type": "cuda"}, "way": "graph", "device": "cuda", "dtype": "bf16", **heads}
    return row(name, pixels, which, level="operator", median_s=seconds, **{**facts, **fields})


def test_goals_from_synthetic_times():
    found = [gpu("linear_infsa@triton", 3.0), gpu("linear_infsa@cuda", 2.0), gpu("linear_infsa_untied@cuda", 3.0),
             gpu("read", 1.0), gpu("read_qkv", 3.0), gpu("linear_plain", 8.0), gpu("linear_plain", 3.0, way="compile"),
             gpu("linear_infsa@triton", 5.0, which="bwd"), gpu("clone", 4.0, which="bwd"), gpu("clone", 4.0),
             gpu("gemm", 1.0, flops_per_s=8e14), gpu("launch", 1e-6),
             gpu("linear_infsa@triton", 4.0, 224, batch=32), gpu("linear_infsa@cuda", 2.0, 224, batch=32),
             gpu("launch", 1.0, 224, batch=32)]  # fmt: skip
    by_name = {g["goal"]: g for g in goals.compare(found)}
    # The faster of our backends counts.
    tied = by_name["1 Linear forward tied / read, N=65536 x1"]
    assert (tied["value"], tied["reached"]) == (2.0, False)
    untied = by_name["2 Linear forward untied / read, N=65536 x1"]
    assert (untied["value"], untied["reached"]) == (1.0, True)
    assert by_name["4 Linear forward: plain / ours, N=65536 x1"]["value"] == 4.0
    assert by_name["4 Linear forward: compiled / ours, N=65536 x1"]["value"] == 1.5
    # Q, V read and dQ, dV written, and Q read again: 5 units, of which a clone of Q and V moves 4.
    assert by_name["5 Linear backward tied / copy of its bytes, N=65536"]["value"] == 1.0
    assert by_name["6 Pure forward / GEMM rate, N=16384 x1"]["value"] is None
    assert gpu_check.ratios(found) == {
        "linear_infsa fwd, N=65536 x1: CUDA / Triton": 2 / 3,
        "linear_infsa fwd, N=196 x32: CUDA / Triton": 0.5,
        "linear_infsa@triton fwd, N=196 x32: time / empty launch": 4.0,
        "linear_infsa@cuda fwd, N=196 x32: time / empty launch": 2.0,
    }

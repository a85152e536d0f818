"""`make gpu-check`, without a GPU: every part of it runs on the CPU in Triton's interpreter, and its arithmetic is checked."""

import json
import os
import subprocess
import sys

import pytest
from interpreter import needs_interpreter

from bench import gpu_goals, machine, roofline

CEILINGS = {"launch": 2e-6, "read": 4e12, "copy": 4e12, "gemm": 8e14}


def python(*arguments):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *map(str, arguments)]
    return subprocess.run(command, env=environment, cwd=machine.ROOT, capture_output=True, text=True)


@needs_interpreter
def test_a_dry_run_passes_every_part_and_ends_with_the_table(tmp_path):
    run = python("bench.gpu_check", "--dry-run", "--out", tmp_path)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    results = json.loads((tmp_path / "results.json").read_text())
    from bench.gpu_check import PARTS

    assert set(results["parts"]) == set(PARTS)
    for name in ("agreement", "repeatability", "large", "devices", "suite"):
        assert results["parts"][name]["passed"] is True, results["parts"][name]
    # What raises in a part that measures is there too, as a failed part.
    assert not [name for name, part in results["parts"].items() if part.get("passed") is False]
    assert {g["goal"][0] for g in results["goals"]} == set("123456789")
    assert run.stdout.splitlines()[-1].startswith("9 Pure forward")
    assert (tmp_path / "roofline.png").exists()

    # What is there is not run again; a part that fails makes the whole fail.
    broken = results["parts"]["large"] | {"passed": False, "wrong": ["pure: huge strides"]}
    (tmp_path / "large.json").write_text(json.dumps(broken))
    again = python("bench.gpu_check", "--dry-run", "--out", tmp_path)
    assert again.returncode == 1
    assert "pure: huge strides" in again.stdout


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


def test_floors_by_hand():
    # 65536 tokens of 64 heads of 16 in bfloat16 are 2^27 bytes.
    sizes = 1, 64, 65536, 16, 2, CEILINGS
    tokens = 2**27
    assert roofline.floor("linear", "fwd", True, *sizes) == pytest.approx(2 * tokens / 4e12, rel=1e-4)
    assert roofline.floor("linear", "bwd", False, *sizes) == pytest.approx(6 * tokens / 4e12, rel=1e-4)
    sizes = 2, 16, 4096, 64, 2, CEILINGS
    products = 4 * 2 * 4096**2 * 1024 / 8e14
    assert roofline.floor("pure", "fwd", True, *sizes) == pytest.approx(products)
    assert roofline.floor("pure", "bwd", True, *sizes) == pytest.approx(2.5 * products)
    assert roofline.predict("pure", "bwd", False, *sizes) > 1.4 * 2.5 * products
    # At 197 tokens nothing but the one launch counts.
    assert roofline.predict("linear", "fwd", True, 1, 64, 197, 16, 2, CEILINGS) == pytest.approx(2e-6, rel=0.2)


def test_goals_from_synthetic_times():
    row = {
        "N": 65536,
        "B": 1,
        "tied": 2.0,
        "untied": 3.0,
        "read tied": 1.0,
        "read untied": 3.0,
        "eager": 8.0,
        "compiled": 3.0,
    }
    row |= {"bwd tied": 5.0, "copy tied": 4.0, "launch": 1.0}
    parts = {"ceilings": CEILINGS, "linear": {"rows": [row]}}
    by_name = {g["goal"]: g for g in gpu_goals.compare(parts)}
    tied = by_name["1 Linear forward tied / read, N=65536 x1"]
    assert (tied["value"], tied["reached"]) == (2.0, False)
    untied = by_name["2 Linear forward untied / read, N=65536 x1"]
    assert (untied["value"], untied["reached"]) == (1.0, True)
    # Q, V read and dQ, dV written, and Q read again: 5 units, of which a clone of Q and V moves 4.
    assert by_name["5 Linear backward tied / copy of its bytes, N=65536"]["value"] == 1.0
    assert by_name["6 Pure forward / GEMM rate, N=16384 x1"]["value"] is None
    by_backend = {"triton": {"tied": 4.0, "untied": None}, "cuda": {"tied": 2.0, "untied": 3.0}}
    small = {"N": 197, "B": 32, "launch": 1.0, "backends": by_backend}
    ratios = {r["what"]: r["value"] for r in gpu_goals.ratios({"linear": {"rows": [small, row]}})}
    assert ratios == {
        "linear tied: CUDA / Triton, N=197 x32": 0.5,
        "linear tied: triton / empty launch, N=197 x32": 4.0,
        "linear tied: cuda / empty launch, N=197 x32": 2.0,
    }
    found = gpu_goals.beside_the_floor(parts)
    assert [r["what"] for r in found] == [f"linear {n} N=65536 x1" for n in ("tied", "untied", "bwd tied")]
    assert 0 < found[0]["floor"] < 1

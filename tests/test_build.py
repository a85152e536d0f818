"""What setup.py decides before it compiles anything."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import infsa_kernels

ROOT = Path(__file__).parent.parent
without_cuda = pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is a CUDA build")


def setup(*arguments, **environment):
    clean = {k: v for k, v in os.environ.items() if k not in ("FORCE_CUDA", "INFSA_NO_EXT", "CUDA_HOME", "PYTHONPATH")}
    return subprocess.run(
        [sys.executable, "setup.py", *arguments], cwd=ROOT, env=clean | environment, capture_output=True, text=True, timeout=120
    )  # fmt: skip


def test_pure_python_wheels_carry_the_plain_version():
    assert setup("--version", INFSA_NO_EXT="1").stdout.split()[-1] == infsa_kernels.__version__


def test_compiled_wheels_name_their_torch():
    major, minor = torch.__version__.split(".")[:2]
    version = setup("--version", FORCE_CUDA="0").stdout.split()[-1]
    assert version == f"{infsa_kernels.__version__}+torch{major}.{minor}.cpu"


@without_cuda
def test_cuda_is_never_left_out_silently():
    outcome = setup("--version", FORCE_CUDA="1")
    assert outcome.returncode == 1
    (line,) = [line for line in outcome.stderr.splitlines() if "infsa_kernels" in line]
    assert "FORCE_CUDA=1 asks for CUDA kernels" in line and "is not a CUDA build" in line


def test_unknown_value():
    outcome = setup("--version", FORCE_CUDA="yes")
    assert outcome.returncode == 1
    assert "FORCE_CUDA is 'yes', expected 1, 0 or nothing" in outcome.stderr

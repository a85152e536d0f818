"""A user's script under `mypy --strict`: the package has types, they are right, and what is public is exported."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

import infsa_kernels

# An unused "type: ignore" is an error: these lines have to be wrong, so none of the types may be Any.
SCRIPT = """
from typing_extensions import assert_type

import torch
from torch import Tensor, nn

import infsa_kernels
from infsa_kernels import infsa_attention, linear_infsa, linear_infsa_scores, pooled_linear_infsa, pure_infsa
from infsa_kernels.nn import ConversionReport, InfSAAttention, InfViT, NeumannSum, convert, infvit_linear_4l

q, rho = torch.randn(1, 2, 8, 4), nn.Parameter(torch.full((2,), 0.95))
assert_type(linear_infsa(q, q, q, rho=rho) + pure_infsa(q, q, q, 0.95, eps=1e-6), Tensor)
assert_type(infsa_attention(q, q, q, variant="linear_infsa") * linear_infsa_scores(q, q).sum(), Tensor)
assert_type(pooled_linear_infsa(torch.randn(1, 5, 8), 2, *torch.randn(3, 8, 8).unbind(), norm_eps=1e-6), Tensor)
linear_infsa(q, q, q, rho="0.95")  # type: ignore[arg-type]
with infsa_kernels.backend("cpu"):
    z: Tensor = torch.ops.infsa.linear(q, q, q)
assert_type(infsa_kernels.choose_backend("pure", q.device, q.dtype, q.shape), str)
attention = InfSAAttention(8, 2, batch_first=True, variant="linear_infsa")
InfSAAttention(8, "2")  # type: ignore[arg-type]
y, _ = attention(torch.randn(2, 3, 8))
assert_type(convert(nn.MultiheadAttention(8, 2), variant="pure_infsa"), ConversionReport)
model: nn.Module = convert(nn.MultiheadAttention(8, 2), variant="pure_infsa").model
assert_type(infvit_linear_4l(num_classes=10), InfViT)
total = NeumannSum(num_layers=4)([y] * 4)
"""


@pytest.mark.sweep
def test_a_users_script_is_clean_under_strict_mypy(request):
    """What mypy learns about torch is kept between runs: without it this takes a quarter of a minute."""
    folder = request.config.cache.mkdir("mypy")
    (folder / "user.py").write_text(SCRIPT)
    outcome = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--cache-dir", "cache", "user.py"],
        # A folder that Python itself was given counts as installed: its types are used and its code is not checked.
        cwd=folder, env={**os.environ, "PYTHONPATH": str(Path(infsa_kernels.__file__).parent.parent)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr


def test_public_functions_are_annotated_throughout():
    functions = [f for f in (getattr(infsa_kernels, name) for name in infsa_kernels.__all__) if inspect.isfunction(f)]
    for function in functions:
        signature = inspect.signature(function)
        kinds = [parameter.annotation for parameter in signature.parameters.values()]
        assert inspect.Signature.empty not in (*kinds, signature.return_annotation), function
    assert len(functions) == len(infsa_kernels.__all__) - 1, "all but the class backend"

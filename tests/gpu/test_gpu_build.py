"""The installed extension with its CUDA kernels, on a machine that needs no GPU: `make test-gpu-build`.

`PYTHONPATH=tests python -m helpers.cuda_resources` writes the table of registers, spills and shared memory anew.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import infsa_kernels
from infsa_kernels.ops.backends import explain_backend, runs_on

_C = pytest.importorskip("infsa_kernels._C", reason="no extension was built here (INFSA_NO_EXT=1)")
if not _C.cuda_arch_list:
    pytest.skip("this build has no CUDA kernels; `make test-gpu-build` makes one", allow_module_level=True)

from helpers.cuda_resources import committed, compiler, compiler_of_table, generation, measured  # noqa: E402

# Instructions that a row of forward's passes may take.
BUDGETS = {"energy": 55, "score": 65}

ARCHITECTURES = _C.cuda_arch_list.split(",")
MAY_RUN = {
    "8.0": [(8, 0), (8, 6), (8, 9)],
    "9.0a": [(9, 0)],
    "10.0": [(10, 0), (10, 3)],
    "12.0+PTX": [(12, 0), (13, 0)],
}


def test_it_is_the_installed_package():
    assert Path(infsa_kernels.__file__).parent.parent != Path(__file__).parent.parent


def test_kernels_are_registered_for_the_raw_operators():
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    assert all(has(f"infsa::{op}_{way}", "CUDA") for op in ("linear", "linear_floor") for way in ("fwd", "bwd"))
    assert not torch.cuda.is_initialized()


def test_bad_input_is_refused_before_anything_else():
    """By invariants that every backend shares, in few words; the tensors are the CPU's, so what comes after cannot run."""
    forward = torch.ops.infsa.linear_fwd.default
    on_gpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    q, v = torch.ones(1, 2, 3, 8), torch.ones(1, 2, 4, 8)
    for arguments, name, kind, what in (
        ((q, None, v, 1e-6), "v", ValueError, "shape"),
        ((q, v, v.double(), 1e-6), "v", TypeError, "dtype"),
        ((q, v, v, 0.0), "eps", ValueError, "value"),
    ):
        with pytest.raises(ValueError, match=f"^infsa::linear: {name}'s {what}"):  # the C interface knows no TypeError
            forward.redispatch(on_gpu, *arguments, 0.95, None, None, None)
        with pytest.raises(kind, match=f"^infsa::linear: {name} (has|is)"):  # what a caller reads
            forward(*arguments, 0.95, None, None, None)


def test_info_names_architectures_and_reasons():
    command = [sys.executable, "-m", "infsa_kernels.info"]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert f"CUDA kernels for {_C.cuda_arch_list}" in report
    assert "the tensors are on cpu, not on a GPU" in report
    gpu = torch.device("cuda", 0)
    reasons = {op: explain_backend(op, gpu, torch.float32, (1, 1, 1, 64)) for op in ("linear", "pure")}
    assert reasons["pure"]["cuda"] == "infsa::pure has no CUDA C++ kernels"
    if not torch.cuda.is_available():
        assert reasons["linear"]["cuda"] == "torch sees no GPU (torch.cuda.is_available() is False)"


@pytest.mark.parametrize("arch", MAY_RUN)
def test_which_gpus_an_architecture_runs_on(arch):
    capabilities = [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (13, 0)]
    assert [c for c in capabilities if runs_on(arch, c)] == MAY_RUN[arch]


@pytest.fixture(scope="module")
def found() -> list[dict[str, str]]:
    return measured()


def test_every_kernel_is_there(found):
    for arch in ARCHITECTURES:
        rows = [row for row in found if row["arch"] == f"sm_{arch.replace('.', '')}"]
        kinds = {"grid", "cluster"} if generation(rows[0]["arch"]) >= 90 else {"grid"}
        assert {row["kernel"] for row in rows} == kinds
        # 3 dtypes, aligned rows or any, forward and backward, with a floor and without.
        assert len(rows) == 24 * len(kinds)


def test_resources_are_those_of_the_table(found):
    if compiler() != compiler_of_table():
        pytest.skip(f"the table is of nvcc {compiler_of_table()}, this one is {compiler()}")
    compiled = {row["arch"] for row in found}
    assert found == [row for row in committed() if row["arch"] in compiled], (
        "run `PYTHONPATH=tests python -m helpers.cuda_resources` and read the difference"
    )


def test_nothing_spills(found):
    assert [row for row in found if any(int(row[c]) for c in ("stack", "local", "spills"))] == []


def test_two_blocks_of_256_threads_fit(found):
    """On a multiprocessor of 65536 registers."""
    assert max(int(row["regs"]) for row in found) <= 128


def test_a_row_takes_few_instructions(found):
    """On the way of whole groups without a mask: of them 16 bytes' 8 elements are widened twice, multiplied and added."""
    paper = [row for row in found if row["rows"] == "aligned" and row["floor"] == "no"]
    assert max(int(row["first"]) for row in paper if row["way"] == "fwd") <= BUDGETS["energy"]
    assert max(int(row["second"]) for row in paper if row["way"] == "fwd") <= BUDGETS["score"]


def test_instructions_that_matter(found):
    for row in found:
        aligned, cluster, backward = row["rows"] == "aligned", row["kernel"] == "cluster", row["way"] == "bwd"
        # Rows of 16 bytes at a time: q, k, v in; dq, dk, dv out.
        assert (int(row["loads"]) >= 3) == aligned, row
        assert (int(row["stores"]) >= 3) == (aligned and backward), row
        # A barrier after every pass's sums, in backward in two places, and one before a block leaves; or one of the whole grid.
        assert int(row["cluster"]) == (3 if cluster else 0), row
        assert int(row["atomics"]) == (0 if cluster else 1), row

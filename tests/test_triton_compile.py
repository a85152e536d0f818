"""What the Triton kernels compile to, for every architecture, without a GPU: against the committed table and its budgets.

`python tests/triton_resources.py` writes the table anew, for the Triton version at hand.
"""

import os

import pytest

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter does not compile", allow_module_level=True)

from triton_resources import ARCHITECTURES, Case, cases, read, rows  # noqa: E402

# Everything takes minutes on two cores; by default what the paper's heads use.
EVERYTHING = os.environ.get("INFSA_ALL_TRITON_CONFIGS") == "1"

VERSION, COMMITTED = read()


def chosen() -> list[Case]:
    return (
        cases()
        if EVERYTHING
        else [case for case in cases() if case.d <= 64 and not case.masked and case.dtype.itemsize == 2]
    )


@pytest.fixture(scope="module", params=ARCHITECTURES)
def compiled(request):
    return rows(request.param, chosen())


def test_table(compiled):
    if triton.__version__ != VERSION:
        pytest.skip(f"the table is of Triton {VERSION}, this is {triton.__version__}: budgets only")
    known = {(row["arch"], row["kernel"], row["case"]): row for row in COMMITTED}
    for row in compiled:
        assert row == known[row["arch"], row["kernel"], row["case"]], (
            "run `python tests/triton_resources.py` and read the difference"
        )


def test_budgets(compiled):
    assert compiled
    for row in compiled:
        check_budgets(row)


@pytest.mark.parametrize("row", COMMITTED, ids=lambda row: f"{row['arch']}-{row['kernel']}-{row['case']}")
def test_budgets_of_the_table(row):
    check_budgets(row)


def check_budgets(row: dict) -> None:
    products = row["kernel"].startswith("pure") and not row["kernel"].endswith(("rescale", "prepare"))
    assert int(row["spill"]) == 0
    assert int(row["per_SM"]) >= 1
    assert row["load"] in ("128", "tma")
    # IEEE float32 has no tensor cores on NVIDIA's GPUs.
    if products and "fp32" not in row["case"]:
        assert row["matrix"] != "-"
    if row["arch"] == "sm_90" and products and "/d64/" in row["case"] and "fp32" not in row["case"]:
        assert row["matrix"].startswith("HGMMA")
    if row["arch"] == "sm_90" and row["kernel"] == "pure_fwd" and row["case"] == "bf16/d64/N4096/tied":
        groups, instructions = map(int, row["async"].split("/"))
        assert int(row["per_SM"]) >= 2
        assert groups < instructions, "ptxas makes every product wait"
        assert int(row["regs"]) <= (128 if row["tile"].endswith("w8+tma") else 255)
    if row["kernel"].startswith("linear") and row["arch"] != "gfx942":
        # Tied, the backward pass hands one number per token and head from launch to launch, through shared memory.
        handed_over = row["kernel"].startswith("linear_bwd") and "/tied" in row["case"]
        assert int(row["barriers"]) <= (2 if handed_over else 0)

"""What the Triton kernels compile to on every architecture, without a GPU: against the committed table and against budgets.

`PYTHONPATH=tests python -m helpers.triton_resources` writes the table with the Triton at hand. Figures are compared with
a Triton of the table's version only; that no register spills, every matrix product uses the architecture's matrix instruction and
each budget holds is required of any version.
"""

from collections import defaultdict

import pytest

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter does not compile", allow_module_level=True)

import torch  # noqa: E402
from helpers.triton_resources import ARCHITECTURES, Call, compilations, read, rows  # noqa: E402

from infsa_kernels.triton import configs  # noqa: E402

# Every variant of every configuration takes five minutes on one core: `make test-all`. Otherwise those of the paper's heads, for
# one architecture, compile once.
COMPILED = [("sm_90", True)]
COMPILED += [pytest.param((arch, False), marks=pytest.mark.sweep) for arch in ARCHITECTURES]

VERSION, COMMITTED = read()
# Several for a kernel that both directions start, as linear_fold, with other arguments.
KNOWN = defaultdict(list)
for _row in COMMITTED:
    KNOWN[_row["arch"], _row["kernel"], _row["case"]].append(_row)


@pytest.fixture(scope="module", params=COMPILED, ids=str)
def compiled(request):
    arch, once = request.param
    return rows(arch, once)


def test_what_compiles_is_what_the_table_says(compiled):
    if triton.__version__ != VERSION:
        pytest.skip(f"the table is of Triton {VERSION} and this is {triton.__version__}: only the budgets are compared")
    for row in compiled:
        known = [{name: k[name] for name in row} for k in KNOWN[row["arch"], row["kernel"], row["case"]]]
        assert row in known, "run `PYTHONPATH=tests python -m helpers.triton_resources` and read the difference"


def test_budgets(compiled):
    assert compiled
    for row in compiled:
        check_budgets(row)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_budgets_of_the_table(arch):
    for row in (row for row in COMMITTED if row["arch"] == arch):
        assert "?" not in row.values()
        check_budgets(row)


def test_the_table_has_every_configuration():
    listed = {(row["arch"], row["kernel"], row["tile"]) for row in COMMITTED}
    for (arch, reads), kernels in configs.PURE.items():
        for kernel, tiles in kernels.items():
            for tile in tiles.values():
                described = "+tma" if reads == "descriptors" else ""
                shape = f"{tile.block_m}x{tile.block_n}/w{tile.num_warps}{described}"
                if triton.__version__ == VERSION or (arch, reads, kernel) != ("sm_90", "descriptors", "fwd"):
                    assert (arch, f"pure_{kernel}", shape) in listed


def _loads(row: dict[str, str]) -> list[list[str]]:
    """Widths in bits, and how many of each there are in a kernel's loop; not the copy engine's."""
    return [load.split(":") for load in row.get("loads", "-").split(",") if load[0].isdigit()]


def check_budgets(row: dict[str, str]) -> None:
    name = f"{row['arch']} {row['kernel']} {row['case']} {row['tile']}"
    assert int(row["spill"]) == 0, f"{name} spills registers"
    assert int(row["per_SM"]) >= 1, f"{name} does not fit on a multiprocessor"
    for known in KNOWN[row["arch"], row["kernel"], row["case"]]:
        assert row["matrix"] == known["matrix"], f"{name} has lost its matrix instruction: {row['matrix']}"
    products = row["kernel"].startswith(("pure", "central_query", "score_pool"))
    products = products and not row["kernel"].endswith(("rescale", "prepare", "rho"))
    # IEEE float32 has matrix instructions on AMD's GPUs only.
    if products and not row["case"].startswith("fp32"):
        assert row["matrix"] != "-", f"{name} multiplies without a matrix instruction"
    if row["arch"] == "sm_90" and products and row["case"].startswith(("bf16/d64", "fp16/d64")):
        assert row["matrix"] == "HGMMA", name
    if row["arch"] == "sm_90" and row["kernel"] == "pure_fwd" and row["case"].startswith(("bf16/d64", "fp16/d64")):
        assert int(row["per_SM"]) >= 2, f"{name}: one program's products are to hide the other's arithmetic"
        if "w8" in row["tile"]:
            assert int(row["regs"]) <= 128, name
        if "tma" in row["tile"]:
            groups, instructions = map(int, row["async"].split("/"))
            assert groups < instructions, f"{name}: ptxas makes every product wait"
    narrowest = min((int(width) for width, _ in _loads(row)), default=128)
    assert narrowest >= 32 or "masked" in row["case"], f"{name}: loads of {row['loads']} in the loop"
    if row["kernel"].startswith("linear") and row["arch"].startswith("sm_"):
        handed_over = row["kernel"].startswith("linear_bwd") and "/tied" in row["case"]
        # Tied, the backward pass hands one number per token and head from launch to launch, through shared memory.
        assert int(row["barriers"]) <= (2 if handed_over else 0), f"{name}: a barrier in the loop"
        widths = {width for width, _ in _loads(row)}
        narrow = ({"8", "16", "32"} if "masked" in row["case"] else set()) | ({"32"} if handed_over else set())
        if row["kernel"] == "linear_fold":  # forward, whose last loop is that over the sums of energies
            narrow = widths & {"32"}
        assert widths & {"128", *narrow} and widths <= {"128"} | narrow, f"{name}: loads of {row['loads']} in the loop"


LENGTHS = sorted({rows * columns + 1 for rows in range(14, 65, 3) for columns in range(14, 65, 7)})[::3]


@pytest.mark.parametrize(
    ("op", "heads", "d", "most"),
    [("linear", 64, 16, 7), ("linear_floor", 64, 16, 7), ("pure", 16, 64, 8), ("pooled", 64, 16, 11)],
)
def test_lengths_share_their_kernels(op, heads, d, most):
    """As many pictures of as many sizes, and 4 kernels forward and backward: each is compiled in seconds, once.

    The pooled layer's two products have tiles of two sizes.
    """
    assert len(LENGTHS) >= 40
    assert len(compilations([Call(op, 8, N, heads, d) for N in LENGTHS])) <= most


# Two of Linear's add up the partial sums of long sequences with few heads, forward and backward.
@pytest.mark.parametrize(("op", "most"), [("linear", 9), ("pure", 9)])
def test_batches_and_heads_share_their_kernels(op, most):
    lengths = 16, 50, 196, 197, 256, 577, 785, 1024, 1025, 4096, 4097, 9217, 16384, 65536
    calls = [Call(op, B, N, H, 64) for B in (1, 2, 3, 8, 16) for N in lengths for H in (1, 3, 6, 12, 16)]
    assert len(compilations(calls)) <= most


@pytest.mark.parametrize("setting", ["tf32", "ieee"])
def test_products_of_float32_follow_either_setting(setting, monkeypatch):
    q = torch.empty(1, 1, 1, 64, device="meta")
    torch.set_float32_matmul_precision("high" if setting == "tf32" else "highest")
    assert configs.precision(q) == setting
    torch.set_float32_matmul_precision("highest")
    try:
        torch.backends.cuda.matmul.fp32_precision = setting
        assert configs.precision(q) == setting and configs.precision(q.bfloat16()) == "ieee"
        configs.pure(q, q, "fwd", False).options(q)
    finally:
        torch.backends.cuda.matmul.fp32_precision = "ieee"

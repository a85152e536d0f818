"""The pooled layer's Triton kernels as compiled for sm_80, executed as in test_executed.py, through the public operator."""

import pytest
import torch
from helpers import pooled_linear_calls
from helpers.sweep import some

from infsa_kernels import pooled_linear_infsa

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter does not compile", allow_module_level=True)

from infsa_kernels.triton import central_query, configs, score_pool  # noqa: E402

from .launches import executing  # noqa: E402
from .machine import descending  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(autouse=True)
def splits(monkeypatch):
    """Two runs of tokens of several tiles each, and backward in two blocks of tokens."""
    monkeypatch.setattr(configs, "multiprocessors", lambda device: 2)
    monkeypatch.setattr(central_query, "BLOCK_TOKENS", 130)
    monkeypatch.setattr(score_pool, "BLOCK_BYTES", 1 << 15)


def check(call: dict) -> None:
    """The rule, and the same bits with the programs in another order."""
    dout, before = pooled_linear_calls.output_gradient(call), call["x"].detach().clone()
    with executing():
        found = pooled_linear_calls.check(call, dout)
    assert torch.equal(call["x"].nan_to_num(), before.nan_to_num()), "x was written to"
    with executing(order=descending):
        for name, t in pooled_linear_calls.results(pooled_linear_infsa, call, dout).items():
            assert torch.equal(t, found[name]), f"{name} differs with the order in which programs run"


FORMS = {
    "normalised": dict(tied=False, norm="affine"),
    "masked": dict(tied=True, norm="plain", masked=True),
    "plain": dict(tied=True, norm="", bias=False),
    "plain masked": dict(tied=False, norm="", masked=True),
}
CASES = [(dtype, form, floor) for dtype in DTYPES for form in FORMS for floor in (0.0, 0.3)]
IN_MAKE_TEST = ("bf16", "normalised", 0.0), ("fp16", "masked", 0.3), ("fp32", "plain masked", 0.0)


@pytest.mark.parametrize(("dtype", "form", "floor"), some(CASES, *IN_MAKE_TEST))
def test_tiles_and_a_tail(dtype, form, floor):
    with central_query.tiles(large=dtype == "bf16"):
        tiles_and_a_tail(dtype, form, floor)


@pytest.mark.sweep
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_the_other_tiles(dtype):
    with central_query.tiles(large=dtype == "fp16"):
        tiles_and_a_tail(dtype, "normalised", 0.0)


def tiles_and_a_tail(dtype, form, floor):
    call = pooled_linear_calls.layer(DTYPES[dtype], **FORMS[form], shape=(1, 150, 80), heads=2, head=16) | {
        "eps": 1e-2,
        "score_floor": floor,
    }
    if "padding_mask" in call:
        # NaN counts as unwritten: it must not even be read.
        removed = call["padding_mask"][..., None]
        call["x"] = call["x"].detach().masked_fill(removed, torch.nan).requires_grad_()
    check(call)


# (B, N, D), heads, head_dim: several samples, rows that no vector reads, one channel, wide heads, more heads than a program has.
SIZES = [((3, 40, 33), 2, 5), ((2, 70, 1), 1, 1), ((1, 70, 130), 1, 200), ((1, 100, 40), 40, 8), ((2, 130, 64), 70, 16)]


@pytest.mark.sweep
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "heads", "head"), SIZES)
def test_sizes(dtype, shape, heads, head):
    call = pooled_linear_calls.layer(DTYPES[dtype], tied=False, shape=shape, heads=heads, head=head)
    check(call | {"eps": 1e-2, "score_floor": 0.3})

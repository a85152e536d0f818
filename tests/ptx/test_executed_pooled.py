"""The pooled layer's Triton kernels for sm_80 and sm_90, executed as in test_executed.py, through the public operator."""

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


def check(call: dict, arch: str) -> None:
    """The rule, and the same bits with the programs in another order."""
    dout, before = pooled_linear_calls.output_gradient(call), call["x"].detach().clone()
    with executing(arch=arch):
        found = pooled_linear_calls.check(call, dout)
    assert torch.equal(call["x"].nan_to_num(), before.nan_to_num()), "x was written to"
    with executing(order=descending, arch=arch):
        for name, t in pooled_linear_calls.results(pooled_linear_infsa, call, dout).items():
            assert torch.equal(t, found[name]), f"{name} differs with the order in which programs run"


FORMS = {
    "normalised": dict(tied=False, norm="affine"),
    "masked": dict(tied=True, norm="plain", masked=True),
    "plain": dict(tied=True, norm="", bias=False),
    "plain masked": dict(tied=False, norm="", masked=True),
}
ARCHITECTURES = "sm_80", "sm_90"
CASES = [
    (dtype, form, floor, arch) for dtype in DTYPES for form in FORMS for floor in (0.0, 0.3) for arch in ARCHITECTURES
]
IN_MAKE_TEST = (
    ("bf16", "normalised", 0.0, "sm_80"),
    ("fp16", "masked", 0.3, "sm_80"),
    ("fp32", "plain masked", 0.0, "sm_80"),
)


@pytest.mark.parametrize(("dtype", "form", "floor", "arch"), some(CASES, *IN_MAKE_TEST))
def test_tiles_and_a_tail(dtype, form, floor, arch):
    with central_query.tiles(large=dtype == "bf16"):
        tiles_and_a_tail(dtype, form, floor, arch)


@pytest.mark.sweep
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_other_tiles(dtype, arch):
    with central_query.tiles(large=dtype == "fp16"):
        tiles_and_a_tail(dtype, "normalised", 0.0, arch)


def tiles_and_a_tail(dtype, form, floor, arch):
    call = pooled_linear_calls.layer(DTYPES[dtype], **FORMS[form], shape=(1, 150, 80), heads=2, head=16) | {
        "eps": 1e-2,
        "score_floor": floor,
    }
    if "padding_mask" in call:
        # NaN counts as unwritten: it must not even be read.
        removed = call["padding_mask"][..., None]
        call["x"] = call["x"].detach().masked_fill(removed, torch.nan).requires_grad_()
    check(call, arch)


# (B, N, D), heads, head_dim: several samples, rows that no vector reads, one channel, wide heads, more heads than a program has.
SIZES = [((3, 40, 33), 2, 5), ((2, 70, 1), 1, 1), ((1, 70, 130), 1, 200), ((1, 100, 40), 40, 8), ((2, 130, 64), 70, 16)]


def test_hopper():
    ran = {}
    call = pooled_linear_calls.layer(torch.bfloat16, tied=False, norm="", shape=(1, 70, 48), heads=2, head=16)
    dout = pooled_linear_calls.output_gradient(call)
    with executing(arch="sm_90", see=lambda launch, machine: ran.update({launch.name: launch.ptx})):
        pooled_linear_calls.check(call, dout)
    assert sum("wgmma.mma_async" in ptx for ptx in ran.values()) >= 5, list(ran)


@pytest.mark.sweep
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "heads", "head"), SIZES)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_sizes(dtype, shape, heads, head, arch):
    call = pooled_linear_calls.layer(DTYPES[dtype], tied=False, shape=shape, heads=heads, head=head)
    check(call | {"eps": 1e-2, "score_floor": 0.3}, arch)

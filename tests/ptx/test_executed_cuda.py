"""The CUDA C++ kernels that need no cluster, as nvcc compiles them for sm_80, executed: right, in bounds, without a race.

All programs are there at once and meet at the barrier of the grid: an atomic addition that releases, loads that acquire.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from helpers.calls import Call, expected, output_gradient
from helpers.sweep import some

from infsa_kernels.testing import FORWARD, GRADIENT, assert_within

from .machine import descending, shuffled
from .memory import Fault
from .nvcc import NVCC, Executed
from .parse import Instruction, Kernel

pytestmark = pytest.mark.skipif(NVCC is None, reason="there is no nvcc, whose PTX these tests execute")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def make(dtype="bf16", *, tied=False, B=1, H=3, N=150, M=130, d=16, dv=16, floor=0.0, masks=False) -> Call:
    M = N if tied else M
    q, k, v = (torch.randn(B, n, H, size, dtype=DTYPES[dtype]).transpose(1, 2) for n, size in ((N, d), (M, d), (M, dv)))
    call = Call("linear", q, None if tied else k, v, torch.rand(H) + 0.5, 1.0, score_floor=floor)
    if masks:
        call.key_padding_mask, call.query_padding_mask = torch.rand(B, M) < 0.4, torch.rand(B, N) < 0.4
        for t in (v,) if tied else (k, v):  # NaN counts as unwritten: it must not even be read
            t.masked_fill_(call.key_padding_mask[:, None, :, None], torch.nan)
    return call


def check(call: Call, gpu: Executed) -> dict[str, torch.Tensor]:
    dout = output_gradient(call)
    found = gpu.results(call, dout)
    for name, wanted in expected(call, dout, 4).items():
        factor, what = (FORWARD, "out") if name == "out" else (GRADIENT, f"d{name}")
        assert_within(found[name], wanted.truth, wanted.eager_error, factor, what)
    return found


KINDS = [
    (dtype, tied, floor, masks)
    for dtype in DTYPES
    for tied in (False, True)
    for floor in (0.0, 0.3)
    for masks in (False, True)
]


@pytest.mark.parametrize(
    ("dtype", "tied", "floor", "masks"),
    some(
        KINDS,
        ("bf16", False, 0.0, False),
        ("fp16", True, 0.3, True),
        ("fp32", True, 0.0, False),
        ("bf16", False, 0.3, True),
    ),
)
def test_every_kernel(dtype, tied, floor, masks):
    for unaligned in (False, True):
        check(make(dtype, tied=tied, floor=floor, masks=masks), Executed(resident=3, unaligned=unaligned))


@pytest.mark.parametrize("resident", some([1, 2, 3, 5], 3))
def test_waves_have_the_same_bits_in_every_order(resident):
    """More units than programs, and units that several programs share: partial sums of three waves are on their way at once."""
    call = make(B=2, H=8, N=600, M=580, floor=0.3)
    gpu = Executed(resident=resident, wave_bytes=1)
    found, dout = check(call, gpu), output_gradient(call)
    found = gpu.results(call, dout)
    for order in (descending, shuffled(1)):
        for name, t in replace(gpu, order=order).results(call, dout).items():
            assert torch.equal(t, found[name]), f"{name} differs with the order in which programs run"


HEAD_DIMS = [(1, 3), (8, 8), (20, 9), (64, 64), (72, 40), (256, 256)]


@pytest.mark.parametrize(("d", "dv"), some(HEAD_DIMS, (20, 9)))
@pytest.mark.parametrize("dtype", some(DTYPES, "bf16"))
def test_head_dims(d, dv, dtype):
    check(make(dtype, N=70, M=65, H=2, d=d, dv=dv), Executed())
    check(make(dtype, N=70, H=2, d=d, dv=dv, tied=True, floor=0.1), Executed())


@pytest.mark.sweep
@pytest.mark.parametrize(("N", "M"), [(0, 5), (5, 0), (1, 1), (1, 300), (257, 2), (1025, 511)])
def test_lengths(N, M):
    for floor in (0.0, 0.3):
        check(make(N=N, M=M, H=1, floor=floor), Executed())


def changed(wanted: str, change: Callable[[Instruction], Instruction]) -> Callable[[Kernel], Kernel]:
    """A mutant of a kernel, whose first instruction that begins so is changed."""

    def mutant(kernel: Kernel) -> Kernel:
        code = list(kernel.code)
        at = next(j for j, i in enumerate(code) if i.opcode.startswith(wanted))
        code[at] = change(code[at])
        return replace(kernel, code=tuple(code))

    return mutant


def nothing(i: Instruction) -> Instruction:
    return replace(i, opcode="mov.u32", operands=("_", "0"))


def relaxed(i: Instruction) -> Instruction:
    return replace(i, opcode=i.opcode.replace("release", "relaxed"))


@pytest.mark.parametrize(
    ("wanted", "change"), [("barrier.sync", nothing), ("atom.add.release", relaxed)], ids=["arrival", "release"]
)
def test_the_barrier_of_the_grid_is_needed(wanted, change):
    """The threads of a program meet behind its acquiring load too, which the next barrier of the kernel hides."""
    gpu = Executed(resident=4, wave_bytes=1, change=changed(wanted, change))
    with pytest.raises(Fault, match=r"no atomic orders|no barrier between|was never written"):
        gpu.results(make(H=4, N=600, M=580))

"""What both Triton operators need: plans and launches, strides and masks as kernel arguments, a ReLU that keeps NaN."""

import functools
import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

from . import private

INTERPRETED: bool = triton.knobs.runtime.interpret

# Arguments by whose divisibility Triton is not to tell kernels apart: each doubles the number of compilations. Pure's backward
# kernels are told about N and M all the same: without, five of their variants spill registers.
COUNTS = [
    "H",
    "heads",
    "splits",
    "split_tokens",
    "query_splits",
    "key_splits",
    "blocks",
    "square_blocks",
    "part_blocks",
    "part_rows",
    "sequences",
]
SIZES = [*COUNTS, "N", "M"]


@triton.jit
def relu(x):
    # tl.maximum alone returns the number of (number, NaN): a fused ReLU would hide divergence.
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


# The kernels count tokens and heads in 32 bits, and up to a run of tokens beyond the last one.
LARGEST_COUNT = 1 << 30


def countable(op: str, q: Tensor, v: Tensor) -> None:
    """ValueError where a size is past what the kernels count; offsets in memory are 64 bits wide everywhere."""
    B, H, N, d = q.shape
    M, dv = v.shape[2:]
    all_countable(op, {"N": N, "M": M, "B * H": B * H, "H * d": H * d, "H * dv": H * dv})


def all_countable(op: str, sizes: dict[str, int]) -> None:
    """The same of other sizes by name."""
    for name, size in sizes.items():
        if size > LARGEST_COUNT:
            raise ValueError(
                f"{op}: {name} is {size}, the Triton kernels take up to {LARGEST_COUNT}; split the call or use the eager backend"
            )


def largest_grid(num_warps: int) -> int:
    """Programs that one launch can start: CUDA counts them, HIP their threads."""
    return min((1 << 31) - 1, ((1 << 32) - 1) // (64 * num_warps)) if torch.version.hip else (1 << 31) - 1


# Elements whose 16 bytes, of the narrowest dtype, are the widest load. Triton itself sees only which numbers are multiples of 16.
LARGEST_UNIT = 8


@triton.jit
def in_elements(row_strides, UNIT: tl.constexpr):
    """Strides of (B, H, N, d) in elements, from what a Launch passes of them."""
    stride_b, stride_h, stride_n, stride_d = row_strides
    return stride_b * UNIT, stride_h * UNIT, stride_n * UNIT, stride_d


def unit_of(rows: list[tuple[int, ...]]) -> int:
    """In how many elements kernels are given these strides, but for the channels', so that the compiler knows the divisor.

    Heads of 72 channels side by side are then read 8 at a time and not one by one. 1 where Triton sees a better divisor, and
    where a stride is too large to be multiplied in 32 bits.
    """
    steps = [step for strides in rows for step in strides[:-1]]
    if all(step % 16 == 0 for step in steps) or max(steps) >= 1 << 31:
        return 1
    return math.gcd(LARGEST_UNIT, *steps)


class Launch:
    """Launches of a kernel of which all but the tensors is settled; call it with what comes first, up to the last tensor.

    The first goes through Triton, which compiles the kernel or finds it. The others start what it found, and so take tensors like
    the first ones: None where these were, of the same dtypes and strides, and on 16 bytes where these were.

    Args:
        programs: how many start, in a grid of one dimension.
        settled: the kernel's arguments after the tensors, but for those that ``options`` names. Strides of four dimensions come
            to the kernel in units, which it is told as UNIT.
    """

    def __init__(self, kernel, programs: int, device: torch.device, *settled, num_warps: int, **options):
        if programs > largest_grid(num_warps):
            raise ValueError(
                f"infsa: the call needs {programs} programs of a Triton kernel, the GPU starts up to {largest_grid(num_warps)} "
                "at a time; split the batch"
            )
        rows = [a for a in settled if isinstance(a, tuple) and len(a) == 4]
        if rows:
            unit = options["UNIT"] = unit_of(rows)
            settled = tuple((*(step // unit for step in a[:-1]), a[-1]) if a in rows else a for a in settled)
        self._kernel, self._programs, self._device, self._settled = kernel, programs, device.index, settled
        self._on_gpu = device.type == "cuda"
        # Contraction to FMA is off by default from some Triton version on; nothing here needs the separate rounding.
        self._options = options | {"num_warps": num_warps, "enable_fp_fusion": True}
        self._again: Callable | None = None

    def __call__(self, *tensors) -> None:
        """Starts the programs on the current stream of the tensors' device, current or not."""
        if self._on_gpu and self._device != torch.cuda.current_device():
            with torch.cuda.device(self._device):
                self._start(tensors)
        else:
            self._start(tensors)

    def _start(self, tensors) -> None:
        if self._again is None or private.hooked(self._kernel):
            compiled = self._kernel[(self._programs,)](*tensors, *self._settled, **self._options)
            if found := private.started(compiled):
                self._again = self._starting(found, len(tensors))
        else:
            self._again(driver.active.get_current_stream(self._device), tensors)

    def _starting(self, found: private.Started, tensors: int) -> Callable:
        """(stream, tensors) -> the launch, with the settled arguments in the kernel's order."""
        names = self._kernel.arg_names[tensors:]
        given = dict(zip(names, self._settled)) | self._options
        start, function, metadata = found
        programs, rest = self._programs, tuple(given[name] for name in names)

        def again(stream, tensors):
            start(programs, 1, 1, stream, function, metadata, None, None, None, *tensors, *rest)

        return again


def planned(plan: Callable[..., Callable]) -> Callable:
    """A backend's forward or backward, whose ``plan`` makes of a call what runs it and every other of the same kind.

    The kind is what operators keep plans by (ops/plans.py). A plan holds on to no tensor.
    """

    @functools.wraps(plan)
    def run(*arguments, **more):
        return plan(*arguments, **more)(*arguments, **more)

    run.plan = plan
    return run


def maker(
    device: torch.device, dtype: torch.dtype, *shape: int, steps: tuple[int, ...] | None = None
) -> Callable[[], Tensor]:
    """Makes uninitialised tensors of this shape, contiguous or with these strides, in two thirds of the time of new_empty."""
    steps = torch.empty(shape, device="meta").stride() if steps is None else steps
    return functools.partial(torch.empty_strided, shape, steps, dtype=dtype, device=device)


def strides(t: Tensor | None, dims: int) -> tuple[int, ...]:
    return (0,) * dims if t is None else t.stride()


def padded(size: int, least: int = 1) -> int:
    """A power of two. Triton's own functions of numbers cost microseconds outside kernels."""
    return max(least, 1 << max(0, size - 1).bit_length())


def ceil_div(number: int, by: int) -> int:
    """Rounded up."""
    return -(-number // by)

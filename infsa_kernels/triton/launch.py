"""What both Triton operators need: launching, strides and masks as kernel arguments, a ReLU that keeps NaN."""

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

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
    for name, size in (("N", N), ("M", M), ("B * H", B * H), ("H * d", H * d), ("H * dv", H * dv)):
        if size > LARGEST_COUNT:
            raise ValueError(
                f"{op}: {name} is {size}, the Triton kernels take up to {LARGEST_COUNT}; split the call or use the eager backend"
            )


def largest_grid(num_warps: int) -> int:
    """Programs that one launch can start: CUDA counts them, HIP their threads."""
    return min((1 << 31) - 1, ((1 << 32) - 1) // (64 * num_warps)) if torch.version.hip else (1 << 31) - 1


def launch(kernel, programs: int, device: torch.device, *args, num_warps: int, **options) -> None:
    """Starts `programs` programs of a kernel on the device's current stream."""
    if programs > largest_grid(num_warps):
        raise ValueError(
            f"infsa: the call needs {programs} programs of a Triton kernel, the GPU starts up to {largest_grid(num_warps)} at a "
            "time; split the batch"
        )
    # Contraction to FMA is off by default from some Triton version on; nothing here needs the separate rounding.
    with _current(device):
        kernel[(programs,)](*args, enable_fp_fusion=True, num_warps=num_warps, **options)


def _current(device: torch.device):
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def strides(t: Tensor | None, dims: int) -> tuple[int, ...]:
    return (0,) * dims if t is None else t.stride()


def padded(size: int, least: int = 1) -> int:
    return max(least, triton.next_power_of_2(size))

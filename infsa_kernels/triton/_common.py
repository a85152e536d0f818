"""What both Triton operators need: launching, strides and masks as kernel arguments, a ReLU that keeps NaN."""

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED: bool = triton.knobs.runtime.interpret


@triton.jit
def relu(x):
    # tl.maximum alone returns the number of (number, NaN): a fused ReLU would hide divergence.
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


def launch(kernel, programs: int, device: torch.device, *args, **options) -> None:
    """Starts `programs` programs of a kernel on the device's current stream."""
    if programs >= 1 << 31:
        raise ValueError(f"infsa: {programs} programs exceed the grid limit of 2^31 - 1; split the batch")
    # Contraction to FMA is off by default from some Triton version on; nothing here needs the separate rounding.
    with _current(device):
        kernel[(programs,)](*args, enable_fp_fusion=True, **options)


def _current(device: torch.device):
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def strides(t: Tensor | None, dims: int) -> tuple[int, ...]:
    return (0,) * dims if t is None else t.stride()


def padded(size: int, least: int = 1) -> int:
    return max(least, triton.next_power_of_2(size))

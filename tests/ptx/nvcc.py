"""The CUDA C++ kernels of csrc/cuda on CPU tensors, as nvcc compiles them for sm_80: executed by machine.py.

Of the two kernels of each kind that is the grid, whose programs wait for each other: all are there at once, as a cooperative
launch demands, and count in a word of memory that the driver would give them.
"""

import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from helpers.cuda_on_host import AMPERE, ELEMENTS, ROOT, Emulated, arguments, library

from .machine import Machine, Order, together
from .memory import Global
from .parse import Kernel, parse

NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
NAMES = {torch.float32: "f", torch.bfloat16: "13__nv_bfloat16", torch.float16: "6__half"}


@functools.cache
def ptx() -> str:
    """Of linear.cu, as setup.py has it compiled."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "linear.ptx")
        subprocess.run(
            [NVCC, "-ptx", "-O3", "-std=c++20", "-arch=compute_80", "--expt-relaxed-constexpr",
             str(ROOT / "csrc/cuda/linear.cu"), "-o", str(target)],
            check=True,
        )  # fmt: skip
        return target.read_text()


@functools.cache
def kernel(dtype: torch.dtype, aligned: bool, backward: bool, floored: bool) -> Kernel:
    flags = "".join(f"Lb{int(flag)}E" for flag in (aligned, backward, floored))
    return parse(ptx(), f"linear_grid_kernelI{NAMES[dtype]}{flags}")


@dataclass
class Executed(Emulated):
    """What runs the kernels as Emulated does, by their PTX."""

    shared: int = AMPERE
    order: Order = together
    change: Callable[[Kernel], Kernel] | None = None  # to a mutant

    def _run(self, sizes, dtype, tied, numbers, tensors, backward=False):
        floored = numbers[1] >= 0
        probe = arguments(self, sizes, dtype, tied, numbers, tensors, backward)
        parts = {name: torch.full((max(1, probe.parts),), torch.nan) for name in ("first_parts", "second_parts")}
        workspace = torch.zeros(2, dtype=torch.int32)  # its size, which nobody asks for, and the count
        tensors = tensors | parts
        memory = Global([*(t for t in tensors.values() if t is not None and t.numel()), workspace])

        def address(t):
            return memory.address(t) if t.numel() else 0

        found = arguments(self, sizes, dtype, tied, numbers, tensors, backward, address)
        grid = (ctypes.c_int64 * 3)()
        library("arguments").grid_of(found, grid)
        aligned = not self.unaligned and bool(library("arguments").has_aligned(found, ELEMENTS[dtype]))
        code = kernel(dtype, aligned, backward, floored)
        code = self.change(code) if self.change else code
        machine = Machine(code, [found.raw], *grid, memory, memory.address(workspace))
        machine.run(self.order)
        memory.write_back()

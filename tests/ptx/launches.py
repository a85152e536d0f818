"""Triton kernels on CPU tensors, as compiled for sm_80 or sm_90: launched by the package itself, executed by machine.py."""

import contextlib
import functools
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest import mock

import torch
from helpers.triton_target import compiled, launching
from triton.tools.tensor_descriptor import TensorDescriptor

import infsa_kernels
from infsa_kernels.ops import backends

from .machine import WARP, Machine, Order, together
from .memory import Global
from .parse import parse
from .transfers import TensorMap

PACK = {"fp32": "f", "i32": "i", "u32": "I", "i64": "q", "u64": "Q"}
parsed = functools.cache(parse)


@dataclass
class Launch:
    """A kernel, its arguments, types first, and its grid."""

    name: str
    ptx: str
    arguments: list[tuple[str, object]]
    programs: int
    threads: int
    shared: int  # bytes

    def execute(self, ptx: str | None = None, order: Order = together, first_wins: bool = False) -> Machine:
        """Runs it, or another PTX in its place, on a copy of its tensors: `memory` of what is returned."""
        values = (value.base if isinstance(value, TensorDescriptor) else value for _, value in self.arguments)
        memory = Global([value for value in values if isinstance(value, torch.Tensor)])

        def packed(kind, value):
            if isinstance(value, TensorDescriptor):
                return _tensor_map(memory.address(value.base), value, kind)
            pointer = isinstance(value, torch.Tensor)
            return struct.pack("Q", memory.address(value)) if pointer else struct.pack(PACK[kind], value)

        # Two pointers come last, to scratch that none of these kernels asks for.
        parameters = [packed(*argument) for argument in self.arguments] + [struct.pack("Q", 0)] * 2
        machine = Machine(parsed(ptx or self.ptx), parameters, self.programs, self.threads, self.shared, memory)
        machine.run(order, first_wins)
        return machine


def launch_of(kernel, programs: int, args: tuple, options: dict) -> Launch:
    """What the package asks Triton to launch, as Triton compiles it."""
    made = compiled(kernel, programs, args, options)
    assert made.metadata.global_scratch_size == made.metadata.profile_scratch_size == 0
    values = dict(zip(kernel.arg_names, args)) | options
    maps = iter(made.metadata.tensordesc_meta)
    arguments = [pair for name, kind in made.src.signature.items() for pair in _flat(kind, values[name], maps)]
    return Launch(
        made.metadata.name, made.asm["ptx"], arguments, programs, WARP * made.metadata.num_warps, made.metadata.shared
    )


def _flat(kind, value, maps: Iterator[dict]) -> Iterator[tuple[object, object]]:
    """Tuples flattened, what was compiled in left out. Of a descriptor the tensor map, for which Triton says how, and numbers."""
    if isinstance(kind, tuple):
        for k, v in zip(kind, value, strict=True):
            yield from _flat(k, v, maps)
    elif isinstance(value, TensorDescriptor):
        yield next(maps), value
        yield from (("i32", n) for n in value.shape)
        yield from (("i64", step) for step in value.strides)
    elif kind != "constexpr":
        yield kind, value


# Of Triton's and the driver's numbers for swizzles.
LINES = {1: 32, 2: 64, 3: 128}


def _tensor_map(address: int, value: TensorDescriptor, how: dict) -> TensorMap:
    assert value.padding == "zero" and not how["fp4_padded"] and not how["is_im2col"] and value.strides[-1] == 1
    width = how["elem_size"]
    shape, box = tuple(value.shape[::-1]), tuple(how["block_size"][::-1])
    strides = tuple(step * width for step in value.strides[-2::-1])
    return TensorMap(address, shape, strides, box, width, LINES[how["swizzle"]])


@contextlib.contextmanager
def executing(
    order: Order = together,
    first_wins: bool = False,
    see: Callable[[Launch, Machine], None] | None = None,
    arch: str = "sm_80",
):
    """In this block the Triton backend is in force on CPU tensors, and what it launches is executed, and seen by ``see``."""

    def launch(*asked):
        made = launch_of(*asked)
        machine = made.execute(order=order, first_wins=first_wins)
        if see:
            see(made, machine)
        machine.memory.write_back()

    with (
        launching(arch, launch),
        mock.patch.object(backends, "_why_not_triton", return_value=None),
        infsa_kernels.backend("triton"),
    ):
        yield

"""Triton kernels on CPU tensors, as compiled for sm_80: launched by the package itself, executed by machine.py."""

import contextlib
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from unittest import mock

import torch
from helpers.triton_target import compiled, launching

import infsa_kernels
from infsa_kernels.ops import _library

from .machine import WARP, Machine, Order, together
from .memory import Global
from .parse import Kernel, parse

PACK = {"fp32": "f", "i32": "i", "u32": "I", "i64": "q", "u64": "Q"}


@dataclass
class Launches:
    """How to run what the package launches, and what it launched."""

    order: Order = together
    edit: Callable[[str, str], str] = lambda name, ptx: ptx
    """Of a kernel's name and PTX: what to run instead."""
    kernels: dict[str, Kernel] = field(default_factory=dict)
    """By their PTX."""
    reached: dict[str, torch.Tensor] = field(default_factory=dict)
    """Which instructions of each some lane has executed."""

    def launch(self, kernel, programs: int, args: tuple, options: dict) -> None:
        found = compiled(kernel, programs, args, options)
        ptx = self.edit(found.metadata.name, found.asm["ptx"])
        if ptx not in self.kernels:
            self.kernels[ptx] = parse(ptx)
        values = list(arguments(found.src.signature, dict(zip(kernel.arg_names, args)) | options))
        memory = Global([value for _, value in values if isinstance(value, torch.Tensor)])
        parameters = [self._bytes(kind, value, memory) for kind, value in values]
        assert found.metadata.global_scratch_size == found.metadata.profile_scratch_size == 0
        parameters += [struct.pack("Q", 0)] * 2  # scratch that no kernel here asks for
        machine = Machine(
            self.kernels[ptx], parameters, programs, WARP * found.metadata.num_warps, found.metadata.shared, memory
        )
        machine.run(self.order)
        memory.write_back()
        reached = torch.from_numpy(machine.reached)
        self.reached[ptx] = reached | self.reached.get(ptx, torch.zeros_like(reached))

    def _bytes(self, kind: str, value, memory: Global) -> bytes:
        if isinstance(value, torch.Tensor):
            return struct.pack("Q", memory.address(value))
        return struct.pack(PACK[kind], value)


def arguments(signature: dict, values: dict) -> Iterator[tuple[str, object]]:
    """Type and value of what a compiled kernel takes: tuples flattened, what was compiled in left out."""
    for name, kind in signature.items():
        yield from _flat(kind, values[name])


def _flat(kind, value) -> Iterator[tuple[str, object]]:
    if isinstance(kind, tuple):
        for k, v in zip(kind, value, strict=True):
            yield from _flat(k, v)
    elif kind != "constexpr":
        yield kind, value


@contextlib.contextmanager
def executing(**how) -> Iterator[Launches]:
    """In this block the Triton backend is in force on CPU tensors, and what it launches is executed."""
    launches = Launches(**how)
    with (
        launching("sm_80", launches.launch),
        mock.patch.object(_library, "_why_not_triton", lambda *call: None),
        infsa_kernels.backend("triton"),
    ):
        yield launches

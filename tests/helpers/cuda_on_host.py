"""The CUDA kernels of csrc/cuda on the host: built with the system's compiler from the shipped source, threads as fibers."""

import ctypes
import functools
import random
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.cpp_extension import get_cxx_compiler

from helpers.calls import Call

ROOT = Path(__file__).parents[2]
ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
PLAN = (
    "lanes", "heads", "columns", "slots", "units", "splits", "query_span", "key_span", "wave_units", "waves", "blocks",
    "cluster", "shared_bytes", "part_size",
)  # fmt: skip
# Bytes of shared memory that a block may have on Hopper; 0: a GPU without clusters.
HOPPER, AMPERE = 227 << 10, 0


@functools.cache
def library(name: str) -> ctypes.CDLL:
    """The kernels ("linear"), which take seconds to compile; what they are given ("arguments"); their launcher ("launches")."""
    folder = Path(tempfile.mkdtemp())
    sources, target = ROOT / f"tests/gpu/simt/{name}.cpp", folder / f"{name}.so"
    # linear.cu beside primitives of the host, and shared memory that no kernel is run to use.
    launcher = (ROOT / "csrc/cuda/linear.cu").read_text()
    shared = "extern __shared__ __align__(16) char dynamic_shared[];"
    assert shared in launcher
    (folder / "linear.cu").write_text(launcher.replace(shared, "alignas(16) char dynamic_shared[1];"))
    (folder / "simt.cuh").write_text(f'#include "{ROOT / "tests/gpu/simt/simt.h"}"\n')
    # With _FORTIFY_SOURCE, which some compilers define by themselves, longjmp refuses to go to another stack.
    subprocess.run(
        [get_cxx_compiler(), "-std=c++20", "-O0" if name == "launches" else "-O2", "-U_FORTIFY_SOURCE", "-fPIC", "-shared",
         "-Wall", "-Werror", "-Wno-unknown-pragmas", f"-I{folder}", f"-I{ROOT / 'csrc/cuda'}", f"-I{ROOT / 'tests/gpu/simt'}",
         str(sources), "-o", str(target)],
        check=True,
    )  # fmt: skip
    loaded = ctypes.CDLL(str(target))
    shutil.rmtree(folder)
    return loaded


def plan(
    B,
    H,
    N,
    M,
    d,
    dv,
    *,
    bytes=2,
    token_major=False,
    keep_queries=False,
    floor=False,
    resident=132,
    shared=HOPPER,
    wave_bytes=10 << 20,
) -> dict[str, int]:
    found = (ctypes.c_int64 * len(PLAN))()
    sizes = (ctypes.c_int64 * 6)(B, H, N, M, d, dv)
    library("arguments").plan_linear(
        sizes,
        bytes,
        token_major,
        keep_queries,
        floor,
        resident,
        ctypes.c_int64(shared),
        ctypes.c_int64(wave_bytes),
        found,
    )
    return dict(zip(PLAN, found))


@dataclass
class Emulated:
    """A GPU that Linear-InfSA's kernels run on: how many blocks at once, and whether it has clusters."""

    resident: int = 4
    shared: int = HOPPER
    wave_bytes: int = 10 << 20
    unaligned: bool = False  # element by element even where 16 bytes at a time could be read
    clusters: set = None  # what ran, as it runs: True for a cluster, False for a grid

    def results(self, call: Call, dout: Tensor | None = None) -> dict[str, Tensor]:
        """The output, and the gradients by name, of `infsa::linear`."""
        q, k, v, eps, *floor, rho, head_rho, key_mask, query_mask = call.raw()
        (B, H, N, d), (M, dv) = q.shape, v.shape[2:]
        sizes = B, H, N, M, d, dv
        shapes = {"context": (B, H, dv), "central_query": (B, H, d), "energy_sum": (B, H), "score_sum": (B, H)}
        shapes |= {"absolute_sum": (B, H), "value_mean": (B, H, dv)} if floor else {}
        saved = {name: _nan(shape) for name, shape in shapes.items()}
        out = _nan((B, H, dv), q.dtype)
        inputs = {
            "q": q,
            "k": q if k is None else k,
            "v": v,
            "query_mask": query_mask,
            "key_mask": key_mask,
            "head_rho": head_rho,
        }
        numbers = eps, *(floor or [-1.0]), rho
        self._run(sizes, q.dtype, k is None, numbers, {**inputs, **saved, "out": out})
        results = {"out": out}
        if dout is not None:
            dq, dk, dv_ = (torch.empty_like(t).fill_(torch.nan) for t in (q, q if k is None else k, v))
            dhead_rho = None if head_rho is None else _nan((B, H))
            grads = {"dq": dq, "dk": None if k is None else dk, "dv": dv_, "dhead_rho": dhead_rho}
            given = {**inputs, **saved, "dout": dout, **grads, "dscores": _nan((B, H, N)) if k is None else None}
            self._run(sizes, q.dtype, k is None, numbers, given, backward=True)
            results |= {"q": dq, "v": dv_}
            if k is not None:
                results["k"] = dk
            if head_rho is not None:
                results["rho"] = dhead_rho.sum_to_size(call.rho.shape) if call.rho.dim() else dhead_rho.sum()
        return results

    def _run(self, sizes, dtype, tied, numbers, tensors, backward=False):
        found = arguments(self, sizes, dtype, tied, numbers, tensors, backward)
        ran = library("linear").run_linear(
            found, ELEMENTS[dtype], backward, self.unaligned, ctypes.c_uint64(random.getrandbits(64))
        )
        assert ran >= 0, "some threads wait for others that never come"
        if self.clusters is not None:
            self.clusters.add(bool(ran & 1))


ORDER = (
    "q", "k", "v", "query_mask", "key_mask", "head_rho", "context", "central_query", "energy_sum", "score_sum", "out", "dout",
    "dq", "dk", "dv", "dhead_rho", "dscores", "absolute_sum", "value_mean", "first_parts", "second_parts",
)  # fmt: skip


def arguments(gpu: Emulated, sizes, dtype, tied, numbers, tensors, backward, address=Tensor.data_ptr):
    """A launch's LinearArgs, of tensors by name, each at ``address(tensor)``. Its ``parts`` are the floats of partial sums."""
    given = [tensors.get(name) for name in ORDER]
    pointers = (ctypes.c_void_p * len(ORDER))(*(None if t is None else address(t) for t in given))
    strides = []
    for name, t in zip(ORDER, given):
        of_t = [] if t is None else list(t.stride())
        # dout (B, H, dv) lies like a row of tokens.
        of_t = [*of_t[:2], 0, of_t[2]] if name == "dout" and of_t else of_t
        strides += of_t + [0] * (4 - len(of_t))
    found = ctypes.create_string_buffer(library("arguments").bytes_of_arguments())
    library("arguments").linear_arguments.restype = ctypes.c_int64
    found.parts = library("arguments").linear_arguments(
        (ctypes.c_int64 * 6)(*sizes), ELEMENTS[dtype], tied, backward, *map(ctypes.c_double, numbers), pointers,
        (ctypes.c_int64 * len(strides))(*strides), gpu.resident, ctypes.c_int64(gpu.shared), ctypes.c_int64(gpu.wave_bytes),
        found,
    )  # fmt: skip
    return found


def _nan(shape, dtype=torch.float32) -> Tensor:
    return torch.full(shape, torch.nan, dtype=dtype)

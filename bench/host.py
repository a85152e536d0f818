"""`python -m bench.host`: what calls cost before a kernel has anything to do, on a machine without a GPU.

The Triton backend runs on CPU tensors as it does on a GPU's, through Triton's own launcher down to a libcuda that starts nothing
(stub_libcuda.c, compiled here): time of the thread, and so no share of other processes. Beside it the same call on the CPU's own
backend, of a size at which arithmetic is nothing. `--against FILE` prints ratios to the times that an earlier run has written.
"""

import argparse
import contextlib
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch

import infsa_kernels
from infsa_kernels.ops import backends, plans

ARCH, CAPABILITY = "sm_90", (9, 0)
CALLS, REPEATS = 100, 20


@contextlib.contextmanager
def stub() -> Iterator[None]:
    """In this block CPU tensors are a GPU's to the Triton backend, whose launches end in the stub."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "libcuda.so.1"
        source = Path(__file__).with_name("stub_libcuda.c")
        subprocess.run(
            [os.environ.get("CC", "cc"), "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library, source],
            check=True,
        )
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        with mock.patch.dict(os.environ, TRITON_LIBCUDA_PATH=folder, TRITON_CACHE_DIR=folder), _driver(), _believed():
            yield


@contextlib.contextmanager
def _driver() -> Iterator[None]:
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import driver as nvidia
    from triton.runtime import driver

    class Driver(nvidia.CudaDriver):
        def __init__(self):
            self.utils, self.launcher_cls = nvidia.CudaUtils(), nvidia.CudaLauncher
            self.get_current_stream = lambda device: 0
            self.get_current_device = lambda: 0
            self.set_current_device = lambda device: None
            self.get_device_capability = lambda device=0: CAPABILITY

        def get_current_target(self):
            return GPUTarget("cuda", int(ARCH[3:]), 32)

    before = driver._active
    driver.set_active(Driver())
    try:
        yield
    finally:
        driver.set_active(before)


@contextlib.contextmanager
def _believed() -> Iterator[None]:
    from infsa_kernels.triton import configs

    # Plain functions: a Mock's own call takes microseconds.
    def arch_of(device):
        return ARCH

    def why_not(*arguments):
        return None

    with (
        mock.patch.object(configs, "arch_of", arch_of),
        mock.patch.object(backends, "_why_not_triton", why_not),
        mock.patch.object(backends, "PREFERENCE", {"cpu": ("triton",)}),
        mock.patch.object(plans, "PLANNED", ("cpu",)),
    ):
        yield


def microseconds(call: Callable[[], object]) -> float:
    """The least of many means."""
    for _ in range(CALLS):
        call()
    least = float("inf")
    for _ in range(REPEATS):
        start = time.thread_time_ns()
        for _ in range(CALLS):
            call()
        least = min(least, (time.thread_time_ns() - start) / CALLS)
    return round(least / 1e3, 2)


def calls(op: str, heads: int, d: int, backend: str, lengths: tuple[int, ...]) -> dict[str, Callable[[], object]]:
    """By name: the raw operator and the public function, with nothing to differentiate and with a backward pass."""
    found = {}
    public, operator = getattr(infsa_kernels, f"{op}_infsa"), getattr(torch.ops.infsa, op)
    raw, backward = (getattr(torch.ops.infsa, f"{op}_{way}{backends.SUFFIXES[backend]}") for way in ("fwd", "bwd"))
    dtype = torch.bfloat16 if backend == "triton" else torch.float32
    for N in lengths:
        q, v = (torch.ones(1, N, heads, d, dtype=dtype).transpose(1, 2) for _ in "qv")
        leaves = [t.clone().requires_grad_() for t in (q, v)]
        out, *saved = raw(q, None, v, 1e-6, 0.95, None, None, None)
        saved = [out, *saved] if op == "pure" else saved
        dout = torch.ones_like(out)

        def train(leaves=leaves, dout=dout):
            q, v = leaves
            return torch.autograd.grad(operator(q, q, v), leaves, dout)

        name = f"{op} {backend} N={N}"
        found |= {
            f"{name} raw": lambda q=q, v=v: raw(q, None, v, 1e-6, 0.95, None, None, None),
            f"{name} public": lambda q=q, v=v: public(q, q, v),
            f"{name} raw backward": lambda q=q, v=v, saved=saved, dout=dout: backward(
                dout, q, None, v, *saved, 1e-6, 0.95, None, None, None, [True, False, True, False]
            ),
            f"{name} operator, forward and backward": train,
        }
    return found


def pooled(backend: str, N: int) -> dict[str, Callable[[], object]]:
    """The pooled layer, so narrow that what torch does between its kernels is no arithmetic to speak of."""
    D, heads = 64, 4
    dtype = torch.bfloat16 if backend == "triton" else torch.float32
    x, *weights = leaves = [torch.ones(*shape, dtype=dtype, requires_grad=True) for shape in ((1, N, D), *[(D, D)] * 3)]

    def run():
        return infsa_kernels.pooled_linear_infsa(x, heads, *weights, norm_eps=1e-5)

    return {
        f"pooled_linear {backend} N={N} public": run,
        f"pooled_linear {backend} N={N} operator, forward and backward": lambda: torch.autograd.grad(
            run().sum(), leaves
        ),
    }


def measure() -> dict[str, float]:
    """Microseconds by call."""
    found = {}

    def add(backend: str, lengths: tuple[int, ...]) -> None:
        asked = [calls(op, heads, d, backend, lengths) for op, heads, d in (("linear", 64, 16), ("pure", 16, 64))]
        for name, call in [pair for named in (*asked, pooled(backend, lengths[0])) for pair in named.items()]:
            with torch.set_grad_enabled(name.endswith("forward and backward")):
                found[name] = microseconds(call)

    add("cpu", (16,))
    with stub():
        add("triton", (197, 4096))
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.host", description=__doc__)
    parser.add_argument("--out", type=Path, help="write the times here")
    parser.add_argument("--against", type=Path, help="and beside them those of this file")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = measure()
    before = json.loads(args.against.read_text()) if args.against else {}
    for name, time_ in found.items():
        ratio = f"  {before[name] / time_:5.2f}x as fast as {before[name]:.1f}" if name in before else ""
        print(f"{name:48} {time_:7.1f} us{ratio}")
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

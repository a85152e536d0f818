"""The machine: what it is, and what it can do at most, measured in the same run as everything else."""

import datetime
import functools
import hashlib
import os
import platform
import statistics
import subprocess
import time
from pathlib import Path

import torch
from torch import Tensor

import infsa_kernels
from infsa_kernels.ops._library import SUFFIXES, choose_backend

ROOT = Path(__file__).parent.parent
READ_BYTES = 256 << 20
GEMM_SIZE = {"cpu": 2048, "cuda": 8192}

# Ways to read a float32 vector once; which is the fastest depends on the machine and on torch's build.
READ_WAYS = {
    "torch.sum": torch.sum,
    "torch.amax": torch.amax,
    "torch.dot": lambda x: torch.dot(x, x),
    "torch.linalg.vector_norm": torch.linalg.vector_norm,
}


# Ways to multiply two matrices. torch.mm uses MKL on x86, which holds back on other makers' processors; convolutions go
# through oneDNN, which does not.
GEMM_WAYS = {
    "cpu": {
        "torch.mm": torch.mm,
        "1x1 convolution": lambda a, b: torch.nn.functional.conv2d(b.view(1, len(b), -1, 32), a[..., None, None]),
    },
    "cuda": {"torch.mm": torch.mm},
}


def environment(device: torch.device) -> dict:
    facts = {
        "device_type": device.type,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "infsa_kernels": infsa_kernels.__version__,
        "commit": _commit(),
        "backend": choose_backend("linear", device, torch.float32, (1, 16, 4096, 64)),
        "isa": _isa(),
        "timer": "CUDA events, L2 cold, eager launches" if device.type == "cuda" else "wall clock, calls in turn",
    }
    if device.type == "cuda":
        facts["cuda"] = torch.version.cuda
    return facts


def ceilings(device: torch.device, dtype: torch.dtype) -> dict:
    """Read and copy bandwidth in bytes/s, GEMM rate in FLOP/s: medians, of the best way where there are several."""
    x = torch.randn(READ_BYTES // 4, device=device)
    target = torch.empty_like(x)
    reads = {name: READ_BYTES / seconds(lambda: way(x), device) for name, way in READ_WAYS.items()}
    n = GEMM_SIZE[device.type]
    gemms = {way: gemm_flops(device) / seconds(gemm(way, device, dtype), device) for way in GEMM_WAYS[device.type]}
    return {
        "read_way": max(reads, key=reads.get),
        "read": max(reads.values()),
        "copy": 2 * READ_BYTES / seconds(lambda: target.copy_(x), device),
        "clone": 2 * READ_BYTES / seconds(lambda: x.clone(), device),
        "gemm_way": max(gemms, key=gemms.get),
        "gemm": max(gemms.values()),
        "torch_mm": gemms["torch.mm"],
        "gemm_size": n,
    }


class OtherLoad:
    """Which part of the processor's time other processes took since this object was made; None where not told."""

    def __init__(self):
        self._begin = self._ticks()

    def share(self) -> float | None:
        if self._begin is None:
            return None
        total, busy, own = (now - then for now, then in zip(self._ticks(), self._begin))
        return max(0.0, busy - own) / total if total else 0.0

    def _ticks(self) -> tuple[float, float, float] | None:
        try:
            with open("/proc/stat") as f:
                user, nice, system, idle, iowait, *interrupts = map(int, f.readline().split()[1:8])
        except OSError:
            return None
        busy = user + nice + system + sum(interrupts)
        own = sum(os.times()[:4]) * os.sysconf("SC_CLK_TCK")
        return busy + idle + iowait, busy, own


@functools.cache
def fastest_gemm(device: torch.device, dtype: torch.dtype) -> str:
    ways = GEMM_WAYS[device.type]
    return min(ways, key=lambda way: seconds(gemm(way, device, dtype), device, repeats=3))


def gemm(way: str, device: torch.device, dtype: torch.dtype):
    n = GEMM_SIZE[device.type]
    a, b = torch.randn(2, n, n, device=device).to(dtype).unbind()
    return lambda: GEMM_WAYS[device.type][way](a, b)


def gemm_flops(device: torch.device) -> int:
    return 2 * GEMM_SIZE[device.type] ** 3


def read(way: str, tensors: list[Tensor]) -> list[Tensor]:
    """Reads every byte of dense tensors once."""
    return [READ_WAYS[way](t.as_strided((t.numel(),), (1,)).view(torch.float32)) for t in tensors]


def dispatch(device: torch.device) -> dict:
    """Seconds of a tiny forward call: the public operator, and the plain C++ operator that it calls."""
    q, v = torch.randn(2, 1, 1, 4, 16, device=device).unbind()
    compiled = SUFFIXES[choose_backend("linear", device, q.dtype, q.shape)] == ""

    def per_call(function, calls=200):
        return seconds(lambda: [function() for _ in range(calls)], device, repeats=15) / calls

    found = {"public": per_call(lambda: torch.ops.infsa.linear(q, q, v))}
    if compiled:
        with torch._C._AutoDispatchBelowAutograd():
            found["kernel"] = per_call(lambda: torch.ops.infsa.linear_fwd(q, None, v, 1e-6, 1.0, None, None, None))
    return found


def seconds(function, device: torch.device, repeats: int = 5) -> float:
    def timed():
        begin = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begin

    timed()
    return statistics.median(timed() for _ in range(repeats))


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as f:
            return next(line.split(":", 1)[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _isa() -> str | None:
    try:
        from infsa_kernels import _C
    except ImportError:
        return None
    return _C.cpu_isa


def _commit() -> str | None:
    def git(*args):
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changes = git("diff", "HEAD")
        digest = "+changes-" + hashlib.sha1(changes.encode()).hexdigest()[:6] if changes else ""
        return git("rev-parse", "--short=12", "HEAD") + digest
    except (OSError, subprocess.CalledProcessError):
        return None

"""The machine: what it is, how much memory is free, and how busy others keep it."""

import datetime
import hashlib
import os
import platform
import subprocess
from pathlib import Path

import psutil
import torch

import infsa_kernels

ROOT = Path(__file__).parent.parent
TIMER = {"cpu": "wall clock, calls in turn", "cuda": "CUDA events, L2 cold, calls in turn"}


def environment(device: torch.device) -> dict:
    cuda = device.type == "cuda"
    return {
        "device_type": device.type, "device": torch.cuda.get_device_name(device) if cuda else _cpu_model(), "isa": _isa(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(), "system": platform.platform(), "python": platform.python_version(),
        "torch": torch.__version__, "infsa_kernels": infsa_kernels.__version__, "commit": _commit(),
        "backend": infsa_kernels.choose_backend("linear", device, torch.float32, (1, 16, 4096, 64)),
        "timer": TIMER[device.type], "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **({"cuda": torch.version.cuda} if cuda else {}),
    }  # fmt: skip


def describe(facts: dict) -> str:
    """An environment in a line."""
    return (
        f"{facts['device']}, {facts['threads']} threads on {facts['cores']} cores, {facts['isa'] or 'no extension'}; torch "
        f"{facts['torch']}; infsa_kernels {facts['infsa_kernels']} at {facts['commit']}, backend {facts['backend']}; "
        f"{facts['date'][:16]}; {facts['timer']}"
    )


class OtherLoad:
    """Which part of the processor's time others than this process took since this object was made."""

    def __init__(self):
        self._begin = self._seconds()

    def share(self) -> float:
        total, idle, own = (now - then for now, then in zip(self._seconds(), self._begin))
        return max(0.0, total - idle - own) / total if total else 0.0

    def _seconds(self) -> tuple[float, float, float]:
        every = psutil.cpu_times()
        # Linux counts what its guests take in user and nice too.
        total = sum(every) - getattr(every, "guest", 0.0) - getattr(every, "guest_nice", 0.0)
        return total, every.idle + getattr(every, "iowait", 0.0), sum(os.times()[:4])


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

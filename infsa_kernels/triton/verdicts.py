"""Verdicts on disk: what the checks before first use (first_use.py) found, and what of a machine each is true for."""

import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import triton

from ..ops.extension import LIBRARY


def read(variant, device: torch.device) -> str | None:
    """What failed, or None for a variant that passed here, in this process or another.

    Raises:
        LookupError: nothing is known, or what is written down cannot be read.
    """
    try:
        return json.loads(_file(variant, device).read_text())["failure"]
    except (OSError, ValueError, KeyError):
        raise LookupError(str(variant)) from None


def write(variant, device: torch.device, failure: str | None) -> None:
    """At once or not at all, beside other processes that may write the same; not being able to costs another check."""
    file = _file(variant, device)
    content = {"variant": str(variant), "failure": failure, "machine": machine(device, variant.backend)}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, suffix=".part", delete=False) as part:
            json.dump(content, part, indent=1)
        os.replace(part.name, file)
    except OSError:
        pass


def all_of(device: torch.device) -> Iterator[tuple[str, str | None]]:
    """Each variant in words, and what failed."""
    for backend in ("triton", *["cuda"] * LIBRARY.exists()):
        for file in sorted(_folder(device, backend).glob("*.json")):
            try:
                verdict = json.loads(file.read_text())
                yield verdict["variant"], verdict["failure"]
            except (OSError, ValueError, KeyError):
                continue


def _file(variant, device: torch.device) -> Path:
    return _folder(device, variant.backend) / f"{hashlib.sha256(str(variant).encode()).hexdigest()[:32]}.json"


def _folder(device: torch.device, backend: str) -> Path:
    """Of the verdicts on this machine: below INFSA_CACHE_DIR, or where caches lie."""
    given = os.environ.get("INFSA_CACHE_DIR")
    root = Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "infsa_kernels"
    key = json.dumps(machine(device, backend), sort_keys=True)
    return root / "verdicts" / hashlib.sha256(key.encode()).hexdigest()[:16]


@functools.cache
def machine(device: torch.device, backend: str = "triton") -> dict[str, str]:
    """All that a verdict is true for: of CUDA C++ the library's build, which holds its machine code."""
    found = {"GPU": gpu_name(device), "torch": torch.__version__, "CUDA": str(torch.version.cuda), "driver": _driver()}
    if backend == "cuda":
        check = (Path(__file__).with_name(f"{name}.py") for name in ("first_use", "known_calls", "known_attention"))
        return found | {"library": _digest(LIBRARY), "check": _digest(*check)}
    found |= {"Triton": triton.__version__, "sources": _digest(*Path(__file__).parent.glob("*.py"))}
    found |= {"HIP": str(torch.version.hip)}
    if torch.version.cuda:
        ptxas = triton.knobs.nvidia.ptxas
        found |= {"ptxas": f"{ptxas.path} {ptxas.version}"}
    return found | {name: value for name, value in os.environ.items() if name.startswith("TRITON_")}


def gpu_name(device: torch.device) -> str:
    if device.type != "cuda":
        return str(device)
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name} ({properties.major}.{properties.minor})"


def _driver() -> str:
    """The driver's version, as the kernel module says it."""
    for file in ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version"):
        try:
            return Path(file).read_text().splitlines()[0]
        except OSError:
            continue
    return "unknown"


def _digest(*files: Path) -> str:
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()[:16]

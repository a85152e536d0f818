"""`python -m infsa_kernels.info`: what is installed, how it was built, and which backends run here and why the others do not.

With ``--check`` the kernels for GPUs are checked now, as they else are before their first use; exit code 1 if one failed.
"""

import argparse
import os
import platform
import sys

import torch

from . import __version__
from .memory import kept_memory, most_kept_memory
from .ops import launch_bound
from .ops.backends import OPERATORS, SUFFIXES, explain_backend
from .ops.extension import PACKAGE
from .reference import ACTIVATIONS


def describe() -> str:
    """The report as text."""
    lines = [
        f"infsa_kernels  {__version__} in {PACKAGE}",
        f"torch          {torch.__version__} (CUDA {torch.version.cuda or 'none'})",
        f"triton         {_triton_version()}",
        f"python         {platform.python_version()} on {platform.machine()} {platform.system()}",
        f"extension      {_extension()}",
        f"memory         {kept_memory() >> 20} MB of at most {most_kept_memory() >> 20} MB are kept for the next call on the CPU",
    ]
    for device in _devices():
        lines += ["", f"{device}  {_device_name(device)}"]
        lines += _backends(device) + _choice(device) + _verdicts(device)
    return "\n".join(lines)


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return "not installed"
    return triton.__version__


def _extension() -> str:
    try:
        from . import _C
    except ImportError:
        return "none; the backends below say why"
    cuda = f"CUDA kernels for {_C.cuda_arch_list}" if _C.cuda_arch_list else "no CUDA kernels"
    return (
        f"for every torch from 2.10 on, built with torch {_C.torch_version} and compiler {_C.compiler}, CPU kernels for "
        f"{_C.cpu_isa}, {cuda}"
    )


def _backends(device: torch.device) -> list[str]:
    """A line for every backend and reason, with the operators that it concerns."""
    reasons = {op: explain_backend(op, device, torch.float32, (1, 1, 1, 64)) for op in OPERATORS}
    lines = []
    for name in SUFFIXES:
        for reason in dict.fromkeys(reasons[op][name] for op in OPERATORS):
            ops = ", ".join(op for op in OPERATORS if reasons[op][name] == reason)
            lines.append(f"  {name:<7} {ops}: {'runs' if reason is None else 'does not run: ' + reason}")
    return [*lines, f"  eager   alone runs linear and pure with the activations {', '.join(list(ACTIVATIONS)[1:])}"]


def _choice(device: torch.device) -> list[str]:
    """What CUDA C++ takes from Triton by default, where it runs."""
    if not (sizes := launch_bound.sizes_on(device)):
        return []
    if os.environ.get("INFSA_CUDA") == "0":
        return ["  by default CUDA C++ takes no call (INFSA_CUDA=0)"]
    if not sizes.most_bytes:
        return [f"  by default CUDA C++ takes no call here: {sizes.reason}"]
    unchecked = " unchecked (INFSA_CUDA=1)" if os.environ.get("INFSA_CUDA") == "1" else ""
    return [
        f"  by default CUDA C++ takes calls of linear{unchecked} with up to {sizes.most_bytes >> 20} MB of q, k and v, "
        f"{sizes.most_head_bytes >> 10} KB a head: {sizes.reason}"
    ]


def _verdicts(device: torch.device) -> list[str]:
    """What the checks before first use have found on this machine so far, in any process."""
    if device.type != "cuda" or explain_backend("pure", device, torch.float32, (1, 1, 1, 64))["triton"]:
        return []
    from .triton import first_use

    found = first_use.known(device)
    passed = sum(reason is None for reason in found.values())
    lines = [f"  kernels checked before first use: {passed} passed, {len(found) - passed} failed (--check: all, now)"]
    return lines + [f"    {variant}: {reason}" for variant, reason in found.items() if reason]


def check() -> int:
    """Checks the kernels for GPUs on every GPU, each in a process of its own, and prints a line for each."""
    gpus = [device for device in _devices() if device.type == "cuda"]
    if not gpus:
        print("There is no GPU to check kernels on: torch.cuda.is_available() is False")
        return 1
    failed = 0
    for device in gpus:
        if reason := explain_backend("pure", device, torch.float32, (1, 1, 1, 64))["triton"]:
            print(f"{device}: {reason}")
            failed += 1
            continue
        from .triton import first_use

        for variant, failure in first_use.check_all(device):
            print(f"{device} {variant}: {failure or 'passed'}", flush=True)
            failed += failure is not None
    return int(failed > 0)


def _devices() -> list[torch.device]:
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return [torch.device("cpu"), *(torch.device("cuda", i) for i in gpus)]


def _device_name(device: torch.device) -> str:
    if device.type == "cpu":
        return f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, sm_{properties.major}{properties.minor}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m infsa_kernels.info", description=__doc__)
    parser.add_argument("--check", action="store_true", help="check the kernels for GPUs of this machine now")
    arguments = parser.parse_args()
    code = check() if arguments.check else 0
    print(describe())
    sys.exit(code)

"""`python -m infsa_kernels.info`: what is installed, how it was built, and which backends run here and why the others do not."""

import platform

import torch

from . import __version__
from .ops.backends import OPERATORS, SUFFIXES, explain_backend
from .ops.extension import PACKAGE


def describe() -> str:
    """The report as text."""
    lines = [
        f"infsa_kernels  {__version__} in {PACKAGE}",
        f"torch          {torch.__version__} (CUDA {torch.version.cuda or 'none'})",
        f"triton         {_triton_version()}",
        f"python         {platform.python_version()} on {platform.machine()} {platform.system()}",
        f"extension      {_extension()}",
    ]
    for device in _devices():
        lines += ["", f"{device}  {_device_name(device)}"]
        lines += _backends(device)
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
    return f"built for torch {_C.torch_version} with compiler {_C.compiler}, CPU kernels for {_C.cpu_isa}, {cuda}"


def _backends(device: torch.device) -> list[str]:
    """A line for every backend and reason, with the operators that it concerns."""
    reasons = {op: explain_backend(op, device, torch.float32, (1, 1, 1, 64)) for op in OPERATORS}
    lines = []
    for name in SUFFIXES:
        for reason in dict.fromkeys(reasons[op][name] for op in OPERATORS):
            ops = ", ".join(op for op in OPERATORS if reasons[op][name] == reason)
            lines.append(f"  {name:<7} {ops}: {'runs' if reason is None else 'does not run: ' + reason}")
    return lines


def _devices() -> list[torch.device]:
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return [torch.device("cpu"), *(torch.device("cuda", i) for i in gpus)]


def _device_name(device: torch.device) -> str:
    if device.type == "cpu":
        return f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, sm_{properties.major}{properties.minor}"


if __name__ == "__main__":
    print(describe())

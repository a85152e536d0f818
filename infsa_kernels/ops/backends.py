"""Backends: which of them can run a call and why the others cannot, the choice of one, and `with backend(...)`."""

import functools
import os
import warnings
from collections.abc import Sequence

import torch
from torch.overrides import TorchFunctionMode

from ..torch_private import get_in_backward, set_for_backward
from . import extension

# Suffix of the raw operators of each backend.
SUFFIXES = {"cpu": "", "cuda": "", "triton": "_triton", "eager": "_eager"}

# Backends tried in order, by device type. One that comes after another with kernels of the operator is a fall-back, and is
# warned of once. Kernels for GPUs are checked before their first use on a machine (triton/first_use.py). CUDA C++ takes small
# calls of Linear before these are asked (launch_bound.py).
PREFERENCE = {"cpu": ("cpu", "eager"), "cuda": ("triton", "eager")}


_extension_error = extension.load()
# A source folder that hides an installed package has said so already.
_warned_of_fallback = bool(_extension_error and extension.shadowed_package())


# The public operators, and which backends have kernels of each. register.py writes them down.
OPERATORS: dict[str, frozenset[str]] = {}


def why_not(
    op: str, backend: str, device: torch.device, dtype: torch.dtype, shape: Sequence[int], activation: str = "relu"
) -> str | None:
    """Why a backend cannot run `infsa::<op>` on q of this device, dtype and shape (B, H, N, d); None if it can."""
    if op not in OPERATORS:
        raise ValueError(f"infsa_kernels has no operator {op!r}, expected one of {', '.join(map(repr, OPERATORS))}")
    if backend == "eager":
        return None
    if activation != "relu" and backend in SUFFIXES:
        return f"activation is {activation!r}, and kernels have 'relu' only: the others run in torch operations, as 'eager' does"
    if backend == "cpu":
        if device.type != "cpu":
            return f"the tensors are on {device}, not on the CPU"
        if "cpu" not in OPERATORS[op]:
            return f"infsa::{op} has no C++ kernels for the CPU"
        return _extension_error
    if backend == "cuda":
        return _why_not_cuda(op, device, dtype, shape)
    if backend == "triton":
        return _why_not_triton(op, device, dtype, shape)
    raise ValueError(f"infsa_kernels has no backend {backend!r}, expected one of {', '.join(map(repr, SUFFIXES))}")


NO_GPU = "torch sees no GPU (torch.cuda.is_available() is False)"


@functools.cache
def _capability(device: torch.device) -> tuple[int, int] | None:
    """A GPU's compute capability, of which torch takes microseconds to tell; None where it sees no GPU."""
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else None


# A row lies in one warp, 8 elements a lane: csrc/cuda/linear_plan.h.
LARGEST_CUDA_HEAD_DIM = 256


def _why_not_cuda(op: str, device: torch.device, dtype: torch.dtype, shape: Sequence[int]) -> str | None:
    if device.type != "cuda":
        return f"the tensors are on {device}, not on a GPU"
    if _extension_error:
        return _extension_error
    if not (compiled := _compiled_architectures()):
        return (
            "the extension was built without CUDA kernels; build it again beside a CUDA build of torch, with "
            f"`FORCE_CUDA=1 {extension.build_command()}`"
        )
    if "cuda" not in OPERATORS[op]:
        return f"infsa::{op} has no CUDA C++ kernels"
    capability = _capability(device)
    if not capability:
        return NO_GPU
    major, minor = capability
    if not any(runs_on(arch, capability) for arch in compiled):
        return (
            f"{device} has compute capability {major}.{minor}, and the extension was built for {', '.join(compiled)}; build "
            f"it again with TORCH_CUDA_ARCH_LIST={major}.{minor}"
        )
    if dtype == torch.float64:
        return "float64 has no CUDA C++ kernel: it is there to check gradients, for which the eager backend is exact enough"
    if shape[-1] > LARGEST_CUDA_HEAD_DIM:
        return f"head_dim {shape[-1]} is above {LARGEST_CUDA_HEAD_DIM}"
    return None


@functools.cache
def _compiled_architectures() -> list[str]:
    """As in TORCH_CUDA_ARCH_LIST: "8.0", "9.0a", "12.0+PTX"."""
    from .. import _C

    return [arch for arch in _C.cuda_arch_list.split(",") if arch]


def runs_on(arch: str, capability: tuple[int, int]) -> bool:
    """Whether code compiled for ``arch`` runs on a GPU of this compute capability."""
    number, _, ptx = arch.partition("+")
    major, minor = (int(part) for part in number.rstrip("af").split("."))
    if number.endswith("a"):
        return capability == (major, minor)
    return (capability[0] == major and capability[1] >= minor) or (bool(ptx) and capability >= (major, minor))


# The oldest Triton that the kernels are compiled and tested with. Versions 3.4 to 3.7.0 miscompile
# tl.dot(tl.trans(result of a dot)) on Hopper; the kernels form no such product, so none of these versions is refused.
# On datacenter Blackwell older ones lose a product that is added to another's result, or fetch small tensors wrongly.
OLDEST_TRITON, OLDEST_TRITON_BLACKWELL = (3, 6), (3, 9)

# Larger heads would leave Pure's tiles no room in shared memory.
LARGEST_TRITON_HEAD_DIM = 256


@functools.cache
def _why_no_triton(oldest: tuple[int, int] = OLDEST_TRITON) -> str | None:
    try:
        from triton import __version__ as version
    except ImportError as error:
        return f"Triton does not import ({error}); `pip install triton`"
    if tuple(int(part) for part in version.split(".")[:2]) < oldest:
        where = "these kernels" if oldest == OLDEST_TRITON else "these kernels for compute capability 10"
        return f"Triton {version} is older than {'.'.join(map(str, oldest))}, the oldest {where} are tested with"
    return None


def _why_not_triton(op: str, device: torch.device, dtype: torch.dtype, shape: Sequence[int]) -> str | None:
    oldest = OLDEST_TRITON
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":
            return (
                "the tensors are on the CPU, where Triton runs only as an interpreter, for tests (TRITON_INTERPRET=1)"
            )
    elif device.type != "cuda":
        return f"the tensors are on {device}, not on a GPU"
    elif not (capability := _capability(device)):
        return NO_GPU
    elif torch.version.hip is None:
        major, minor = capability
        if major < 8:
            return f"{device} has compute capability {major}.{minor}, the kernels need 8.0 (Ampere) or newer"
        oldest = OLDEST_TRITON_BLACKWELL if major == 10 else OLDEST_TRITON
    if dtype == torch.float64:
        return (
            "float64 has no Triton kernel: it is there to check gradients, for which the eager backend is exact enough"
        )
    if "triton" not in OPERATORS[op]:
        return f"infsa::{op} has no Triton kernels"
    if torch.version.hip and op.startswith(("linear", "sharded_linear")):
        return "AMD: its partial sums meet in one launch, in an order of memory that is proven for NVIDIA only"
    if shape[-1] > LARGEST_TRITON_HEAD_DIM:
        return f"head_dim {shape[-1]} is above {LARGEST_TRITON_HEAD_DIM}"
    return _why_no_triton(oldest)


def choose_backend(
    op: str, device: torch.device, dtype: torch.dtype, shape: Sequence[int], forced: str = ""
) -> str:  # fmt: skip
    """The backend that runs `infsa::<op>` on q of this device, dtype and shape (B, H, N, d), if CUDA C++ does not take the call.

    ``op`` is a public operator: "linear", "pure", "pooled_linear", "linear_varlen" or "pure_varlen", whose shape is (N, H, d).
    ``forced`` names a backend, as ``with infsa_kernels.backend(...)`` does: it is that one or a RuntimeError that says why not.
    """
    if forced:
        return force(op, forced, device, dtype, shape)
    refused = None
    for name in PREFERENCE.get(device.type, ("eager",)):
        if name not in OPERATORS.get(op, SUFFIXES) or (name == "triton" and os.environ.get("INFSA_TRITON") == "0"):
            continue
        reason = why_not(op, name, device, dtype, shape)
        if reason is None:
            break
        refused = refused or (name, reason)
    if refused:
        _warn_of_fallback(name, *refused)
    return name


def force(
    op: str, name: str, device: torch.device, dtype: torch.dtype, shape: Sequence[int], activation: str = "relu"
) -> str:
    """``name``, or the RuntimeError that says why that backend cannot run the call."""
    if reason := why_not(op, name, device, dtype, shape, activation):
        raise RuntimeError(f"infsa_kernels: backend {name!r} cannot run this call: {reason}")
    return name


def explain_backend(
    op: str, device: torch.device, dtype: torch.dtype, shape: Sequence[int], activation: str = "relu"
) -> dict[str, str | None]:
    """Every backend and why it cannot run `infsa::<op>` on q of this device, dtype and shape (B, H, N, d); None where it can.

    ``activation``, for linear and pure, as in :func:`infsa_kernels.linear_infsa`.
    """
    return {name: why_not(op, name, device, dtype, shape, activation) for name in SUFFIXES}


def _warn_of_fallback(used: str, wanted: str, reason: str) -> None:
    global _warned_of_fallback
    if not _warned_of_fallback:
        _warned_of_fallback = True
        warnings.warn(f"infsa_kernels runs its slower {used!r} backend: {wanted!r} cannot run: {reason}", stacklevel=4)


class backend(TorchFunctionMode):
    """Runs every InfSA operator inside the ``with`` block on one backend: "cpu", "cuda", "triton" or "eager".

    Like ``torch.nn.attention.sdpa_kernel``: per thread, nestable (the innermost wins), undone on exception, and safe under
    ``torch.compile``, inside the compiled function as well as around it. The backward pass of an operator runs on the
    backend that ran its forward pass. A call that the backend cannot run raises RuntimeError with the reason; nothing else
    is tried in its stead.

    Example::

        with infsa_kernels.backend("eager"):
            z = torch.ops.infsa.linear(q, k, v)
    """

    def __init__(self, name: str):
        if name not in SUFFIXES:
            raise ValueError(f"infsa_kernels.backend: got {name!r}, expected one of {', '.join(map(repr, SUFFIXES))}")
        super().__init__()
        self.name = name

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        at = takes_backend.get(func)
        if at is not None:
            if len(args) > at:
                args = *args[:at], args[at] or self.name, *args[at + 1 :]
            elif not kwargs.get("backend"):
                kwargs = {**kwargs, "backend": self.name}
        elif func in _RUN_BACKWARD and not torch.compiler.is_compiling() and not backend_of_backward():
            # They run with this mode off, and with them whatever is recomputed for them, as by torch.utils.checkpoint.
            set_for_backward(_BACKEND_OF_BACKWARD, self.name)
            try:
                return func(*args, **kwargs)
            finally:
                set_for_backward(_BACKEND_OF_BACKWARD, "")
        return func(*args, **kwargs)


# The public operators (packets and overloads), and how many arguments come before their `backend`.
takes_backend: dict = {}

_RUN_BACKWARD = {torch.Tensor.backward, torch.autograd.backward, torch.autograd.grad}

_BACKEND_OF_BACKWARD = "infsa_kernels.backend_of_backward"


def backend_of_backward() -> str:
    """The backend that was asked for around the backward pass in which we are; "" if none, or in no backward pass."""
    return get_in_backward(_BACKEND_OF_BACKWARD)

"""The one operator library `infsa`, the compiled extension behind it, and the choice of a backend.

A backend is a set of raw operators of one schema: `infsa::linear_fwd` (compiled: CPU C++ or CUDA C++, by the tensors' device)
and `infsa::linear_fwd_eager` (torch operations), and so on. The public operators ask :func:`choose_backend` which set to call.
"""

import warnings
from collections.abc import Sequence

import torch
from torch.overrides import TorchFunctionMode

library = torch.library.Library("infsa", "DEF")

# Suffix of the raw operators of each backend.
SUFFIXES = {"cpu": "", "cuda": "", "triton": "_triton", "eager": "_eager"}

# Backends tried in order, by device type. A later one than the first is a fall-back, and is warned of once.
PREFERENCE = {"cpu": ("cpu", "eager")}


def _load_extension() -> str | None:
    """Loads `_C`, which registers the compiled kernels. Returns why there is none, or None."""
    try:
        from .. import _C
    except ImportError as error:
        if "_C" in str(error) and "cannot import name" in str(error):
            return "the compiled extension was not built (INFSA_NO_EXT=1, or a source tree that was never installed)"
        return (
            f"the compiled extension does not load beside torch {torch.__version__} ({error}); build it again with "
            "`pip install --no-build-isolation --force-reinstall --no-deps .`"
        )
    if _C.torch_version.split("+")[0] != torch.__version__.split("+")[0]:
        warnings.warn(
            f"infsa_kernels was built for torch {_C.torch_version} and runs beside torch {torch.__version__}; if anything "
            "fails, build it again with `pip install --no-build-isolation --force-reinstall --no-deps .`",
            stacklevel=2,
        )
    return None


_extension_error = _load_extension()
_warned_of_fallback = False


def why_not(backend: str, device: torch.device, dtype: torch.dtype, shape: Sequence[int]) -> str | None:
    """Why a backend cannot run q of this device, dtype and shape (B, H, N, d); None if it can."""
    if backend == "eager":
        return None
    if backend == "cpu":
        if device.type != "cpu":
            return f"the tensors are on {device}, not on the CPU"
        return _extension_error
    if backend == "cuda":
        return "this version has no CUDA C++ kernels"
    if backend == "triton":
        return "this version has no Triton kernels"
    raise ValueError(f"infsa_kernels has no backend {backend!r}, expected one of {', '.join(map(repr, SUFFIXES))}")


def choose_backend(device: torch.device, dtype: torch.dtype, shape: Sequence[int], forced: str = "") -> str:
    """The backend that runs q of this device, dtype and shape (B, H, N, d).

    ``forced`` names one, as ``with infsa_kernels.backend(...)`` does: it is that one or a RuntimeError that says why not.
    """
    if forced:
        if reason := why_not(forced, device, dtype, shape):
            raise RuntimeError(f"infsa_kernels: backend {forced!r} cannot run this call: {reason}")
        return forced
    names = PREFERENCE.get(device.type, ("eager",))
    for name in names:
        if why_not(name, device, dtype, shape) is None:
            break
    if name != names[0]:
        _warn_of_fallback(name, names[0], why_not(names[0], device, dtype, shape))
    return name


def explain_backend(device: torch.device, dtype: torch.dtype, shape: Sequence[int]) -> dict[str, str | None]:
    """Every backend and the reason it cannot run q of this device, dtype and shape (B, H, N, d); None where it can."""
    return {name: why_not(name, device, dtype, shape) for name in SUFFIXES}


def _warn_of_fallback(used: str, wanted: str, reason: str) -> None:
    global _warned_of_fallback
    if not _warned_of_fallback:
        _warned_of_fallback = True
        warnings.warn(
            f"infsa_kernels runs its slower {used!r} backend: {wanted!r} cannot run: {reason}", stacklevel=4
        )


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
        if func in _takes_backend and len(args) <= _BACKEND_ARGUMENT and not kwargs.get("backend"):
            kwargs = {**kwargs, "backend": self.name}
        return func(*args, **kwargs)


# The public operators (packets and overloads) and the position of their `backend` argument.
_takes_backend: set = set()
_BACKEND_ARGUMENT = 7

"""Public operators: composite ops that choose a backend and call its raw ops."""

import contextlib
import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function

from . import check
from .autograd import AUTOCAST_KEYS
from .backends import _takes_backend, library

P = ParamSpec("P")
R = TypeVar("R")


def overridable(function: Callable[P, R]) -> Callable[P, R]:
    """A call with a stand-in for a tensor, such as torch.fx's Proxy, is the stand-in's to handle, by __torch_function__."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        given = (*args, *kwargs.values())
        # Also true for subclasses of Tensor and under modes: the operators inside are what these want to see.
        if has_torch_function(given):
            stand_ins = [a for a in given if not isinstance(a, Tensor) and hasattr(type(a), "__torch_function__")]
            if stand_ins:
                return handle_torch_function(call, stand_ins, *args, **kwargs)
        return function(*args, **kwargs)

    return call


def define(name: str, schemas: dict[str, str], call, cast_arguments) -> list[torch._ops.OpOverload]:
    """Defines the overloads of `infsa::<name>`, every one of which is ``call``.

    Args:
        schemas: argument list (which ends with "str backend=''") by overload name, "" for the default one.
        cast_arguments: (dtype_of, args, kwargs) -> the args and kwargs of the same call with what autocast concerns cast;
            dtype_of says in which dtype autocast takes a tensor.
    """
    for overload, arguments in schemas.items():
        library.define(f"{name}{overload and '.'}{overload}({arguments}) -> Tensor")
    packet = getattr(torch.ops.infsa, name)
    overloads = [getattr(packet, overload or "default") for overload in schemas]
    call = _naming_real_tensors(f"infsa::{name}", [a.name for a in overloads[0]._schema.arguments], call)
    for overload in overloads:
        autocasts = {device: _autocast(overload, device, cast_arguments) for device in ("cpu", "cuda")}
        for device, autocast in autocasts.items():
            library.impl(overload, autocast, f"Autocast{device.upper()}")
        library.impl(overload, call, "CompositeImplicitAutograd")
        library.impl(overload, _batched(call, autocasts), "FuncTorchBatched")
    positional = sum(not argument.kwarg_only for argument in overloads[0]._schema.arguments)
    backend_at = positional - (not overloads[0]._schema.arguments[-1].kwarg_only)
    _takes_backend.update(dict.fromkeys((packet, *overloads), backend_at))
    return overloads


def _naming_real_tensors(op, names, call):
    def run(*args, **kwargs):
        try:
            return call(*args, **kwargs)
        except AssertionError as error:
            if "FakeTensor" in str(error) and (told := check.real_among_fake(op, dict(zip(names, args)) | kwargs)):
                raise told from error
            raise

    return run


def _autocast(overload, device, cast_arguments):
    def dtype_of(t):
        eligible = t.is_floating_point() and t.dtype != torch.float64 and t.device.type == device
        return torch.get_autocast_dtype(device) if eligible else t.dtype

    def autocast(*args, **kwargs):
        with torch._C._ExcludeDispatchKeyGuard(AUTOCAST_KEYS):
            args, kwargs = cast_arguments(dtype_of, args, kwargs)
            return overload(*args, **kwargs)

    return autocast


def _batched(call, autocasts):
    # vmap comes before autocast, and this operator is gone when autocast's turn would be.
    def batched(x, *args, **kwargs):
        device = x.device.type
        autocast = device in autocasts and torch.is_autocast_enabled(device)
        return (autocasts[device] if autocast else call)(x, *args, **kwargs)

    return batched


def without_autograd_if_unused(*tensors):
    """Skips the Autograd kernels, and their Python, for calls that nothing differentiates."""
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if needs_grad or forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        return contextlib.nullcontext()
    return torch._C._AutoDispatchBelowAutograd()

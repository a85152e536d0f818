"""Registers operators that are a part of one: each works on some of the tokens, and its caller knows the others.

They have fakes and FLOP counts as raw operators do (register.RawOps), and no derivative: what they are parts of has one.
"""

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple, TypeVar

import torch
from torch.utils.flop_counter import register_flop_formula

from . import autograd, backends, extension
from .check import Signature
from .extension import torch_ops
from .register import KEYS, library

Ops = TypeVar("Ops", bound=tuple)


class Step(NamedTuple):
    schema: str  # without the name
    tensors: dict[str, str]  # what check.Signature knows of them
    fake: Callable  # (suffix of the backend, *arguments that were checked)
    flops: Callable  # of shapes, as torch.utils.flop_counter gives them
    stand_ins: dict[str, str] | None = None  # the same
    more: Callable | None = None  # the same


def define(
    name: str, kind: type[Ops], steps: Ops, kernels: dict[str, str | ModuleType], instead: str
) -> dict[str, Ops]:
    """Operators `infsa::<name>_<step>` for every family of backends: those of each backend.

    Args:
        name: their family, by which backends.choose_backend knows them.
        kind: the named tuple of the operators.
        steps: a :class:`Step` for each.
        kernels: by backend, a C++ file, or a Python module, or its name, with a function for each step.
        instead: what has a derivative.
    """
    backends.OPERATORS[name] = frozenset(kernels)
    by_suffix = {}
    for suffix in dict.fromkeys(backends.SUFFIXES[backend] for backend in kernels):
        ops = []
        for step, (schema, tensors, fake, flops, stand_ins, more) in zip(kind._fields, steps):
            signature = Signature(f"{name}_{step}{schema}", tensors, stand_ins, more)
            library.define(f"{name}_{step}{suffix}{schema}")
            op = getattr(torch_ops, f"{name}_{step}{suffix}").default
            torch.library.register_fake(op.name(), _checked(signature, fake, suffix), lib=library)
            register_flop_formula(op.overloadpacket)(flops)
            library.impl(op, autograd.no_derivative(op, signature, instead), "Autograd", with_keyset=True)
            for backend, keys in KEYS.items():
                for key in keys if backend in kernels and backends.SUFFIXES[backend] == suffix else ():
                    kernel = _in_python(kernels[backend], step)
                    library.impl(op, autograd.without_autocast(_checked(signature, kernel)), key)
            ops.append(op)
        by_suffix[suffix] = kind(*ops)
    return {backend: by_suffix[backends.SUFFIXES[backend]] for backend in kernels}


def _checked(signature, function, *before):
    def call(*arguments):
        signature.check(arguments)
        return function(*before, *arguments)

    return call


def _in_python(kernels, step):
    def call(*arguments):
        module = importlib.import_module(kernels, extension.NAME) if isinstance(kernels, str) else kernels
        return getattr(module, step)(*arguments)

    return call

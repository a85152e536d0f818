"""Registers operators with torch, from their schemas and the dimensions of their tensors.

A public operator, as `infsa::linear`, is composite: it checks its arguments, chooses a backend and calls raw operators. A raw
operator is a forward op and its backward op for every family of backends: `infsa::linear_fwd` (compiled: C++ for CPUs or for
CUDA, by the tensors' device), `infsa::linear_fwd_eager`, `infsa::linear_fwd_triton`. Autograd (autograd.py), vmap, fake tensors,
FLOP counts and DTensor belong to the raw ones.
"""

import contextlib
import functools
import importlib
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils.flop_counter import register_flop_formula

from ..torch_private import OpOverload, below_autocast
from . import autograd, backends, check, extension, sharding
from .backends import SUFFIXES
from .check import Signature
from .extension import torch_ops
from .plans import Plans, kind_of

P = ParamSpec("P")
R = TypeVar("R")

# Where a backend's kernels in Python are registered; extension.py registers the compiled ones.
KEYS = {"eager": ("CompositeExplicitAutograd",), "triton": ("CUDA", "CPU")}


def _library() -> torch.library.Library:
    try:
        return torch.library.Library(extension.NAMESPACE, "DEF")
    except RuntimeError as error:
        before = re.search(r"Previous registration of TORCH_LIBRARY was registered at (.+?):\d+;", str(error))
        if not before:
            raise
        here, there = (Path(file).parent.parent.resolve() for file in (__file__, before[1]))
        if here == there:
            told = (
                f"infsa_kernels was imported from {here} before in this process, and its modules were dropped or reloaded "
                "since (sys.modules, importlib.reload); torch takes the operators of torch.ops.infsa once: start Python anew"
            )
        else:
            told = (
                f"infsa_kernels was imported from {there} before in this process, and now there is a second copy at {here}; "
                "torch takes the operators of torch.ops.infsa once: uninstall one copy or take its folder from sys.path, "
                "and start Python anew"
            )
        raise RuntimeError(told) from None


library = _library()


RAW_OPS: list["RawOps"] = []


class RawOps:
    """Defines a forward op and its backward op for every family of backends.

    Backward takes, by name: the gradient dx of every output x that has one, what it needs of forward's arguments and outputs, and
    which gradients are wanted. It returns the gradient dx of every argument x that has one; (0,) stands for one not wanted.

    Args:
        forward, backward: their schemas.
        tensors, stand_ins: what is known of the tensors (check.Signature). "B" is the batch and "H" the heads: over these vmap
            and DTensor divide the work. The gradient of an argument without "B" is a sum over the batch.
        kernels: by backend, where its kernels are: a C++ file, or a Python module (or object) with ``forward(*arguments)`` and
            ``backward(*arguments, gradients)``, which fills the gradients that are not None. A module that is given by its name
            in this package is imported on first use, where the backend can run.
        formula: forward's differentiable outputs, as a tuple, in differentiable torch operations, for second derivatives.
        flops_forward, flops_backward: FLOPs from the sizes by letter.
        like: new outputs that are not laid out contiguously, from forward's arguments by name.
        more: what is demanded of arguments beyond their sizes and dtypes (check.Signature).
        counts: what FLOPs depend on beside the sizes, by name, from the arguments by name.
    """

    def __init__(
        self, *, forward: str, backward: str, tensors: dict[str, str], kernels: dict[str, object], formula: Callable,
        flops_forward: Callable, flops_backward: Callable, stand_ins: dict[str, str] | None = None,
        like: dict[str, Callable] | None = None, more: Callable | None = None, counts: Callable | None = None,
    ):  # fmt: skip
        self.forward, self.backward = (Signature(schema, tensors, stand_ins, more) for schema in (forward, backward))
        self.op, self.kernels, self.formula = self.forward.op, kernels, formula
        self.name = self.forward.name
        self.inputs = [result[1:] for result in self.backward.results]
        self._contiguous = tensors.keys() & self.backward.results
        self._like = like or {}
        self.ops: dict[str, OpOverload] = {}  # forward's, by backend
        self.forwards: dict[str, Callable] = self.ops  # what calls them, and tells their results to those who observe
        self._observers: list[Callable[[dict[str, Tensor]], None]] = []
        RAW_OPS.append(self)
        fakes = self._fake_forward, self._fake_backward
        for suffix in dict.fromkeys(SUFFIXES.values()):
            ops = []
            for signature, schema, fake, flops in zip(
                (self.forward, self.backward), (forward, backward), fakes, (flops_forward, flops_backward)
            ):
                name, rest = schema.split("(", 1)
                library.define(f"{name}{suffix}({rest}")
                op = getattr(torch_ops, name + suffix).default
                torch.library.register_fake(op.name(), fake, lib=library)
                torch.library.register_vmap(op, self._vmap(op, signature), lib=library)
                register_flop_formula(op.overloadpacket, get_raw=True)(_flop_formula(flops, signature, counts))
                sharding.shard(op, self._shardings(signature))
                ops.append(op)
            self.ops |= dict.fromkeys((backend for backend, own in SUFFIXES.items() if own == suffix), ops[0])
            in_python: list[dict[str, Callable]] = [{}, {}]
            for backend in (b for b in KEYS if SUFFIXES[b] == suffix and b in kernels):
                for op, by_key, kernel in zip(ops, in_python, (self._forward_in, self._backward_in)):
                    for key in KEYS[backend]:
                        by_key[key] = autograd.without_autocast(kernel(backend))
                        library.impl(op, by_key[key], key)
            for op, function in zip(ops, autograd.functions(self, *ops, *in_python)):
                library.impl(op, function, "Autograd", with_keyset=True)

    @contextlib.contextmanager
    def observed(self, observer: Callable[[dict[str, Tensor]], None]) -> Iterator[None]:
        """Inside, ``observer`` gets the results of every forward call by name. Calls that nobody observes pay nothing."""
        self._observers.append(observer)
        self._tell_observers()
        try:
            yield
        finally:
            self._observers.remove(observer)
            self._tell_observers()

    def _tell_observers(self) -> None:
        def telling(op):
            def call(*arguments):
                results = op(*arguments)
                for observer in tuple(self._observers):
                    observer(dict(zip(self.forward.results, results)))
                return results

            return call

        self.forwards = {name: telling(op) for name, op in self.ops.items()} if self._observers else self.ops

    def gradients(self, arguments: Sequence) -> list[Tensor | None]:
        """The wanted gradients of a backward call, uninitialised, laid out as what they belong to unless they are declared."""
        given = dict(zip(self.backward.arguments, arguments))
        wanted = [given[n] if want else None for n, want in zip(self.inputs, given["output_mask"])]
        return [
            t if t is None else t.new_empty(t.shape) if f"d{n}" in self._contiguous else torch.empty_like(t)
            for n, t in zip(self.inputs, wanted)
        ]

    def _results(self, gradients, arguments) -> tuple[Tensor, ...]:
        """The same as a backward op returns them, which cannot return None."""
        first = self.backward.first_of(arguments)
        return tuple(
            self.backward.empty(n, first, None) if t is None else t for n, t in zip(self.backward.results, gradients)
        )

    def _fake_forward(self, *arguments):
        sizes = self.forward.check(arguments)
        given, first = dict(zip(self.forward.arguments, arguments)), self.forward.first_of(arguments)
        return tuple(
            self._like[n](given) if n in self._like else self.forward.empty(n, first, sizes)
            for n in self.forward.results
        )

    def _fake_backward(self, *arguments):
        self.backward.check(arguments)
        return self._results(self.gradients(arguments), arguments)

    def _forward_in(self, backend):
        plans = Plans()

        def forward(*arguments):
            kind = kind_of(arguments) if backend == "triton" else ()
            run = plans.find(kind)
            if run is None:
                sizes = self.forward.check(arguments)
                run = plans.make(kind, self._module(backend, self.forward, arguments, sizes).forward, arguments)
            return run(*arguments)

        return forward

    def _backward_in(self, backend):
        plans = Plans()

        def backward(*arguments):
            kind = kind_of(arguments) if backend == "triton" else ()
            run = plans.find(kind)
            if run is None:
                sizes = self.backward.check(arguments)
            gradients = self.gradients(arguments)
            if any(gradient is not None for gradient in gradients):
                *taken, _ = arguments
                if run is None:
                    kernels = self._module(backend, self.backward, taken, sizes).backward
                    run = plans.make(kind, kernels, (*taken, gradients))
                run(*taken, gradients)
            return self._results(gradients, arguments)

        return backward

    def _module(self, backend, signature, arguments, sizes):
        kernels, first = self.kernels[backend], signature.first_of(arguments)
        if not isinstance(kernels, str):
            return kernels
        # Of tokens, what may be too large for a kernel is not their width but that of a head, where there is one.
        shape = *first.shape[:-1], sizes.get("d", 0)
        backends.choose_backend(self.name, first.device, first.dtype, shape, backend)
        direction = "forward" if signature is self.forward else "backward"
        if backend == "triton" and _first_use().failure(self.name, direction, arguments):
            return self.kernels["eager"]
        return importlib.import_module(kernels, extension.NAME)

    def _vmap(self, op, signature):
        """The batching rule: the mapped dimension folds into the batch, unless it reaches a tensor without one."""
        has_batch = {n for n, t in signature.tensors.items() if "B" in t.letters}
        names = signature.arguments

        def rule(info, in_dims, *args):
            mapped = {n for n, t, dim in zip(names, args, in_dims) if isinstance(t, Tensor) and dim is not None}
            if not has_batch >= {*mapped, *signature.results}:
                return in_turn(info.batch_size, in_dims, args)

            def fold(t, dim):
                t = t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
                return t.flatten(0, 1)

            folded = [
                fold(t, dim) if isinstance(t, Tensor) and n in has_batch else t
                for n, t, dim in zip(names, args, in_dims)
            ]
            outputs = op(*folded)
            # A gradient that nobody asked for is an empty tensor of one dimension; there is nothing to unfold.
            unfolded = [
                t.unflatten(0, (info.batch_size, t.shape[0] // info.batch_size)) if t.dim() > 1 else t for t in outputs
            ]
            return tuple(unfolded), tuple(0 if t.dim() > 1 else None for t in outputs)

        def in_turn(batch_size, in_dims, args):
            def one(i):
                return [t.select(dim, i) if isinstance(dim, int) else t for t, dim in zip(args, in_dims)]

            calls = [op(*one(i)) for i in range(batch_size)]
            return tuple(torch.stack(outputs) for outputs in zip(*calls)), (0,) * len(signature.results)

        return rule

    def _shardings(self, signature):
        """Per letter that may be sharded, where it lies in every argument and result; see sharding.shard."""

        def at(letter, n):
            dims = signature.tensors[n].letters
            return dims.index(letter) if letter in dims else -1

        def of_result(letter, n):
            # What forward returns is no sum: without the letter it does not depend on what has it.
            return None if signature is self.forward and letter not in signature.tensors[n].letters else at(letter, n)

        def existing(arguments) -> list[bool]:
            given = dict(zip(signature.arguments, arguments))
            if signature is self.forward:
                return [True] * len(signature.results)
            return [wanted and given[n] is not None for wanted, n in zip(given["output_mask"], self.inputs)]

        return [
            (
                [at(letter, n) if n in signature.tensors else None for n in signature.arguments],
                [of_result(letter, n) for n in signature.results],
            )
            for letter in "BH"
            if any(letter in tensor.letters for tensor in signature.tensors.values())
        ], existing


@functools.cache
def _first_use() -> ModuleType:
    return importlib.import_module(".triton.first_use", extension.NAME)


def _flop_formula(flops, signature, counts):
    def formula(*arguments, out_val=None, **kwargs):
        sizes = signature.sizes([a.shape if isinstance(a, Tensor) else a for a in arguments])
        return flops(**sizes, **(counts(dict(zip(signature.arguments, arguments))) if counts else {}))

    return formula


class PublicOp:
    """`infsa::<name>` and its overload for a rho that is a number, both of them ``composite``; called by schema order.

    Args:
        schema: as torch takes it; it has "Tensor? rho=None" and "str backend=''".
        tensors: dimensions and dtypes, as for check.Signature.
        raw: the raw operators behind it: a backend runs it that has kernels of all of them.
        cast: (dtype_of, args, kwargs) -> the args and kwargs of the same call with what autocast concerns cast; dtype_of says in
            which dtype autocast takes a tensor.
        composite: the operator in Python, with the defaults of the schema.
    """

    def __init__(
        self, schema: str, tensors: dict[str, str], raw: Sequence[RawOps], cast: Callable, composite: Callable
    ):
        self.signature = Signature(schema, tensors)
        name = self.signature.name
        backends.OPERATORS[name] = frozenset.intersection(*(frozenset(ops.kernels) for ops in raw))
        self._rho_at = self.signature.arguments.index("rho")
        library.define(schema)
        library.define(
            schema.replace(f"{name}(", f"{name}.scalar_rho(", 1).replace("Tensor? rho=None", "float rho=1.0")
        )
        self.composite, packet = composite, getattr(torch_ops, name)
        self._tensor_rho, self._scalar_rho = packet.default, packet.scalar_rho
        self.overloads = packet, packet.default, packet.scalar_rho
        call = _naming_real_tensors(self.signature, composite)
        for overload in (packet.default, packet.scalar_rho):
            autocasts = {device: _autocast(overload, device, cast) for device in ("cpu", "cuda")}
            for device, autocast in autocasts.items():
                library.impl(overload, autocast, f"Autocast{device.upper()}")
            library.impl(overload, call, "CompositeImplicitAutograd")
            library.impl(overload, _batched(call, autocasts), "FuncTorchBatched")
        backend_at = self.signature.arguments.index("backend")
        backends.takes_backend.update(dict.fromkeys(self.overloads, backend_at))

    def __call__(self, *arguments, **by_name) -> Tensor:
        self.signature.types(arguments, by_name)
        # Found by the packet, a number as rho costs 10 us: it has to fail at the other overload first.
        op = self._tensor_rho if isinstance(arguments[self._rho_at], Tensor) else self._scalar_rho
        return op(*arguments, **by_name)


def public(
    schema: str, tensors: dict[str, str], *, raw: Sequence[RawOps], cast: Callable
) -> Callable[[Callable], PublicOp]:
    """Makes a function the public operator of this schema: see PublicOp."""
    return functools.partial(PublicOp, schema, tensors, raw, cast)


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


def _naming_real_tensors(signature, composite):
    def call(*args, **kwargs):
        try:
            return composite(*args, **kwargs)
        except AssertionError as error:
            given = dict(zip(signature.arguments, args)) | kwargs
            if "FakeTensor" in str(error) and (told := check.real_among_fake(signature.op, given)):
                raise told from error
            raise

    return call


def _autocast(overload, device, cast):
    def dtype_of(t):
        eligible = t.is_floating_point() and t.dtype != torch.float64 and t.device.type == device
        return torch.get_autocast_dtype(device) if eligible else t.dtype

    def autocast(*args, **kwargs):
        with below_autocast():
            args, kwargs = cast(dtype_of, args, kwargs)
            return overload(*args, **kwargs)

    return autocast


def _batched(call, autocasts):
    # vmap comes before autocast, and this operator is gone when autocast's turn would be.
    def batched(x, *args, **kwargs):
        device = x.device.type
        autocast = device in autocasts and torch.is_autocast_enabled(device)
        return (autocasts[device] if autocast else call)(x, *args, **kwargs)

    return batched

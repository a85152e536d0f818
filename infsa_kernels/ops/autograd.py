"""Raw operators: a forward op and its backward op per family of backends, differentiable in every order.

Autograd, vmap, fake tensors, FLOP counts and DTensor belong to them, so that what calls them is plain composite code:

* Autograd: an autograd.Function at the Autograd key, entered for one level of a functorch stack at a time, so that
  `func.grad(func.grad(...))` and `vmap(grad(...))` nest. Forward-mode AD raises.
* The raw backward op is differentiable too, by differentiating a plain formula twice: exact, at that formula's memory cost.
* vmap: where every tensor starts with the batch dimension, a mapped dimension folds into it; else the calls run in turn.
"""

import functools
import re

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.utils.flop_counter import register_flop_formula

from . import sharding
from .backends import SUFFIXES, library

AUTOCAST_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU).add(torch._C.DispatchKey.AutocastCUDA)


class RawOps:
    """Defines `infsa::<name>_fwd(<tensors>, <rest>) -> <outputs>` and `infsa::<name>_bwd` for every family of backends.

    Backward takes the gradients of the differentiable outputs, the tensors, the saved outputs, the rest, and which of the
    gradients are wanted; a gradient that is not wanted comes back empty, of shape (0,).

    Args:
        tensors, rest: schemas of forward's arguments, in two parts: backward takes the saved outputs in between.
        dims: the dimensions of every tensor argument and output, one letter each; "B" is the batch, "H" the heads. An
            argument without "B" is shared by the batch, and its gradient is a sum over it.
        wrt: the arguments that have a gradient.
        outputs: forward's outputs by name; the first ``differentiable`` of them have a gradient, the rest are statistics.
        saved: the outputs that backward takes.
        formula: forward's differentiable outputs, as a tuple, in differentiable torch operations.
        fake_forward, fake_backward: check the arguments and return empty outputs of the right shape, dtype and strides.
        flops_forward, flops_backward: FLOPs from the shapes of ``tensors``; None where one is absent.
    """

    def __init__(
        self, name, *, tensors, rest, dims, wrt, outputs, saved, formula, fake_forward, fake_backward, flops_forward,
        flops_backward, differentiable=1,
    ):  # fmt: skip
        self.name, self.dims, self.wrt, self.outputs, self.saved = name, dims, wrt, outputs, saved
        self.differentiable, self.formula = differentiable, formula
        self.tensors, self.rest = _names(tensors), _names(rest)
        self.arguments = self.tensors + self.rest
        self.forwards: dict[str, torch._ops.OpOverload] = {}
        grads, wanted = [f"d{o}" for o in outputs[:differentiable]], [f"d{n}" for n in wrt]
        self.backward_arguments = [*grads, *self.tensors, *saved, *self.rest, "output_mask"]

        taken = ", ".join([*(f"Tensor {n}" for n in grads), tensors, *(f"Tensor {n}" for n in saved), rest])
        for suffix in dict.fromkeys(SUFFIXES.values()):
            fwd, bwd = f"{name}_fwd{suffix}", f"{name}_bwd{suffix}"
            library.define(f"{fwd}({tensors}, {rest}) -> ({_returns(outputs)})")
            library.define(f"{bwd}({taken}, bool[{len(wrt)}] output_mask) -> ({_returns(wanted)})")
            forward = getattr(torch.ops.infsa, fwd).default
            backward = getattr(torch.ops.infsa, bwd).default
            self.forwards[suffix] = forward
            for op, names, results, fake, flops in (
                (forward, self.arguments, outputs, fake_forward, flops_forward),
                (backward, self.backward_arguments, wanted, fake_backward, flops_backward),
            ):
                torch.library.register_fake(op.name(), fake, lib=library)
                torch.library.register_vmap(op, self._vmap(op, names, results), lib=library)
                register_flop_formula(op.overloadpacket)(
                    _flop_formula(flops, names.index(self.tensors[0]), self.tensors)
                )
                sharding.shard(op, self._shardings(names, results))
            self._make_differentiable(forward, backward)

    def implement(self, backend: str, key: str, forward, backward) -> None:
        """Registers a backend written in Python for a dispatch key."""
        for direction, function in (("fwd", forward), ("bwd", backward)):
            library.impl(f"{self.name}_{direction}{SUFFIXES[backend]}", without_autocast(function), key)

    def dims_of(self, name: str) -> str:
        """The dimensions of an argument, an output, or the gradient of one."""
        return self.dims.get(name) or self.dims[name.removeprefix("d")]

    def _is_tensor(self, name: str) -> bool:
        return name in self.dims or name.removeprefix("d") in self.dims

    def _vmap(self, op, names, results):
        """The batching rule: the mapped dimension folds into the batch, unless it reaches a tensor without one."""
        batched_results = all("B" in self.dims_of(n) for n in results)

        def rule(info, in_dims, *args):
            mapped = [(n, t, dim) for n, t, dim in zip(names, args, in_dims) if isinstance(t, Tensor)]
            if not batched_results or any(dim is not None and "B" not in self.dims_of(n) for n, _, dim in mapped):
                return in_turn(info.batch_size, in_dims, args)

            def fold(t, dim):
                t = t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
                return t.flatten(0, 1)

            folded = [
                fold(t, dim) if isinstance(t, Tensor) and "B" in self.dims_of(n) else t
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
            return tuple(torch.stack(outputs) for outputs in zip(*calls)), (0,) * len(results)

        return rule

    def _shardings(self, names, results):
        """Per letter that may be sharded, where it lies in every argument and result; see sharding.shard."""
        return [
            (
                [self.dims_of(n).find(letter) if self._is_tensor(n) else None for n in names],
                [self.dims_of(n).find(letter) for n in results],
            )
            for letter in "BH"
        ], functools.partial(self._existing, names, results)

    def _existing(self, names, results, args) -> list[bool]:
        """Which results of a call are tensors with elements at all."""
        given = dict(zip(names, args))
        if "output_mask" not in given:
            return [True] * len(results)
        return [wanted and given[n] is not None for wanted, n in zip(given["output_mask"], self.wrt)]

    def _make_differentiable(self, forward_op, backward_op) -> None:
        arguments, differentiable = self.arguments, self.differentiable
        tensor_at = [i for i, n in enumerate(arguments) if n in self.dims]
        constant_at = [i for i, n in enumerate(arguments) if n not in self.dims]
        wrt_at = [arguments.index(n) for n in self.wrt]
        saved_at = [self.outputs.index(n) for n in self.saved]
        leading = len(self.tensors)
        # Of several outputs only some may have a gradient: where a saved one of the same dimensions stands.
        saved_dims = [self.dims[n] for n in self.saved]
        alike = [saved_dims.index(self.dims[n]) for n in self.outputs[:differentiable]] if differentiable > 1 else [0]

        class Forward(_Function):
            @staticmethod
            def forward(keyset, *args):
                return _redispatch(forward_op, keyset, args)

            @staticmethod
            def jvp(ctx, *tangents):
                _refuse_forward_mode(forward_op)

            @staticmethod
            def setup_context(ctx, inputs, outputs):
                args = inputs[1:]
                ctx.save_for_backward(*[args[i] for i in tensor_at], *[outputs[i] for i in saved_at])
                ctx.constants = [args[i] for i in constant_at]
                ctx.mark_non_differentiable(*outputs[differentiable:])
                ctx.set_materialize_grads(False)

            @staticmethod
            def backward(ctx, *douts):
                none = [None] * (1 + len(arguments))
                if all(dout is None for dout in douts):
                    return tuple(none)
                args: list = [None] * len(arguments)
                tensors = ctx.saved_tensors
                for i, t in zip(tensor_at, tensors):
                    args[i] = t
                for i, constant in zip(constant_at, ctx.constants):
                    args[i] = constant
                output_mask = [ctx.needs_input_grad[1 + i] for i in wrt_at]
                statistics = tensors[len(tensor_at) :]
                # zeros_like something of that shape: a DTensor where the others are.
                douts = [torch.zeros_like(statistics[i]) if g is None else g for i, g in zip(alike, douts)]
                grads = backward_op(*douts, *args[:leading], *statistics, *args[leading:], output_mask)
                for i, grad, wanted in zip(wrt_at, grads, output_mask):
                    none[1 + i] = grad if wanted else None
                return tuple(none)

        names, wrt, saved = self.backward_arguments, self.wrt, len(self.saved)
        not_saved = [
            i for i in range(len(names)) if not differentiable + leading <= i < differentiable + leading + saved
        ]
        tensors_at = [i for i in not_saved if self._is_tensor(names[i])]
        constants_at = [i for i in not_saved if not self._is_tensor(names[i])]
        formula = self.formula

        class Backward(_Function):
            @staticmethod
            def forward(keyset, *args):
                return _redispatch(backward_op, keyset, args)

            @staticmethod
            def jvp(ctx, *tangents):
                _refuse_forward_mode(backward_op)

            @staticmethod
            def setup_context(ctx, inputs, outputs):
                args = inputs[1:]
                ctx.save_for_backward(*[args[i] for i in tensors_at])
                ctx.constants = [args[i] for i in constants_at]
                ctx.set_materialize_grads(False)

            @staticmethod
            @without_autocast
            def backward(ctx, *cotangents):
                args = dict.fromkeys(names)
                args.update((names[i], t) for i, t in zip(tensors_at, ctx.saved_tensors))
                args.update((names[i], constant) for i, constant in zip(constants_at, ctx.constants))
                wanted = dict(zip(wrt, args["output_mask"]))
                present = [n for n in wrt if args[n] is not None]
                douts = tuple(args[n] for n in names[:differentiable])

                def evaluate(*tensors):
                    given = {n: args[n] for n in arguments} | dict(zip(present, tensors))
                    return formula(*given.values())

                def gradients(douts, *tensors):
                    return torch.func.vjp(evaluate, *tensors)[1](douts)

                _, pull_back = torch.func.vjp(gradients, douts, *(args[n] for n in present))
                given = dict(zip(wrt, cotangents))
                seeds = tuple(
                    given[n] if wanted[n] and given[n] is not None else torch.zeros_like(args[n]) for n in present
                )
                ddouts, *second = pull_back(seeds)
                found = dict(zip(names[:differentiable], ddouts)) | dict(zip(present, second))
                return (None, *(found.get(n) for n in names))

        for op, function in ((forward_op, Forward), (backward_op, Backward)):
            library.impl(op, _one_level(function), "Autograd", with_keyset=True)


def without_autocast(function):
    """Torch operations inside an operator keep their dtypes, in backward too, which may run inside or outside autocast."""

    @functools.wraps(function)
    def run(*args):
        with torch._C._ExcludeDispatchKeyGuard(AUTOCAST_KEYS):
            return function(*args)

    return run


def _names(schema: str) -> list[str]:
    return [re.split(r"[ =]", argument)[1] for argument in schema.split(", ")]


def _returns(names) -> str:
    return ", ".join(f"Tensor {n}" for n in names)


class _Function(_SingleLevelFunction):
    """An autograd.Function that does not look at functorch's levels, which the Autograd key has sorted out already."""

    _compiled_autograd_key = staticmethod(torch.autograd.Function._compiled_autograd_key)


def _refuse_forward_mode(op):
    raise NotImplementedError(
        f"{op.name()} has no forward-mode derivative (torch.func.jvp, jacfwd, forward_ad); use reverse mode "
        "(torch.func.vjp, jacrev), or infsa_kernels.reference, which has both"
    )


def _one_level(function):
    def autograd(keyset, *args):
        sharding.register_waiting()
        if not torch._C._are_functorch_transforms_active():
            return function.apply(keyset, *unwrap_dead_wrappers(args))
        # At this key functorch has already unwrapped to one level: record on it, and let the redispatch reach the next.
        with enable_single_level_autograd_function():
            return function.apply(keyset, *args)

    return autograd


def _redispatch(op, keyset, args):
    keyset = keyset & torch._C._after_autograd_keyset
    if not torch._C._are_functorch_transforms_active():
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset, *args)
    # The next functorch level records this very call, but an autograd.Function's forward runs with grad mode off.
    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
        return op.redispatch(keyset, *args)


def _flop_formula(flops, first, tensors):
    def formula(*shapes, out_shape=None, **kwargs):
        return flops(*shapes[first : first + len(tensors)])

    return formula

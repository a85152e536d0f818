"""What makes raw operators differentiable, in every order and below every transform.

* An autograd.Function at the Autograd key, entered for one level of a functorch stack at a time, so that
  `func.grad(func.grad(...))` and `vmap(grad(...))` nest. Forward-mode AD raises.
* The raw backward op is differentiable too, by differentiating a plain formula twice: exact, at that formula's memory cost.
"""

import contextlib
import functools
from itertools import compress

import torch

from ..torch_private import (
    SingleLevelFunction,
    after_autograd,
    below_autocast,
    below_autograd,
    forward_mode,
    in_forward_mode,
    in_functorch,
    keys_of,
    on_one_level,
    unwrap_if_dead,
)
from . import check, sharding


def functions(raw, forward_op, backward_op, forward_kernels, backward_kernels) -> tuple:
    """What to register at the Autograd key for a forward op of ``raw`` (register.RawOps) and for its backward op.

    ``forward_kernels``, ``backward_kernels``: their kernels in Python by dispatch key, which are called without torch's
    dispatcher where nothing but them is left to do.
    """
    forward_below, backward_below = _Below(forward_op, forward_kernels), _Below(backward_op, backward_kernels)
    names, backward_names, outputs = raw.forward.arguments, raw.backward.arguments, raw.forward.results
    differentiable = [o for o in outputs if f"d{o}" in backward_names]
    douts = [f"d{o}" for o in differentiable]
    saved = [o for o in outputs if o in backward_names]
    is_saved, is_statistic = [o in saved for o in outputs], [o not in differentiable for o in outputs]
    # Where an output gets no gradient, zeros in the shape of a saved one: a DTensor where the others are.
    letters = {n: t.letters for n, t in raw.forward.tensors.items()}
    alike = {f"d{o}": next((s for s in saved if letters[s] == letters[o]), None) for o in differentiable}

    class Forward(SingleLevelFunction):
        @staticmethod
        def forward(keyset, *args):
            return forward_below(keyset, args)

        @staticmethod
        def jvp(ctx, *tangents):
            _refuse_forward_mode(forward_op)

        @staticmethod
        def setup_context(ctx, inputs, results):
            _save(ctx, raw.forward, inputs[1:], compress(results, is_saved))
            ctx.mark_non_differentiable(*compress(results, is_statistic))

        @staticmethod
        def backward(ctx, *cotangents):
            if all(dout is None for dout in cotangents):
                return (None,) * (1 + len(names))
            given, statistics = _saved(ctx, raw.forward)
            given |= zip(saved, statistics)
            given |= zip(douts, cotangents)
            given |= {n: torch.zeros_like(given[alike[n]]) for n in douts if given[n] is None}
            needed = dict(zip(names, ctx.needs_input_grad[1:]))
            wanted = given["output_mask"] = [needed[n] for n in raw.inputs]
            gradients = backward_op(*(given[n] for n in backward_names))
            found = {n: gradient for n, gradient, want in zip(raw.inputs, gradients, wanted) if want}
            return None, *(found.get(n) for n in names)

    class Backward(SingleLevelFunction):
        @staticmethod
        def forward(keyset, *args):
            return backward_below(keyset, args)

        @staticmethod
        def jvp(ctx, *tangents):
            _refuse_forward_mode(backward_op)

        @staticmethod
        def setup_context(ctx, inputs, results):
            _save(ctx, raw.backward, [None if n in saved else t for n, t in zip(backward_names, inputs[1:])])

        @staticmethod
        @without_autocast
        def backward(ctx, *cotangents):
            args, _ = _saved(ctx, raw.backward)
            present = [n for n in raw.inputs if args[n] is not None]

            def evaluate(*tensors):
                given = {n: args[n] for n in names} | dict(zip(present, tensors))
                return raw.formula(*given.values())

            def gradients(douts, *tensors):
                return torch.func.vjp(evaluate, *tensors)[1](douts)

            _, pull_back = torch.func.vjp(gradients, tuple(args[n] for n in douts), *(args[n] for n in present))
            given = {n: t for n, t, want in zip(raw.inputs, cotangents, args["output_mask"]) if want and t is not None}
            seeds = tuple(given[n] if n in given else torch.zeros_like(args[n]) for n in present)
            ddouts, *second = pull_back(seeds)
            found = dict(zip(douts, ddouts)) | dict(zip(present, second))
            return None, *(found.get(n) for n in backward_names)

    return _one_level(Forward, forward_below, raw.forward), _one_level(Backward, backward_below, raw.backward)


def no_derivative(op, signature, instead: str):
    """What to register at the Autograd key for an op that has none: it raises where one is asked for."""

    def autograd(keyset, *args):
        if torch.is_grad_enabled() and any(isinstance(t, torch.Tensor) and t.requires_grad for t in args):
            raise NotImplementedError(f"{op.name()} has no derivative; {instead}")
        try:
            with below_autograd():
                return op.redispatch(keyset & after_autograd, *args)
        except Exception:
            check.in_words(signature.check, args)
            raise

    return autograd


def skipped_if_unused(*tensors):
    """A context for calls of raw operators: it skips the Autograd key, and its Python, where nothing differentiates them."""
    sharding.register_waiting()
    return contextlib.nullcontext() if in_functorch() or _differentiated(tensors) else below_autograd()


def _differentiated(arguments) -> bool:
    needs_grad = torch.is_grad_enabled() and any(isinstance(t, torch.Tensor) and t.requires_grad for t in arguments)
    return needs_grad or in_forward_mode()


def without_autocast(function):
    """Torch operations inside an operator keep their dtypes, in backward too, which may run inside or outside autocast."""

    @functools.wraps(function)
    def run(*args):
        with below_autocast():
            return function(*args)

    return run


def _save(ctx, signature, arguments, more=()):
    ctx.save_for_backward(*compress(arguments, signature.are_tensors), *more)
    ctx.constants = [c for c, is_tensor in zip(arguments, signature.are_tensors) if not is_tensor]
    ctx.set_materialize_grads(False)


def _saved(ctx, signature) -> tuple[dict, list]:
    """Arguments by name, and what more was saved."""
    tensors, constants = iter(ctx.saved_tensors), iter(ctx.constants)
    given = {
        n: next(tensors if is_tensor else constants) for n, is_tensor in zip(signature.arguments, signature.are_tensors)
    }
    return given, list(tensors)


def _refuse_forward_mode(op):
    raise NotImplementedError(
        f"{op.name()} has no forward-mode derivative (torch.func.jvp, jacfwd, forward_ad); use reverse mode "
        "(torch.func.vjp, jacrev), or infsa_kernels.reference, which has both"
    )


def _one_level(function, below, signature):
    def autograd(keyset, *args):
        sharding.register_waiting()
        try:
            if not in_functorch():
                args = [a if a is None else unwrap_if_dead(a) if isinstance(a, torch.Tensor) else a for a in args]
                return function.apply(keyset, *args) if _differentiated(args) else below(keyset, args)
            # At this key functorch has already unwrapped to one level: record on it, and let the redispatch reach the next.
            with on_one_level():
                return function.apply(keyset, *args)
        except Exception:
            check.in_words(signature.check, args)
            raise

    return autograd


class _Below:
    """What comes after the Autograd key of an operator: (keyset, arguments) -> its results."""

    def __init__(self, op, kernels):
        self._op, self._kernels = op, {keys: kernel for key, kernel in kernels.items() if (keys := keys_of(key))}

    def __call__(self, keyset, args):
        keyset = keyset & after_autograd
        if not in_functorch():
            # Of modes, subclasses, negated views and tensors on several devices the keys tell, and the dispatcher sees to these.
            # Where the kernel's own key alone is left, its way there and back costs several microseconds for nothing.
            kernel = self._kernels.get(keyset.raw_repr())
            with below_autograd():
                return self._op.redispatch(keyset, *args) if kernel is None else kernel(*args)
        # The next functorch level records this very call, but an autograd.Function's forward runs with grad mode off.
        with torch.enable_grad(), forward_mode(True):
            return self._op.redispatch(keyset, *args)

"""What the two operators share: one public op that picks a backend, raw ops that are differentiable in every order.

Public `infsa::<name>` is composite: it views 3-D input as 4-D, sees that k is q, turns rho into a number and a (B, H) tensor,
asks for a backend and calls that backend's raw forward op. Autograd, vmap and fake tensors belong to the raw ops:

* Autograd: an autograd.Function at the Autograd key, entered for one level of a functorch stack at a time, so that
  `func.grad(func.grad(...))` and `vmap(grad(...))` nest. Forward-mode AD raises.
* The raw backward op is differentiable too, by differentiating the reference twice: exact, at the reference's memory cost.
* vmap: every tensor argument starts with the batch dimension, so a mapped dimension folds into it.
"""

import contextlib
import functools

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.utils.flop_counter import register_flop_formula

from . import _check, _dtensor
from ._library import SUFFIXES, _takes_backend, backend_of_backward, choose_backend, library

_ARGUMENTS = "Tensor? key_padding_mask=None, Tensor? query_padding_mask=None, str backend='') -> Tensor"
_RAW_ARGUMENTS = "float eps, float rho, Tensor? head_rho, Tensor? key_padding_mask, Tensor? query_padding_mask"

_AUTOCAST_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU).add(torch._C.DispatchKey.AutocastCUDA)


class Operator:
    """Defines `infsa::<name>` and, per backend family, its raw forward and backward ops.

    Args:
        name: the public op's name.
        reference: the operator in plain torch (infsa_kernels.reference).
        saved: the forward outputs that backward takes, by name and in order; all outputs but "out" are statistics.
        fake_forward, fake_backward: check the arguments and return empty outputs of the right shape, dtype and strides.
        flops_forward, flops_backward: FLOPs from the sizes (B, H, N, M, d, dv).
    """

    def __init__(
        self, name, *, reference, outputs, saved, fake_forward, fake_backward, flops_forward, flops_backward
    ):  # fmt: skip
        self.op = f"infsa::{name}"
        self.name, self.reference, self.outputs, self.saved = name, reference, outputs, saved
        self.fakes = fake_forward, fake_backward
        self.flops = flops_forward, flops_backward
        self.forwards: dict[str, torch._ops.OpOverload] = {}
        library.define(f"{name}(Tensor q, Tensor k, Tensor v, float eps=1e-6, Tensor? rho=None, {_ARGUMENTS}")
        library.define(f"{name}.scalar_rho(Tensor q, Tensor k, Tensor v, float eps=1e-6, float rho=1.0, {_ARGUMENTS}")
        packet = getattr(torch.ops.infsa, name)
        self.tensor_rho, self.scalar_rho = packet.default, packet.scalar_rho
        for overload in (packet.default, packet.scalar_rho):
            autocasts = {device: self._autocast(overload, device) for device in ("cpu", "cuda")}
            for device, autocast in autocasts.items():
                library.impl(overload, autocast, f"Autocast{device.upper()}")
            library.impl(overload, self._call, "CompositeImplicitAutograd")
            library.impl(overload, self._batched(autocasts), "FuncTorchBatched")
        _takes_backend.update((packet, packet.default, packet.scalar_rho))
        for suffix in dict.fromkeys(SUFFIXES.values()):
            self._define_raw(suffix)

    def overload(self, rho: float | Tensor) -> torch._ops.OpOverload:
        """The overload for this rho. Found by the packet, a number costs 10 us: it has to fail at the other one first."""
        return self.tensor_rho if isinstance(rho, Tensor) else self.scalar_rho

    def implement(self, backend: str, key: str, forward, backward) -> None:
        """Registers a backend written in Python for a dispatch key."""
        for direction, function in (("fwd", forward), ("bwd", backward)):
            library.impl(f"{self.name}_{direction}{SUFFIXES[backend]}", _without_autocast(function), key)

    def _call(self, q, k, v, eps=1e-6, rho=None, key_padding_mask=None, query_padding_mask=None, backend=""):
        _dtensor.register_waiting()
        self._check_layout(q, k, v, rho, key_padding_mask, query_padding_mask)
        unbatched = q.dim() == 3 and k.dim() == 3 and v.dim() == 3
        tied = k is q
        if unbatched:
            _check.three_dimensions(self.op, q, k, v)
            q, v = q.unsqueeze(1), v.unsqueeze(1)
            k = q if tied else k.unsqueeze(1)
        rho, head_rho = self._split_rho(rho, q, unbatched)
        name = choose_backend(q.device, q.dtype, q.shape, backend or backend_of_backward())
        forward = self.forwards[SUFFIXES[name]]
        k = None if tied else k
        with _without_autograd_if_unused(q, k, v, head_rho):
            out = forward(q, k, v, eps, rho, head_rho, key_padding_mask, query_padding_mask)[0]
        return out.squeeze(1) if unbatched else out

    def check_scores(self, q, k, rho, eps, key_padding_mask, query_padding_mask) -> None:
        """The checks of the operator for its scores, which have no v."""
        _check.python_types(self.op, q, k, k, rho, eps, key_padding_mask, query_padding_mask)
        self._check_layout(q, k, k, rho, key_padding_mask, query_padding_mask)
        unbatched = q.dim() == 3 and k.dim() == 3
        if unbatched:
            _check.three_dimensions(self.op, q, k, k)
            q, k = q.unsqueeze(1), k.unsqueeze(1)
        rho, head_rho = self._split_rho(rho, q, unbatched)
        _check.forward_arguments(self.op, q, k, k, eps, rho, head_rho, key_padding_mask, query_padding_mask)

    def _check_layout(self, q, k, v, rho, key_padding_mask, query_padding_mask) -> None:
        masks = ("key_padding_mask", key_padding_mask), ("query_padding_mask", query_padding_mask)
        for name, t in (("q", q), ("k", k), ("v", v), ("rho", rho), *masks):
            if not isinstance(t, Tensor):
                if name in ("q", "k", "v"):
                    raise TypeError(f"{self.op}: {name} is None, expected a Tensor")
            elif t.layout != torch.strided or t.is_quantized or t.is_nested:
                kind = (
                    "nested tensor" if t.is_nested else "quantized tensor" if t.is_quantized else f"{t.layout} tensor"
                )
                raise TypeError(f"{self.op}: {name} is a {kind}, expected a dense strided one; densify it first")

    def _split_rho(self, rho, q, unbatched) -> tuple[float, Tensor | None]:
        """rho as a number times a (B, H) tensor of the accumulation dtype, through which its gradient flows."""
        if not isinstance(rho, Tensor):
            return 1.0 if rho is None else rho, None
        heads = q.shape[0 if unbatched else 1] if q.dim() == 4 else 1
        if not rho.is_floating_point():
            raise TypeError(f"{self.op}: rho has dtype {rho.dtype}, expected a floating dtype; convert it with .to()")
        if rho.shape not in ((), (1,), (heads,)):
            letters = "(B*H,)" if unbatched else "(H,)"
            raise ValueError(
                f"{self.op}: rho has shape {list(rho.shape)}, expected [], [1] or {letters} = [{heads}]; "
                "give one value, or one per head"
            )
        _check.device(self.op, "rho", rho, q)
        head_rho = rho.to(_check.acc_dtype(q))
        if unbatched and rho.dim() == 1:
            head_rho = head_rho.unsqueeze(-1)
        return 1.0, head_rho.expand(q.shape[:2]) if q.dim() == 4 else head_rho

    def _autocast(self, overload, device):
        def cast(t):
            eligible = t.is_floating_point() and t.dtype != torch.float64 and t.device.type == device
            return t.to(torch.get_autocast_dtype(device)) if eligible else t

        def autocast(q, k, v, *args, **kwargs):
            with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS):
                cast_q = cast(q)
                return overload(cast_q, cast_q if k is q else cast(k), cast(v), *args, **kwargs)

        return autocast

    def _batched(self, autocasts):
        # vmap comes before autocast, and this operator is gone when autocast's turn would be.
        def batched(q, *args, **kwargs):
            device = q.device.type
            autocast = device in autocasts and torch.is_autocast_enabled(device)
            return (autocasts[device] if autocast else self._call)(q, *args, **kwargs)

        return batched

    def _define_raw(self, suffix) -> None:
        returns = ", ".join(f"Tensor {o}" for o in self.outputs)
        saved = ", ".join(f"Tensor {o}" for o in self.saved)
        fwd, bwd = f"{self.name}_fwd{suffix}", f"{self.name}_bwd{suffix}"
        library.define(f"{fwd}(Tensor q, Tensor? k, Tensor v, {_RAW_ARGUMENTS}) -> ({returns})")
        library.define(
            f"{bwd}(Tensor dout, Tensor q, Tensor? k, Tensor v, {saved}, {_RAW_ARGUMENTS}, bool[4] output_mask) "
            "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dhead_rho)"
        )
        forward = getattr(torch.ops.infsa, fwd).default
        backward = getattr(torch.ops.infsa, bwd).default
        self.forwards[suffix] = forward
        for op, fake, flops, first in (
            (forward, self.fakes[0], self.flops[0], 0),
            (backward, self.fakes[1], self.flops[1], 1),
        ):
            torch.library.register_fake(op.name(), fake, lib=library)
            torch.library.register_vmap(op, _fold_mapped_dimension(op), lib=library)
            register_flop_formula(op.overloadpacket)(_flop_formula(flops, first))
        _make_differentiable(forward, backward, self)
        _dtensor.shard(forward, backward)


def _without_autograd_if_unused(*tensors):
    """Skips the Autograd kernels, and their Python, for calls that nothing differentiates."""
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if needs_grad or forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        return contextlib.nullcontext()
    return torch._C._AutoDispatchBelowAutograd()


def _without_autocast(function):
    """Torch operations inside an operator keep their dtypes, in backward too, which may run inside or outside autocast."""

    @functools.wraps(function)
    def run(*args):
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS):
            return function(*args)

    return run


class _Function(_SingleLevelFunction):
    """An autograd.Function that does not look at functorch's levels, which the Autograd key has sorted out already."""

    _compiled_autograd_key = staticmethod(torch.autograd.Function._compiled_autograd_key)


def _make_differentiable(forward_op, backward_op, operator: Operator) -> None:
    saved_outputs = [operator.outputs.index(name) for name in operator.saved]

    class Forward(_Function):
        @staticmethod
        def forward(keyset, *args):
            return _redispatch(forward_op, keyset, args)

        @staticmethod
        def jvp(ctx, *tangents):
            _refuse_forward_mode(forward_op)

        @staticmethod
        def setup_context(ctx, inputs, outputs):
            _, q, k, v, eps, rho, head_rho, key_padding_mask, query_padding_mask = inputs
            ctx.save_for_backward(
                q, k, v, head_rho, key_padding_mask, query_padding_mask, *(outputs[i] for i in saved_outputs)
            )
            ctx.eps_rho = eps, rho
            ctx.mark_non_differentiable(*outputs[1:])
            ctx.set_materialize_grads(False)

        @staticmethod
        def backward(ctx, dout, *_):
            if dout is None:
                return (None,) * 9
            q, k, v, head_rho, key_padding_mask, query_padding_mask, *saved = ctx.saved_tensors
            needs = ctx.needs_input_grad
            output_mask = [needs[1], needs[2], needs[3], needs[6]]
            grads = backward_op(
                dout, q, k, v, *saved, *ctx.eps_rho, head_rho, key_padding_mask, query_padding_mask, output_mask
            )
            dq, dk, dv, dhead_rho = (grad if wanted else None for grad, wanted in zip(grads, output_mask))
            return None, dq, dk, dv, None, None, dhead_rho, None, None

    class Backward(_Function):
        @staticmethod
        def forward(keyset, *args):
            return _redispatch(backward_op, keyset, args)

        @staticmethod
        def jvp(ctx, *tangents):
            _refuse_forward_mode(backward_op)

        @staticmethod
        def setup_context(ctx, inputs, outputs):
            _, dout, q, k, v, *saved, eps, rho, head_rho, key_padding_mask, query_padding_mask, output_mask = inputs
            ctx.save_for_backward(dout, q, k, v, head_rho, key_padding_mask, query_padding_mask)
            ctx.rest = eps, rho, output_mask, len(saved)
            ctx.set_materialize_grads(False)

        @staticmethod
        @_without_autocast
        def backward(ctx, *cotangents):
            dout, q, k, v, head_rho, key_padding_mask, query_padding_mask = ctx.saved_tensors
            eps, rho, output_mask, saved = ctx.rest
            inputs = {n: t for n, t in zip(["q", "k", "v", "head_rho"], (q, k, v, head_rho)) if t is not None}
            acc = _check.acc_dtype(q)

            def pooled(*tensors):
                given = {n: t.to(acc) for n, t in zip(inputs, tensors)}
                per_head = rho * given["head_rho"] if "head_rho" in given else rho
                out = operator.reference(
                    given["q"],
                    given.get("k", given["q"]),
                    given["v"],
                    per_head,
                    eps,
                    key_padding_mask,
                    query_padding_mask,
                )
                return out.to(q.dtype)

            def gradients(dout, *tensors):
                return torch.func.vjp(pooled, *tensors)[1](dout)

            _, pull_back = torch.func.vjp(gradients, dout, *inputs.values())
            by_name = dict(zip(["q", "k", "v", "head_rho"], cotangents))
            wanted = dict(zip(["q", "k", "v", "head_rho"], output_mask))
            seeds = tuple(
                by_name[n] if wanted[n] and by_name[n] is not None else torch.zeros_like(t) for n, t in inputs.items()
            )
            ddout, *second = pull_back(seeds)
            second = dict(zip(inputs, second))
            return (
                None, ddout, second["q"], second.get("k"), second["v"], *[None] * (saved + 2), second.get("head_rho"),
                None, None, None,
            )  # fmt: skip

    for op, function in ((forward_op, Forward), (backward_op, Backward)):
        library.impl(op, _one_level(function), "Autograd", with_keyset=True)


def _refuse_forward_mode(op):
    raise NotImplementedError(
        f"{op.name()} has no forward-mode derivative (torch.func.jvp, jacfwd, forward_ad); use reverse mode "
        "(torch.func.vjp, jacrev), or infsa_kernels.reference, which has both"
    )


def _one_level(function):
    def autograd(keyset, *args):
        _dtensor.register_waiting()
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


def _fold_mapped_dimension(op):
    def rule(info, in_dims, *args):
        def fold(t, dim):
            t = t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
            return t.flatten(0, 1)

        folded = [fold(t, dim) if isinstance(t, Tensor) else t for t, dim in zip(args, in_dims)]
        outputs = op(*folded)
        # A gradient that nobody asked for is an empty tensor of one dimension; there is nothing to unfold.
        unfolded = [
            t.unflatten(0, (info.batch_size, t.shape[0] // info.batch_size)) if t.dim() > 1 else t for t in outputs
        ]
        return tuple(unfolded), tuple(0 if t.dim() > 1 else None for t in outputs)

    return rule


def _flop_formula(flops, first):
    def formula(*shapes, out_shape=None, **kwargs):
        q, k, v = shapes[first : first + 3]
        B, H, N, d = q
        return flops(B, H, N, v[2], d, v[3])

    return formula

"""The private names of torch that this package uses, each with what nothing public does. Tested with torch 2.11 to 2.14."""

import sys

import torch
from torch._functorch import autograd_function
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

__all__ = ["FakeTensor", "OpOverload"]  # in annotations, and where a class is asked for; they have no public name

# torch.library.register_autograd differentiates once, and not below two levels of torch.func. Ours records one level at a time,
# as functorch's own operators do: OpOverload.redispatch goes on to the next, of which these keys are left.
after_autograd = torch._C._after_autograd_keyset

in_functorch = torch._C._are_functorch_transforms_active
on_one_level = autograd_function.enable_single_level_autograd_function
unwrap_if_dead = torch._C._functorch.unwrap_if_dead


def keys_of(key: str) -> int:
    """The set of this one dispatch key, as DispatchKeySet.raw_repr writes it; 0 for an alias of several."""
    return torch._C.DispatchKeySet(torch._C._dispatch_key_parse(key)).raw_repr()


class SingleLevelFunction(_SingleLevelFunction):
    """An autograd.Function that does not look at functorch's levels, which the Autograd key has sorted out already."""

    _compiled_autograd_key = staticmethod(torch.autograd.Function._compiled_autograd_key)


# Forward-mode AD is off inside an autograd.Function, and the level below has to see it, to refuse it.
forward_mode = forward_ad._set_fwd_grad_enabled


def in_forward_mode() -> bool:
    return forward_ad._current_level >= 0


# Autograd's Python is skipped for calls that nothing differentiates. torch.no_grad does not skip it, and torch.inference_mode
# makes tensors that autograd refuses later.
below_autograd = torch._C._AutoDispatchBelowAutograd

# torch.autocast(enabled=False) is for one device, and takes microseconds; torch.library.register_autocast casts every argument.
_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU).add(torch._C.DispatchKey.AutocastCUDA)


def below_autocast():
    return torch._C._ExcludeDispatchKeyGuard(_AUTOCAST)


# Whether vmap maps over a tensor: to refuse it in words. Public functions fail on it in theirs, about storages.
is_batched = torch._C._functorch.is_batchedtensor

# An assertion in a compiled graph, and one for which the CPU does not wait for a GPU. torch._check reads the value.
assert_async = torch._assert_async


def computes_at_once() -> bool:
    """Whether an operator called now computes: no transform, mode or tracer has it, which would want these calls too."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return not (traced or in_functorch() or torch._C._len_torch_dispatch_stack())


def set_for_backward(name: str, value: str) -> None:
    """Kept where autograd carries it over to the threads that it runs backward on; a threading.local stays behind."""
    torch._C._stash_obj_in_tls(name, value)


def get_in_backward(name: str) -> str:
    return torch._C._get_obj_in_tls(name) if torch._C._is_key_in_tls(name) else ""


def not_compiled(function):
    """torch.compiler.disable, which imports the compiler, for 2 s, wherever it decorates."""
    function._torchdynamo_disable = True
    return function


def process_group(name: str):
    """Operators take a group by its name, which a graph and a pickled module can hold; nothing public finds it again."""
    from torch.distributed.distributed_c10d import _resolve_process_group

    return _resolve_process_group(name)


def has_compiled() -> bool:
    """Whether torch.compile can have made anything so far: loading its compiler takes seconds."""
    return "torch._dynamo" in sys.modules


def all_reduce(t: torch.Tensor, group: str) -> torch.Tensor:
    """The sum over the ranks as a new tensor, that torch.compile sees as a collective. torch.distributed's writes in place."""
    from torch.distributed._functional_collectives import all_reduce, wait_tensor

    return wait_tensor(all_reduce(t, "sum", group))


def sharding_depends_on_all_arguments(op: OpOverload) -> None:
    """register_sharding caches placements by tensors alone, and so ignores which are None and which gradients are wanted."""
    from dataclasses import replace

    from torch.distributed.tensor import DTensor

    infos = DTensor._op_dispatcher.sharding_propagator.op_to_schema_info
    infos[op] = replace(infos[op], static_argnum=0)

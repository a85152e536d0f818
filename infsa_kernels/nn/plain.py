"""When a layer's parameters may be read in place of a call of it: what adapters, hooks, quantisation, offloading change.

Fused layers take weights as data. A call that does more than its class's arithmetic on these weights has to stay a call, or
what a user added to it is lost without a word.
"""

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ..torch_private import FakeTensor

# Kept from when this was imported: some tools replace the forward of torch's class itself.
_FORWARD = {kind: kind.forward for kind in (nn.Linear, nn.LayerNorm, nn.Identity)}

# functional_call and vmap put tensors where parameters were; torch.export puts fake ones. Any other class has its own arithmetic.
_PLAIN = (nn.Parameter, Tensor, FakeTensor)


def is_plain(module: nn.Module, kind: type[nn.Module], device: torch.device) -> bool:
    """Whether a call of ``module`` on ``device`` is ``kind``'s arithmetic on its parameters, with nothing before or after.

    Not so: a subclass, a parametrisation, a forward of its own, parameters of another class or device, hooks on it or on all
    modules, a call compiled on its own.
    """
    # Attributes, not entries of vars(module): so read, torch.compile guards on them as on those of torch's own calls.
    if (
        type(module) is not kind
        or not has_forward(module, _FORWARD[kind])
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
        or module._compiled_call_impl is not None
    ):
        return False
    own = module._parameters  # module.weight is 1.5 us
    return kind is nn.Identity or (_is_plain_at(own, "weight", device) and _is_plain_at(own, "bias", device))


def _is_plain_at(parameters: dict[str, Tensor | None], name: str, device: torch.device) -> bool:
    if name not in parameters:
        return False
    t = parameters[name]
    return t is None or (type(t) in _PLAIN and t.device == device)


def has_forward(module: nn.Module, forward) -> bool:
    """Whether ``module`` runs this function as its forward, not one that was put on the object."""
    own = module.forward
    return getattr(own, "__func__", None) is forward and own.__self__ is module


def is_exactly(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether ``kind``'s arithmetic on weight and bias, as they are now, is all that a module computes, hooks apart."""
    return (
        type(module) is kind
        and has_forward(module, _FORWARD[kind])
        and all(t is None or is_plain_parameter(t) for t in (module.weight, module.bias))
    )


def is_plain_parameter(t: Tensor) -> bool:
    """Whether a parameter can be split, joined and copied as the numbers it holds: quantised and sharded ones cannot."""
    return type(t) is nn.Parameter and type(t.data) in _PLAIN

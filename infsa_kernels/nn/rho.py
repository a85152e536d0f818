"""rho = sigmoid(rho_logit): what every InfSA module has and learns, ours or another library's, converted."""

import math

import torch
from torch import Tensor, nn


def logit(fraction: float) -> float:
    return math.log(fraction / (1 - fraction))


def attach_rho(module: nn.Module, rho_init: float, trainable: bool, size: int = 1, **factory) -> None:
    """Gives a module ``rho_logit``, a parameter or a buffer of shape (size,).

    Args:
        factory: dtype and device; default: those of the module's parameters.
    """
    if not factory:
        like = next((p for p in module.parameters() if p.is_floating_point() and p.itemsize >= 2), torch.empty(0))
        factory = {"dtype": like.dtype, "device": like.device}
    # (1,) and not (), which FSDP2 cannot shard.
    rho_logit = torch.full((size,), logit(rho_init), **factory)
    if trainable:
        module.rho_logit = nn.Parameter(rho_logit)
    else:
        module.register_buffer("rho_logit", rho_logit)


def rho_of(module: nn.Module) -> Tensor:
    """(1,) or (H,), with its gradient; in float32 or wider, as the operators take it: bfloat16 would make 1 of 0.998."""
    rho_logit = module.rho_logit
    return torch.sigmoid(rho_logit.to(torch.promote_types(rho_logit.dtype, torch.float32)))

"""State dicts of InfSAAttention: nn.MultiheadAttention's names and the authors' become its own before loading, and back."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .plain import is_exactly

PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def take_names(module: nn.Module, state_dict: dict[str, Tensor], prefix: str) -> None:
    """Renames, in place, what nn.MultiheadAttention calls otherwise; rho, which it lacks, stays the module's."""
    foreign = False
    for parameter in ("weight", "bias"):
        fused = state_dict.pop(f"{prefix}in_proj_{parameter}", None)
        if fused is not None:
            foreign = True
            state_dict |= {f"{prefix}{n}.{parameter}": t for n, t in zip(PROJECTIONS, fused.chunk(3))}
    for name in PROJECTIONS:
        weight = state_dict.pop(f"{prefix}{name}_weight", None)
        if weight is not None:
            foreign = True
            state_dict[f"{prefix}{name}.weight"] = weight
    key = prefix + "rho_logit"
    if foreign and not module.rho_logit.is_meta:
        state_dict.setdefault(key, module.rho_logit.detach())
    if key in state_dict and state_dict[key].numel() == 1:
        # The authors' is (); and one rho for the layer is the same for every head.
        state_dict[key] = state_dict[key].reshape(1).expand(module.rho_logit.shape).clone()


def multihead_names(module: nn.Module) -> dict[str, Tensor]:
    """The parameters of an InfSAAttention but rho_logit, as nn.MultiheadAttention names them."""
    for name, projection in module.named_children():
        if not is_exactly(projection, nn.Linear):
            raise ValueError(
                f"InfSAAttention.multihead_state_dict: {name} is a {type(projection).__qualname__} that computes more than "
                "its weight and bias say, expected a plain nn.Linear; merge or remove what was added to it"
            )
    query, value = module.q_proj, module.v_proj
    key = query if module.tied else module.k_proj
    weights = [p.weight.detach() for p in (query, key, value)]
    if module.kdim == module.vdim == module.embed_dim:
        state = {"in_proj_weight": torch.cat(weights)}
    else:
        state = {f"{name}_weight": weight for name, weight in zip(PROJECTIONS, weights)}
    if query.bias is not None:
        state["in_proj_bias"] = torch.cat([p.bias.detach() for p in (query, key, value)])
    if module.bias_k is not None:
        state |= {"bias_k": module.bias_k.detach(), "bias_v": module.bias_v.detach()}
    return state | {f"out_proj.{name}": t.detach() for name, t in module.out_proj.named_parameters()}


def demand_same_keys(model: nn.Module, state_dict: Mapping[str, Tensor], strict: bool) -> None:
    """RuntimeError, if strict, where an attention module is tied and its checkpoint is not, or the other way round."""
    for name, module in model.named_modules():
        prefix = name and name + "."
        keys = [f"{prefix}{key}" for key in ("k_proj.weight", "k_proj_weight", "in_proj_weight")]
        tied = getattr(module, "tied", None)
        if not strict or tied is None or f"{prefix}out_proj.weight" not in state_dict:
            continue
        if tied == any(key in state_dict for key in keys):
            raise RuntimeError(
                f"{type(model).__name__}.load_state_dict: {name or 'the module'} has tied={tied}, and the checkpoint "
                f"{'a' if tied else 'no'} projection of its own for keys (k_proj); make the model with tied={not tied}"
            )

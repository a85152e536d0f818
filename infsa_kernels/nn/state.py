"""State dicts of InfSAAttention: nn.MultiheadAttention's names and the authors' become its own, before they are loaded."""

from torch import Tensor, nn

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


def key_projection_errors(module: nn.Module, state_dict: dict[str, Tensor], prefix: str) -> list[str]:
    """What a strict load says where the module is tied and the checkpoint is not, or the other way round."""
    has_key = prefix + "k_proj.weight" in state_dict
    if prefix + "q_proj.weight" not in state_dict or has_key != module.tied:
        return []
    return [
        f"{prefix.removesuffix('.') or 'InfSAAttention'} has tied={module.tied}, and the checkpoint comes with "
        f"{'a key projection of its own (k_proj)' if has_key else 'no key projection (k_proj)'}: make the model with "
        f"tied={not module.tied}."
    ]

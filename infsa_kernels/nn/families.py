"""How each kind of attention module becomes an InfSA one: `plan_of` says how, or why not, and changes nothing.

nn.MultiheadAttention is replaced. Modules of timm and of transformers stay the objects they are, with their projections,
hooks and places in an optimizer: timm's change their class, transformers' the attention function that their config names.
"""

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import parametrize

from .attention import InfSAAttention
from .checks import LEAVE_OUT, NO_CAUSAL, NO_DROPOUT, class_path
from .plain import has_forward, is_plain_parameter
from .rho import attach_rho


@dataclass(frozen=True)
class Options:
    variant: str
    rho_init: float
    rho_trainable: bool
    copy_weights: bool
    hops: int | None
    score_floor: float


@dataclass(frozen=True)
class Plan:
    """``apply()`` converts and returns the module to have in the old one's place; ``config`` is what it shares with others."""

    apply: Callable[[], nn.Module]
    config: object = None


def is_known(module: nn.Module) -> bool:
    """Whether :func:`plan_of` has something to say about a module."""
    return (
        isinstance(module, nn.MultiheadAttention)
        or dispatches(module)
        or _is_timm(module)
        or hasattr(module, "rho_logit")
    )


def plan_of(
    module: nn.Module, options: Options, parents: Sequence[nn.Module], tied: set[nn.Parameter], named: bool
) -> Plan | str:
    """How to convert a module that is known, or why it is refused.

    Args:
        parents: the modules around this one, outermost first.
        tied: the parameters that more than one module holds.
        named: whether the caller asked for this very class, so that a subclass is taken for what it derives from.
    """
    if hasattr(module, "rho_logit"):
        return "it is InfSA already"
    if any(hasattr(p, "device_mesh") for p in module.parameters()):
        return "its parameters are sharded, and rho_logit would not be: convert first, then shard"
    # accelerate's hooks call the forward that they found, which must then be one that looks the attention function up.
    if "forward" in vars(module) and not (dispatches(module) and hasattr(module, "_hf_hook")):
        return _REPLACED
    if isinstance(module, nn.MultiheadAttention):
        return _multihead(module, options, parents, tied, named)
    if dispatches(module):
        return _transformers(module, options, parents)
    return _timm(module, options, named)


def dispatches(module: nn.Module) -> bool:
    """Whether a module calls the attention function that transformers has registered under its config's name."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names and hasattr(module, "config")


def _is_timm(module: nn.Module) -> bool:
    return any(cls.__module__.startswith("timm.") and cls.__name__ == "Attention" for cls in type(module).__mro__)


def _multihead(
    module: nn.MultiheadAttention,
    options: Options,
    parents: Sequence[nn.Module],
    tied: set[nn.Parameter],
    named: bool,
) -> Plan | str:
    if parents and _holds_mask(parents[-1]):
        return f"the {class_path(parents[-1])} around it holds an attn_mask, probably a causal one: {NO_CAUSAL}"
    if parents and getattr(parents[-1], "base_layer", None) is module:
        return f"it is what a {class_path(parents[-1])} adapts, which reads its in_proj_weight: merge the adapter first"
    for part in module.modules():
        if parametrize.is_parametrized(part):
            return "it has parametrizations, which would be lost: remove them with torch.nn.utils.parametrize"
        if any(getattr(part, hooks) for hooks in _HOOKS):
            return "it has hooks, which would not be called any more: remove them, and add them after the conversion"
        if not has_forward(part, type(part).forward):
            return _REPLACED
        if part._compiled_call_impl is not None:
            return "it was compiled on its own, which would be lost: call its compile() after the conversion"
    if type(module) is not nn.MultiheadAttention and not named:
        return _SUBCLASS.format(class_path(module), "torch.nn.MultiheadAttention")
    if not isinstance(module.out_proj, nn.Linear):
        return f"its out_proj is a {class_path(module.out_proj)}, expected a torch.nn.Linear or a subclass of it"
    if not all(map(is_plain_parameter, module.parameters())):
        return "its parameters are tensors of a special kind (quantised?), which cannot be split: convert before that"
    if any(p in tied for p in (module.in_proj_weight, module.in_proj_bias)):
        return "another module has the same in_proj_weight or in_proj_bias, and would not share the split ones"
    try:
        _like(module, options, "meta")
    except NotImplementedError as error:
        return str(error)
    return Plan(lambda: _infsa_of(module, options))


def note_on(module: nn.Module, parents: Sequence[nn.Module]) -> str | None:
    """Why a converted module may still be refused when it is run: which mask it is given shows only then."""
    if not isinstance(module, nn.MultiheadAttention):
        return None
    if parents and isinstance(parents[-1], nn.TransformerDecoderLayer) and parents[-1].self_attn is module:
        return f"raises when it is given a tgt_mask{LEAVE_OUT}"
    holder = next(filter(_holds_mask, reversed(parents)), None)
    return None if holder is None else f"raises when it is given {class_path(holder)}'s attn_mask{LEAVE_OUT}"


def _holds_mask(module: nn.Module) -> bool:
    """As the text towers of CLIP in torch's own modules do: OpenAI's in each block, open_clip's in the tower or the model."""
    return isinstance(getattr(module, "attn_mask", None), torch.Tensor)


def _like(module: nn.MultiheadAttention, options: Options, device: torch.device | str) -> InfSAAttention:
    return InfSAAttention(
        module.embed_dim,
        module.num_heads,
        module.dropout,
        bias=module.in_proj_bias is not None,
        add_bias_kv=module.bias_k is not None,
        add_zero_attn=module.add_zero_attn,
        kdim=module.kdim,
        vdim=module.vdim,
        batch_first=module.batch_first,
        device=device,
        dtype=module.out_proj.weight.dtype,
        variant=options.variant,
        hops=options.hops,
        rho_init=options.rho_init,
        rho_trainable=options.rho_trainable,
        score_floor=options.score_floor,
    )


def _infsa_of(module: nn.MultiheadAttention, options: Options) -> InfSAAttention:
    # Copied weights need no numbers drawn, which would change what the caller draws next.
    new = _like(module, options, "meta" if options.copy_weights else module.out_proj.weight.device)
    if options.copy_weights:
        weights = [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
        if module.in_proj_weight is not None:
            weights = _split(module.in_proj_weight)
        biases = [None] * 3 if module.in_proj_bias is None else _split(module.in_proj_bias)
        for projection, weight, bias in zip((new.q_proj, new.k_proj, new.v_proj), weights, biases):
            projection.weight = weight
            projection.register_parameter("bias", bias)
        new.out_proj.weight = module.out_proj.weight
        new.out_proj.register_parameter("bias", module.out_proj.bias)
        new.register_parameter("bias_k", module.bias_k)
        new.register_parameter("bias_v", module.bias_v)
        del new.rho_logit  # the meta one
        attach_rho(new, options.rho_init, options.rho_trainable)
    return new.train(module.training)


def _split(fused: nn.Parameter) -> list[nn.Parameter]:
    return [nn.Parameter(t.clone(), requires_grad=fused.requires_grad) for t in fused.detach().chunk(3)]


def _timm(module: nn.Module, options: Options, named: bool) -> Plan | str:
    from .timm import CLASS_OF, Attention

    if type(module) is not Attention and not (named and isinstance(module, Attention)):
        return _SUBCLASS.format(class_path(module), "timm.layers.Attention")
    if options.variant == "multi_hop_infsa" and module.attn_drop.p > 0:
        return f"its attn_drop is {module.attn_drop.p}: {NO_DROPOUT}"
    if reason := _cannot_draw_anew(module, options):
        return reason

    def apply():
        module.__class__ = CLASS_OF[options.variant]
        return _adopt(module, options)

    return Plan(apply)


def _transformers(module: nn.Module, options: Options, parents: Sequence[nn.Module]) -> Plan | str:
    from .transformers import CONFIG_SAYS_CAUSAL, SAY_SELF, is_cross_attention, other_tokens, register

    config = module.config
    if hasattr(module, "has_relative_attention_bias"):
        return "it adds position biases to its scores, which InfSA, without an exponential, has no place for"
    for name, what in _SPECIAL.items():
        if getattr(module, name, None) not in (None, False):
            return f"it has {what} ({name}), which InfSA has no place for"
    if not hasattr(module, "sliding_window") and getattr(config, "sliding_window", None):
        return "its config has a sliding window (sliding_window), which InfSA has no place for"
    if getattr(module, "is_decoder", False) or getattr(config, "is_decoder", False):
        return f"it belongs to a decoder: {NO_CAUSAL}"
    causal = getattr(config, "is_causal", None) if CONFIG_SAYS_CAUSAL else None
    if causal is None:
        causal = getattr(module, "is_causal", None) or _masked_causally(parents)
        if not causal and not hasattr(module, "is_causal"):
            return "it does not say whether it is causal: if it is not, set its is_causal = False"
    if causal:
        return f"it is causal: {NO_CAUSAL}"
    cross = is_cross_attention(module)
    if cross:
        return "it is cross-attention, whose attention function is not told which queries are padding"
    if cross is None:
        return f"it takes {', '.join(other_tokens(type(module)))}, so it may be cross-attention: {SAY_SELF}"
    if reason := _cannot_draw_anew(module, options):
        return reason

    def apply():
        register()
        return _adopt(module, options)

    return Plan(apply, config)


def _masked_causally(parents: Sequence[nn.Module]) -> bool:
    """Whether the model around makes a causal mask: the text encoders of CLIP do, whose attention says it is not causal."""
    for parent in reversed(parents):
        code = getattr(inspect.unwrap(type(parent).forward), "__code__", None)
        if code is not None and any(re.search("causal_(attention_)?mask", name) for name in code.co_names):
            return True
        if hasattr(parent, "config_class"):  # a PreTrainedModel: what is outside of it masks its other parts
            return False
    return False


def _adopt(module: nn.Module, options: Options) -> nn.Module:
    if not options.copy_weights:
        for part in _owners_of_parameters(module):
            part.reset_parameters()
    attach_rho(module, options.rho_init, options.rho_trainable)
    module.hops, module.score_floor = options.hops, options.score_floor
    return module


def _cannot_draw_anew(module: nn.Module, options: Options) -> str | None:
    if options.copy_weights:
        return None
    without = [class_path(m) for m in _owners_of_parameters(module) if not hasattr(m, "reset_parameters")]
    return (
        f"copy_weights=False: {', '.join(without)} has no reset_parameters() to draw new weights" if without else None
    )


def _owners_of_parameters(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if next(m.parameters(recurse=False), None) is not None]


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks",
          "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")  # fmt: skip

_SPECIAL = {
    "sinks": "attention sinks",
    "sliding_window": "a sliding window",
    "attn_logit_softcapping": "soft-capped scores",
    "relative_attention_bias": "position biases",
    "relative_position_bias": "position biases",
}

_REPLACED = "its forward was replaced on the object itself, and may compute something else"
_SUBCLASS = "{} is a subclass of {} and may compute something else: name it in target_types if it does not"

"""`convert`: the attention of an existing model becomes InfSA, with the weights that it has."""

import copy
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from torch import nn

from .checks import LEAVE_OUT, class_path, fraction
from .families import Options, Plan, dispatches, is_known, note_on, plan_of
from .functional import check_score_floor, check_variant

# The floor that converted models of Linear-InfSA train with, from runs on small data sets: docs/nn.md, Training.
FLOOR_TO_TRAIN_WITH = 0.1


@dataclass(frozen=True)
class ConversionReport:
    """What :func:`convert` did.

    Attributes:
        model: the converted model; the one given if ``inplace``, unless that is itself an nn.MultiheadAttention.
        converted: the class that each converted module had, by its name in the model.
        refused: why each other attention module was left as it was, by its name in the model.
        notes: what may still make a converted module raise when it is run, by its name in the model.
        advice: what to know before training; empty if nothing.
    """

    model: nn.Module
    converted: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    advice: str = ""

    def __str__(self) -> str:
        lines = [f"converted {name or '(the model)'}: {what}" for name, what in self.converted.items()]
        lines += [f"note      {name or '(the model)'}: {what}" for name, what in self.notes.items()]
        lines += [f"refused   {name or '(the model)'}: {why}" for name, why in self.refused.items()]
        lines += [f"advice    {self.advice}"] * bool(self.advice)
        return "\n".join(lines) or "no attention found"


def convert(
    model: nn.Module,
    variant: str = "linear_infsa",
    rho_init: float = 0.95,
    rho_trainable: bool = True,
    copy_weights: bool = True,
    include_patterns: str | Iterable[str] | None = None,
    exclude_patterns: str | Iterable[str] | None = None,
    target_types: type | Iterable[type] | None = None,
    inplace: bool = False,
    strict: bool = False,
    hops: int | None = None,
    score_floor: float = 0.0,
) -> ConversionReport:
    """Turns the attention of a model into InfSA: exactly, or not at all and with the reason.

    Converts nn.MultiheadAttention (also inside nn.TransformerEncoder and torchvision's ViT), timm's Attention, and every
    non-causal self-attention of transformers that calls its registered attention function (ViT, DINOv2, BERT, ...; also
    Llama-style models with ``config.is_causal = False``). Each keeps its projections, dtype, device, training mode and
    requires_grad, and gains ``rho_logit``. A module that several places share is converted once and stays shared.

    Everything is planned before anything changes. Wrap in DistributedDataParallel, compile and make the optimizer
    afterwards: rho_logit is a new parameter, and nn.MultiheadAttention's are split into one projection each.

    Args:
        model: any module.
        variant: "linear_infsa", "pure_infsa" or "multi_hop_infsa".
        rho_init: rho at the start, between 0 and 1.
        rho_trainable: whether ``rho_logit`` is a parameter, or a buffer.
        copy_weights: whether the converted modules keep their weights, or draw new ones by ``reset_parameters()``.
        include_patterns: regular expressions; only modules in whose name one is found are considered.
        exclude_patterns: regular expressions; modules in whose name one is found are left alone.
        target_types: classes; only their instances are considered. Naming a subclass of a class above says that it computes
            the same.
        inplace: whether ``model`` itself is changed, or a copy.
        strict: whether a refused module raises, with nothing changed, instead of being left as it was and reported.
        hops: of multi_hop_infsa; None for all of them.
        score_floor: of linear_infsa, as in :class:`InfSAAttention`. Keys keep their own projection, so train with a floor;
            the report says with which.

    Returns:
        A :class:`ConversionReport`: the model, what was converted, and what was refused and why.

    Raises:
        ValueError: an unknown variant, rho_init or score_floor out of range, a model that is already wrapped for distributed
        training. TypeError: rho_init or score_floor is no number. NotImplementedError: strict, and a module is refused.

    Example::

        >>> report = convert(torchvision.models.vit_b_16(), variant="linear_infsa")
        >>> print(report)
        >>> model = report.model
    """
    options = _checked_options(variant, rho_init, rho_trainable, copy_weights, hops, score_floor)
    include, exclude = _patterns("include_patterns", include_patterns), _patterns("exclude_patterns", exclude_patterns)
    types = (target_types,) if isinstance(target_types, type) else target_types and tuple(target_types)
    for module in model.modules():
        if type(module).__name__ in ("DistributedDataParallel", "FullyShardedDataParallel"):
            raise ValueError(
                f"convert: the model contains a {type(module).__name__}, expected a plain model; convert first, then wrap, "
                "so that rho_logit is synchronised too"
            )
    model = model if inplace else copy.deepcopy(model)

    plans: dict[nn.Module, Plan] = {}
    report = ConversionReport(model)
    tied = _tied_parameters(model)
    for module, names in _modules_by_names(model).items():
        if include and not any(p.search(n) for p in include for n in names):
            continue
        if any(p.search(n) for p in exclude for n in names) or (types and not isinstance(module, types)):
            continue
        if is_known(module):
            named = bool(types) and type(module) in types
            plan = plan_of(module, options, _parents(model, names[0]), tied, named)
        elif _looks_like_attention(module, _parents(model, names[0])):
            plan = f"{class_path(module)} is none of the classes that convert() knows"
            if type(module).__module__.startswith("transformers."):
                plan += ", and does not call the attention function registered with transformers; a newer version may"
        else:
            continue
        if isinstance(plan, Plan):
            plans[module] = plan
            report.converted.update(dict.fromkeys(names, type(module).__name__))
            for name in names:
                if note := note_on(module, _parents(model, name)):
                    report.notes[name] = note
        else:
            report.refused.update(dict.fromkeys(names, plan))

    refused = {n: why for n, why in report.refused.items() if not hasattr(model.get_submodule(n), "rho_logit")}
    if strict and refused:
        lines = "\n".join(f"  {name or '(the model)'}: {why}" for name, why in refused.items())
        raise NotImplementedError(f"convert: some attention cannot be converted{LEAVE_OUT}:\n{lines}")
    new = _apply(plans)
    _switch_configs(model, plans, options)
    _install(model, new)
    return replace(report, model=new.get(model, model), advice=_advice(options) if plans else "")


def replace_attention(
    attention: nn.Module,
    variant: str = "linear_infsa",
    rho_init: float = 0.95,
    rho_trainable: bool = True,
    copy_weights: bool = True,
    hops: int | None = None,
    score_floor: float = 0.0,
) -> nn.Module:
    """The InfSA counterpart of one attention module, to be put in its place; arguments as :func:`convert`.

    nn.MultiheadAttention gives a new module that shares its output projection; modules of timm and of transformers change
    themselves and are returned. In an nn.TransformerEncoder use :func:`convert`, which also switches off nested tensors.

    Raises:
        NotImplementedError: this module cannot be converted; the message says why. ValueError: as :func:`convert`.
    """
    options = _checked_options(variant, rho_init, rho_trainable, copy_weights, hops, score_floor)
    plan = "it is no attention that convert() knows"
    if is_known(attention):
        plan = plan_of(attention, options, parents=(), tied=set(), named=False)
    if not isinstance(plan, Plan):
        raise NotImplementedError(f"replace_attention: {class_path(attention)} cannot be converted: {plan}")
    new = plan.apply()
    _switch_configs(attention, {attention: plan}, options)
    return new


def _checked_options(variant, rho_init, rho_trainable, copy_weights, hops, score_floor) -> Options:
    check_variant("convert", variant, hops)
    check_score_floor("convert", variant, score_floor)
    fraction("convert", "rho_init", rho_init)
    return Options(variant, rho_init, rho_trainable, copy_weights, hops, float(score_floor))


def _advice(options: Options) -> str:
    if options.variant != "linear_infsa" or options.score_floor > 0:
        return ""
    return (
        f"to train it, convert with score_floor={FLOOR_TO_TRAIN_WITH}: keys have a projection of their own, so heads may have no "
        "positive score, and gradients may be large (docs/nn.md, Training)"
    )


def _patterns(name: str, patterns: str | Iterable[str] | None) -> list[re.Pattern]:
    patterns = [patterns] if isinstance(patterns, str) else list(patterns or ())
    try:
        return [re.compile(p) for p in patterns]
    except (re.error, TypeError) as error:
        raise ValueError(f"convert: {name} is {patterns!r}, expected regular expressions: {error}") from error


def _modules_by_names(model: nn.Module) -> dict[nn.Module, list[str]]:
    found: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found.setdefault(module, []).append(name)
    return found


def _parents(model: nn.Module, name: str) -> list[nn.Module]:
    """The modules around the one of this name, outermost first."""
    parts = name.split(".") if name else []
    return [model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts))]


def _tied_parameters(model: nn.Module) -> set[nn.Parameter]:
    seen, tied = set(), set()
    for module in model.modules():
        own = {p for p in module._parameters.values() if p is not None}
        tied |= seen & own
        seen |= own
    return tied


def _looks_like_attention(module: nn.Module, parents: list[nn.Module]) -> bool:
    """Whether a module is named so and neither is inside of one that is known nor contains another: then it is reported."""

    def named(m):
        return "attention" in type(m).__name__.lower()

    inside = (m for m in module.modules() if m is not module)
    return named(module) and not any(map(is_known, parents)) and not any(named(m) or is_known(m) for m in inside)


def _apply(plans: dict[nn.Module, Plan]) -> dict[nn.Module, nn.Module]:
    """The new module of each. Those that allocate come first, as they can fail, and change nothing before _install."""
    order = sorted(plans, key=lambda module: not isinstance(module, nn.MultiheadAttention))
    return {module: plans[module].apply() for module in order}


def _switch_configs(model: nn.Module, plans: dict[nn.Module, Plan], options: Options) -> None:
    """Names the InfSA attention function in the configs of transformers' modules.

    A config whose modules are all converted is switched itself, so that the model also makes the masks of that function. Else,
    and where the model is not here as a whole, each converted module gets a copy.
    """
    configs = {id(plan.config): plan.config for plan in plans.values() if plan.config is not None}
    if not configs:
        return
    from .transformers import NAME_OF

    for config in configs.values():
        users = [m for m in model.modules() if dispatches(m) and m.config is config]
        whole = any(hasattr(m, "config_class") and getattr(m, "config", None) is config for m in model.modules())
        if whole and all(user in plans for user in users):
            config._attn_implementation_internal = NAME_OF[options.variant]
            continue
        for user in users:
            if user in plans:
                user.config = copy.copy(config)
                # The property would also set the nested configs, which the copy shares with the model.
                user.config._attn_implementation_internal = NAME_OF[options.variant]


def _install(model: nn.Module, new: dict[nn.Module, nn.Module]) -> None:
    for parent in list(model.modules()):
        if isinstance(parent, nn.TransformerEncoder) and any(m in new for m in parent.modules()):
            # It would read in_proj_weight, and hand nested tensors to the layers.
            parent.use_nested_tensor = False
        for name, child in parent._modules.items():
            if child in new:
                parent._modules[name] = new[child]

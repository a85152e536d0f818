"""`parallelize`: the InfSA layers of a model share a sequence that lies on several ranks."""

import functools

from torch import Tensor, nn

from . import tokens
from .collectives import Group, name_of


def parallelize(model: nn.Module, mesh: Group) -> nn.Module:
    """Makes a model with InfSA attention sequence-parallel, in place.

    * An :class:`infsa_kernels.nn.InfViT` takes on each rank its strip of every picture, (B, C, height of the strip, width):
      whole rows of patches, top first. Its class scores are those of the whole pictures, on every rank.
    * In another model, one by :func:`infsa_kernels.nn.convert` for instance, the layers that have the attention take a part of
      the tokens on each rank: its input and its output are whole on every rank, what is between the first of these layers and the
      last is sharded.
    * An attention module by itself takes this rank's tokens.

    Do this before ``fully_shard``, DistributedDataParallel or torch.compile. Gradients are those of the sum of all ranks' losses,
    and each rank has a share of a parameter's; DistributedDataParallel or FSDP over all ranks, data and sequence, makes the mean.
    So a loss of class scores, which are equal on the ranks of a sequence, gets the gradient that one process has.

    Args:
        model: a module with InfSA attention.
        mesh: the ranks of a sequence: that dimension of a mesh, as ``mesh["sequence"]``, or a process group, or None for all.

    Returns:
        The model.

    Raises:
        ValueError: there is no InfSA attention, or it is parallelized already. NotImplementedError: softmax attention among it,
        or what has no such form: several hops, add_bias_kv; and dropout of scores, when the model runs.

    Example::

        >>> mesh = init_device_mesh("cuda", (2, 4), mesh_dim_names=("data", "sequence"))
        >>> parallelize(model, mesh["sequence"])
        >>> for block in model.blocks:
        ...     fully_shard(block, mesh=mesh)
        >>> fully_shard(model, mesh=mesh)
    """
    from ..nn.families import is_known
    from ..nn.vit import InfViT, SoftmaxAttention

    group = name_of("parallelize", mesh)
    attention = {name: m for name, m in model.named_modules() if hasattr(m, "rho_logit")}
    if not attention:
        raise ValueError("parallelize: the model has no InfSA attention, expected some; convert() it first")
    for name, module in attention.items():
        if getattr(module, "sequence_group", None) is not None:
            raise ValueError(
                f"parallelize: {name or 'the module'} is parallelized already, expected a model that is not"
            )
        _refuse(name, module)
    for name, module in model.named_modules():
        if module not in attention.values() and (is_known(module) or isinstance(module, SoftmaxAttention)):
            raise NotImplementedError(
                f"parallelize: {name} is softmax attention, expected InfSA in every layer: it would see this rank's tokens only; "
                "convert() it too, or leave the model whole"
            )
    if not isinstance(model, InfViT) and model not in attention.values():
        _shard_between(_layers(model, list(attention)), group)
    for module in (*attention.values(), *([model] if isinstance(model, InfViT) else ())):
        module.sequence_group = group
    return model


def _refuse(name: str, module: nn.Module) -> None:
    config = getattr(module, "config", None)
    hops = "multi_hop_infsa", "infsa_multi_hop"
    reasons = {
        "has several hops": getattr(module, "variant", None) in hops
        or getattr(config, "_attn_implementation", None) in hops,
        "has add_bias_kv, a key that every rank would add": getattr(module, "bias_k", None) is not None,
        "has another activation than 'relu'": getattr(module, "activation", "relu") != "relu",
    }
    for what, true in reasons.items():
        if true:
            raise NotImplementedError(
                f"parallelize: {name or 'the module'} {what}: of that there is no sequence-parallel form"
            )


def _layers(model: nn.Module, names: list[str]) -> list[nn.Module]:
    """The layers of one list that hold the attention modules of these names, one each."""
    depth = next((i for i, part in enumerate(names[0].split(".")) if part.isdigit() or "layer_" in part), None)
    prefixes = [] if depth is None else [".".join(n.split(".")[: depth + 1]) for n in names]
    lists = {p.rpartition(".")[0] for p in prefixes}
    if len(lists) != 1 or len(set(prefixes)) != len(names):
        raise NotImplementedError(
            f"parallelize: the attention modules {', '.join(names)} are not one in each layer of one list, expected that; "
            "parallelize them one by one, and give them this rank's tokens"
        )
    layers = [model.get_submodule(p) for p in prefixes]
    if any(getattr(m, "batch_first", True) is False for layer in layers for m in layer.modules()):
        raise NotImplementedError(
            "parallelize: the layers take tokens as (N, B, D), expected (B, N, D); make the model with batch_first=True"
        )
    return layers


def _shard_between(layers: list[nn.Module], group: str) -> None:
    """What the first layer gets is sharded, and so is what else has as many tokens; what the last one gives is gathered."""
    total = 0

    def local(value):
        if isinstance(value, (tuple, list)):
            return type(value)(map(local, value))
        of_tokens = isinstance(value, Tensor) and value.dim() > 1 and value.shape[1] == total
        return tokens.shard(value, group) if of_tokens else value

    def before(is_first, module, args, kwargs):
        nonlocal total
        if not args:
            args, kwargs = (kwargs["hidden_states"],), {n: t for n, t in kwargs.items() if n != "hidden_states"}
        x, *rest = args
        if is_first and x.dim() != 3:
            raise NotImplementedError(
                f"parallelize: the first layer got tokens of shape {list(x.shape)}, expected (B, N, D): in another layout there "
                "is no telling which are the tokens"
            )
        if is_first:
            total = x.shape[1]
            x = tokens.shard(x, group)
        return (x, *map(local, rest)), {n: local(t) for n, t in kwargs.items()}

    def after(module, args, out):
        if isinstance(out, Tensor):
            return tokens.gather(out, total, group)
        return (tokens.gather(out[0], total, group), *out[1:])

    for i, layer in enumerate(layers):
        layer.register_forward_pre_hook(functools.partial(before, i == 0), with_kwargs=True)
    layers[-1].register_forward_hook(after)

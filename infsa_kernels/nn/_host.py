"""What the integrations into other libraries share: their masks, rho for modules that are not ours, and leaves of torch.fx."""

import math

import torch
from torch import Tensor, nn
from torch.fx import Proxy

NO_CAUSAL = "InfSA divides by sums over all queries, and a causal form of it does not exist yet"
LEAVE_OUT = "; convert(exclude_patterns=...) leaves a module of this name as it was"


def class_path(thing: object) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def padding_of_scores_mask(op: str, mask: Tensor, scores: tuple[int, int, int, int]) -> Tensor:
    """The keys that a mask over scores removes from every query of every head: (B, M) bool, True = ignore.

    Args:
        op: names the caller in errors.
        mask: broadcasts to (B, H, N, M): bool, True = attend (the convention of scaled_dot_product_attention), or floating, 0 =
            attend and -inf or the dtype's lowest number = ignore.
        scores: (B, H, N, M).

    Raises:
        NotImplementedError: the mask differs between queries (a causal or a sliding window) or heads, or adds to scores.
    """
    if not isinstance(mask, Tensor):
        raise NotImplementedError(f"{op}: the mask is a {type(mask).__name__}, expected a Tensor")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(
            f"{op}: the mask has dtype {mask.dtype}, expected torch.bool, True = attend, or a floating dtype, 0 = attend"
        )
    B, _, _, M = scores
    if mask.dim() > 4 or any(size not in (1, full) for size, full in zip(reversed(mask.shape), reversed(scores))):
        raise ValueError(f"{op}: the mask has shape {list(mask.shape)}, expected one that broadcasts to {list(scores)}")
    if mask.dim() == 0 or mask.shape[-1] != M:
        raise NotImplementedError(
            f"{op}: the mask has shape {list(mask.shape)}, which tells heads or queries apart but not keys: InfSA has no such "
            "mask; remove tokens with a mask over the keys"
        )
    mask = mask[(None,) * (4 - mask.dim())]
    if mask.dtype == torch.bool:
        ignore = ~mask
    else:
        ignore = mask <= torch.finfo(mask.dtype).min / 2
        require(
            (ignore | (mask == 0)).all(),
            f"{op}: the mask adds values to the scores (a position bias?): InfSA has no exponential that would turn them into "
            "factors; it takes 0 = attend and -inf = ignore only",
        )
    keys = ignore.flatten(1, 2).all(1)[:, None, None]
    # Some hosts hide everything from the padding too, when it is the query.
    empty = ignore.all(-1, keepdim=True)
    same = (ignore == keys) | empty
    if mask.shape[2] == M:
        same = same & (~empty | keys.mT)
    require(
        same.all(),
        f"{op}: the mask differs between queries or heads, as a causal mask or a sliding window does: InfSA divides by sums over "
        "all queries, so only whole tokens can be removed" + LEAVE_OUT,
    )
    return keys[:, 0, 0].expand(B, M)


def require(condition: Tensor, message: str) -> None:
    """NotImplementedError unless a one-element bool tensor is true; RuntimeError under torch.compile."""
    if torch.compiler.is_compiling():
        torch._assert_async(condition, message)
    elif not condition:
        raise NotImplementedError(message)


def attach_rho(module: nn.Module, rho_init: float, trainable: bool) -> None:
    """Gives a module ``rho_logit``, a parameter or a buffer of shape (1,), with the dtype and device of its parameters."""
    like = next((p for p in module.parameters() if p.is_floating_point() and p.itemsize >= 2), torch.empty(0))
    logit = torch.full((1,), math.log(rho_init / (1 - rho_init)), dtype=like.dtype, device=like.device)
    if trainable:
        module.rho_logit = nn.Parameter(logit)
    else:
        module.register_buffer("rho_logit", logit)


class Leaf(nn.Module):
    """A module whose call is one node of a torch.fx graph, whoever traces, as are those of torch.nn; but not as the root."""

    def __call__(self, *args, **kwargs):
        tracer = next((a.tracer for a in (*args, *kwargs.values()) if isinstance(a, Proxy)), None)
        if tracer is None:
            return super().__call__(*args, **kwargs)

        def node(*args, **kwargs):
            return tracer.create_proxy("call_module", tracer.path_of_module(self), args, kwargs)

        # Before the hooks: they run when the graph does.
        return tracer.call_module(self, node, args, kwargs)

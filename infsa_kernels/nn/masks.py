"""Every mask that a caller may give, as padding, (B, L) bool, True = ignore; any other is refused with the reason.

nn.MultiheadAttention           True = ignore, or -inf       over keys          multihead_padding
scaled_dot_product_attention    True = attend, or 0          over scores        padding_of_scores_mask
transformers                    1 = keep                     over tokens        padding_of_kept
"""

import torch
from torch import Tensor

from .checks import LEAVE_OUT, require


def refuse_attention_masks(attn_mask, is_causal) -> None:
    if attn_mask is None and not is_causal:
        return
    what = "attn_mask is a Tensor, expected None" if attn_mask is not None else "is_causal is True, expected False"
    raise NotImplementedError(
        f"InfSAAttention: {what}: InfSA divides by sums over all queries (a central query, a Frobenius norm), so a mask that "
        "differs from query to query, a causal one for instance, has no definition here; to remove tokens give "
        f"key_padding_mask{LEAVE_OUT}"
    )


def multihead_padding(name: str, mask: Tensor | None, tokens: Tensor, batched: bool) -> Tensor | None:
    """A padding mask of nn.MultiheadAttention for ``tokens`` (B, L, D)."""
    if mask is None:
        return None
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(
            f"InfSAAttention: {name} has dtype {mask.dtype}, expected torch.bool, True = ignore, or a floating dtype, "
            "-inf = ignore; a mask of 1 = keep is given as mask == 0"
        )
    expected = tokens.shape[:2] if batched else tokens.shape[1:2]
    if mask.shape != expected:
        raise ValueError(
            f"InfSAAttention: {name} has shape {list(mask.shape)}, expected {'(B, L)' if batched else '(L,)'} = "
            f"{list(expected)}"
        )
    if mask.dtype != torch.bool:
        ignore = mask == -torch.inf
        require(
            ((mask == 0) | ignore).all(),
            f"InfSAAttention: {name} holds a value that is neither 0 nor -inf: scores have no exponential here, so nothing "
            "can be added to them; give a bool mask, True = ignore",
            ValueError,
            wait=False,
        )
        mask = ignore
    return mask if batched else mask.unsqueeze(0)


def padding_of_kept(op: str, mask: Tensor, tokens: tuple[int, int]) -> Tensor:
    """A mask of transformers over ``tokens`` (B, L): bool or integers, 1 = keep."""
    if mask.is_floating_point():
        raise TypeError(f"{op}: attention_mask has dtype {mask.dtype}, expected bool or integers, 1 = keep")
    if mask.shape != tokens:
        raise ValueError(f"{op}: attention_mask has shape {list(mask.shape)}, expected (B, M) = {list(tokens)}")
    return mask == 0


def padding_of_scores_mask(op: str, mask: Tensor, scores: tuple[int, int, int, int]) -> Tensor:
    """The keys that a mask over scores removes from every query of every head: (B, M).

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
    # Not `size in (1, full)`, which torch.compile finds false where one of the sizes is symbolic.
    if mask.dim() > 4 or any(size != 1 and size != full for size, full in zip(reversed(mask.shape), reversed(scores))):
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


def without(padding: Tensor | None, t: Tensor) -> Tensor:
    """``t`` (B, L, D) or (B, H, L, d) with the rows of padding set to 0, whatever they hold."""
    if padding is None:
        return t
    return t.masked_fill(padding[(slice(None), *[None] * (t.dim() - 3), slice(None), None)], 0)

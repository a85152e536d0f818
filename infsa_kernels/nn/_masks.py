"""The masks of nn.MultiheadAttention: padding as a bool mask, anything else refused with the reason."""

import torch
from torch import Tensor

from ._host import LEAVE_OUT


def refuse_attention_masks(attn_mask, is_causal) -> None:
    if attn_mask is None and not is_causal:
        return
    what = "attn_mask is a Tensor, expected None" if attn_mask is not None else "is_causal is True, expected False"
    raise NotImplementedError(
        f"InfSAAttention: {what}: InfSA divides by sums over all queries (a central query, a Frobenius norm), so a mask that "
        "differs from query to query, a causal one for instance, has no definition here; to remove tokens give "
        f"key_padding_mask{LEAVE_OUT}"
    )


def as_bool(name: str, mask: Tensor | None, tokens: Tensor, batched: bool) -> Tensor | None:
    """A padding mask as (B, L) bool, True = ignore. ``tokens`` is (B, L, D)."""
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
        _refuse_finite_bias(name, mask)
        mask = mask == -torch.inf
    return mask if batched else mask.unsqueeze(0)


def _refuse_finite_bias(name: str, mask: Tensor) -> None:
    right = ((mask == 0) | (mask == -torch.inf)).all()
    message = (
        f"InfSAAttention: {name} holds a value that is neither 0 nor -inf: scores have no exponential here, so nothing can "
        "be added to them; give a bool mask, True = ignore"
    )
    # Reading a value would stop a GPU's stream, and split a compiled graph.
    if torch.compiler.is_compiling() or mask.device.type != "cpu":
        torch._assert_async(right, message)
    elif not right:
        raise ValueError(message)

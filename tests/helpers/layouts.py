"""The memory layouts that an input may come in, NaN wherever no element of it lies."""

import torch
from torch import Tensor


def _poisoned(like: Tensor, *shape: int) -> Tensor:
    return torch.full(shape, torch.nan, dtype=like.dtype, device=like.device)


def _token_major(t: Tensor) -> Tensor:
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def _fused_projection(t: Tensor) -> Tensor:
    """One of three slices of a [B, L, 3, H, d] projection."""
    B, H, L, d = t.shape
    fused = _poisoned(t, B, L, 3, H, d)
    view = fused[:, :, 1].transpose(1, 2)
    view.copy_(t)
    return view


def _every_other_channel(t: Tensor) -> Tensor:
    view = _poisoned(t, *t.shape[:-1], 2 * t.shape[-1] + 1)[..., 1::2]
    view.copy_(t)
    return view


def _every_third_token(t: Tensor) -> Tensor:
    B, H, L, d = t.shape
    view = _poisoned(t, B, H, 3 * L, d)[:, :, 1::3]
    view.copy_(t)
    return view


def _channel_major(t: Tensor) -> Tensor:
    return t.mT.contiguous().mT


def _offset_by_one(t: Tensor) -> Tensor:
    """Dense, from the second element of its storage on: no vector of it is aligned."""
    view = _poisoned(t, t.numel() + 2)[1:-1].view(t.shape)
    view.copy_(t)
    return view


def _expanded_batch(t: Tensor) -> Tensor:
    return t[:1].expand(t.shape)


def _expanded_head(t: Tensor) -> Tensor:
    return t[:, :1].expand(t.shape)


def _expanded_token(t: Tensor) -> Tensor:
    return t[:, :, :1].expand(t.shape)


LAYOUTS = {
    "contiguous": torch.clone,
    "token_major": _token_major,
    "fused_projection": _fused_projection,
    "every_other_channel": _every_other_channel,
    "every_third_token": _every_third_token,
    "channel_major": _channel_major,
    "offset_by_one": _offset_by_one,
    "expanded_batch": _expanded_batch,
    "expanded_head": _expanded_head,
    "expanded_token": _expanded_token,
}


def whole_storage(t: Tensor) -> Tensor:
    """Every byte behind a tensor, to see that nothing wrote to it or around it."""
    return torch.tensor([], dtype=torch.uint8, device=t.device).set_(t.untyped_storage())


def tokens_amid_nan(
    B: int, N: int, D: int, dtype: torch.dtype, *, strided: bool, masked: bool, offset: float = 0.0
) -> tuple[Tensor, Tensor | None]:
    """Tokens (B, N, D), with NaN around them and in removed ones, and the mask."""
    x = torch.full((B, N + 3, D + 5), torch.nan, dtype=dtype) if strided else torch.empty(B, N, D, dtype=dtype)
    x = x[:, 1 : N + 1, 2 : D + 2] if strided else x
    x.copy_(torch.randn(B, N, D) + offset)
    mask = torch.rand(B, N) < 0.3 if masked else None
    return (x if mask is None else x.masked_fill_(mask[..., None], torch.nan)), mask

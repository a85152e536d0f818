"""Maps as other libraries expect them. None of these is imported here."""

import numpy as np
import torch
from torch import Tensor, nn

from .maps import attention_maps
from .measures import upsampled


def reshape_transform(grid: tuple[int, int]):
    """pytorch-grad-cam's ``reshape_transform`` for tokens (B, N, C), of which the last h * w are patches: to (B, C, h, w).

    Example::

        >>> cam = GradCAM(model, [model.blocks[-1].norm1], reshape_transform=reshape_transform((14, 14)))
    """
    h, w = grid

    def transform(tokens: Tensor) -> Tensor:
        if tokens.dim() != 3 or tokens.shape[1] < h * w:
            raise ValueError(
                f"reshape_transform: the layer gives {list(tokens.shape)}, expected tokens (B, N, C) with N at least h x w = "
                f"{h} x {w}"
            )
        return tokens[:, -h * w :].unflatten(1, (h, w)).permute(0, 3, 1, 2)

    return transform


def attributions(model: nn.Module, images: Tensor | tuple[Tensor], **options) -> Tensor | tuple[Tensor]:
    """:func:`attention_maps` as captum's attributions: (B, C, height, width) as ``images``, equal for all channels.

    A tuple of one tensor, as captum's metrics give it, gives a tuple. ``options`` are those of :func:`attention_maps`, but
    heads=None.

    Example::

        >>> captum.metrics.sensitivity_max(functools.partial(attributions, model, kind="in"), images)
    """
    if isinstance(images, tuple):
        return tuple(attributions(model, one, **options) for one in images)
    return _resized_maps(model, images, **options).repeat(1, images.shape[1], 1, 1)


def quantus_explain(model: nn.Module, inputs: np.ndarray, targets: np.ndarray | None = None, device=None, **options):
    """Quantus' ``explain_func``: maps of arrays (B, C, height, width), as an array (B, 1, height, width).

    ``options`` are those of :func:`attention_maps`, but heads=None; they go into ``explain_func_kwargs``.

    ``targets`` is not used: attention is the same for every class.

    Example::

        >>> quantus.PixelFlipping()(model, x, y, explain_func=quantus_explain, explain_func_kwargs={"kind": "in"})
    """
    images = torch.as_tensor(inputs, device=device, dtype=next(model.parameters()).dtype)
    return _resized_maps(model, images, **options).cpu().numpy()


def _resized_maps(model: nn.Module, images: Tensor, **options) -> Tensor:
    """(B, 1, height, width)."""
    return upsampled(attention_maps(model, images, **options), images.shape[2:])[:, None]

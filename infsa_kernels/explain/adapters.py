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


def attributions(model: nn.Module, images: Tensor | tuple[Tensor], **options) -> Tensor:
    """:func:`attention_maps` as captum's attributions: (B, C, height, width) as ``images``, equal for all channels.

    ``images`` may be a tuple of one tensor, as captum gives it. ``options`` are those of :func:`attention_maps`, but heads=None.

    Example::

        >>> captum.metrics.sensitivity_max(functools.partial(attributions, model, kind="in"), images)
    """
    if isinstance(images, tuple):
        (images,) = images
    maps = attention_maps(model, images, **options)
    return upsampled(maps, images.shape[2:])[:, None].expand(-1, images.shape[1], -1, -1)


def quantus_explain(model: nn.Module, inputs: np.ndarray, targets: np.ndarray | None = None, device=None, **options):
    """Quantus' ``explain_func``: maps of arrays (B, C, height, width), as an array (B, 1, height, width).

    ``options`` are those of :func:`attention_maps`, but heads=None; they go into ``explain_func_kwargs``.

    ``targets`` is not used: attention is the same for every class.

    Example::

        >>> quantus.PixelFlipping()(model, x, y, explain_func=quantus_explain, explain_func_kwargs={"kind": "in"})
    """
    images = torch.as_tensor(inputs, device=device, dtype=next(model.parameters()).dtype)
    return attributions(model, images, **options)[:, :1].cpu().numpy()

"""Tokens of a real photograph: patches of 16 x 16 pixels, projected by fixed random matrices to q, k and v."""

import numpy as np
import torch
from skimage import data, transform
from torch import Tensor

PATCH = 16
D = 1024


def photograph(pixels: int) -> np.ndarray:
    """The astronaut Eileen Collins (NASA, public domain; in the scikit-image wheel) as (pixels, pixels, 3) in [0, 1].

    Smaller sizes are resampled with antialiasing. Larger ones repeat the mirrored picture: enlarging would leave
    patches without detail, and tokens unlike those of a real large photograph.
    """
    picture = data.astronaut().astype(np.float32) / 255
    side = picture.shape[0]
    if pixels < side:
        return transform.resize(picture, (pixels, pixels), anti_aliasing=True).astype(np.float32)
    return np.pad(picture, ((0, pixels - side), (0, pixels - side), (0, 0)), mode="symmetric")


def patches(pixels: int) -> Tensor:
    """(N, 3 * PATCH * PATCH), each channel normalised over the picture; N = (pixels / PATCH)^2."""
    picture = torch.from_numpy(photograph(pixels))  # (pixels, pixels, 3)
    picture = (picture - picture.mean((0, 1))) / picture.std((0, 1))
    side = pixels // PATCH
    grid = picture[: side * PATCH, : side * PATCH].reshape(side, PATCH, side, PATCH, 3)
    return grid.permute(0, 2, 4, 1, 3).reshape(side * side, 3 * PATCH * PATCH)


def queries_keys_values(pixels: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of one random, untrained attention layer over the patches, each (N, D), float32."""
    generator = torch.Generator().manual_seed(0)
    x = tokens(pixels, generator)
    return _project(x, generator), _project(x, generator), _project(x, generator)


def tokens(pixels: int, generator: torch.Generator | None = None) -> Tensor:
    """The normalised tokens that q, k and v are projected from: (N, D), float32."""
    generator = generator or torch.Generator().manual_seed(0)
    return torch.nn.functional.layer_norm(_project(patches(pixels), generator), (D,))


def picture(pixels: int) -> Tensor:
    """The photograph as a model takes it: (1, 3, pixels, pixels), each channel normalised."""
    x = torch.from_numpy(photograph(pixels)).permute(2, 0, 1)[None]
    return (x - x.mean((2, 3), keepdim=True)) / x.std((2, 3), keepdim=True)


def _project(x: Tensor, generator: torch.Generator) -> Tensor:
    return x @ (torch.randn(x.shape[1], D, generator=generator) / x.shape[1] ** 0.5)

"""Tokens of a real photograph: patches of 16 x 16 pixels, projected by fixed random matrices to q, k and v."""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

PATCH = 16
D = 1024
# The photograph of 512 pixels and its mirror image: what a larger picture repeats.
PERIOD = 1024


def photograph(pixels: int) -> np.ndarray:
    """The astronaut Eileen Collins (NASA, public domain; in the scikit-image wheel) as (pixels, pixels, 3) in [0, 1].

    Smaller sizes are resampled with antialiasing. Larger ones repeat the mirrored picture: enlarging would leave
    patches without detail, and tokens unlike those of a real large photograph. Without scikit-image: noise.
    """
    try:
        from skimage import data, transform
    except ImportError:
        return np.random.default_rng(0).random((pixels, pixels, 3), np.float32)
    picture = data.astronaut().astype(np.float32) / 255
    side = picture.shape[0]
    if pixels < side:
        return transform.resize(picture, (pixels, pixels), anti_aliasing=True).astype(np.float32)
    return np.pad(picture, ((0, pixels - side), (0, pixels - side), (0, 0)), mode="symmetric")


def picture(pixels: int) -> Tensor:
    """The photograph as a model takes it: (1, 3, pixels, pixels), each channel normalised over the picture."""
    image = torch.from_numpy(photograph(pixels)).permute(2, 0, 1).contiguous()
    for channel in image:  # in place: the largest picture takes a gigabyte
        channel -= channel.mean()
        channel /= channel.std()
    return image[None]


@lru_cache(maxsize=2)  # points come by size
def inputs(level: str, pixels: int) -> list[Tensor]:
    """A model's picture; a layer's tokens x (1, N, D); or an operator's q, k, v, projected from x as by one untrained layer.

    N = (pixels / PATCH)^2. What repeats in a large picture is projected once.
    """
    if level == "model":
        return [picture(pixels)]
    repeats = pixels // PERIOD if pixels % PERIOD == 0 else 1
    side = pixels // PATCH // repeats
    whole = picture(pixels // repeats)[0, :, : side * PATCH, : side * PATCH]
    patches = (
        whole.unflatten(1, (side, PATCH)).unflatten(3, (side, PATCH)).permute(1, 3, 0, 2, 4).flatten(2).flatten(0, 1)
    )
    generator = torch.Generator().manual_seed(0)

    def project(x: Tensor) -> Tensor:
        return x @ (torch.randn(x.shape[1], D, generator=generator) / x.shape[1] ** 0.5)

    x = torch.nn.functional.layer_norm(project(patches), (D,))
    found = [x] if level == "layer" else [project(x) for _ in "qkv"]
    return [t.view(side, side, D).repeat(repeats, repeats, 1).flatten(0, 1)[None] for t in found]

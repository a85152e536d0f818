"""Pictures of which is known where the object is: one piece of clothing among fragments of others, before photographed texture.

Every picture is drawn from a generator. Object, size, place, fragments and background are independent of each other.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from examples.pictures import FASHION_MNIST, read_idx

FASHION = FASHION_MNIST  # 70,000 photographs of clothes, 28 x 28 (MIT licence)
TEXTURES = ("astronaut", "brick", "camera", "chelsea", "coffee", "coins", "grass", "gravel", "moon", "rocket")
# Its ten classes as five that a silhouette tells apart: small models learn them in minutes.
CLASSES = ("top", "trousers", "dress", "shoe", "bag")
CLASS_OF = (0, 1, 0, 2, 0, 3, 0, 3, 4, 3)
ITEM, FRAGMENT = 28, 14
FRAGMENTS = 4


@dataclass(frozen=True)
class Items:
    """Things to be found: pictures and masks (n, 1, 28, 28), float32 in [0, 1], classes (n,); ``source`` says what they are."""

    pictures: Tensor
    masks: Tensor
    classes: Tensor
    names: tuple[str, ...]
    source: str


@dataclass(frozen=True)
class Scenes:
    """pictures (B, 1, side, side), normalised; masks (B, side, side) bool and boxes (B, 4) of the objects; classes (B,)."""

    pictures: Tensor
    masks: Tensor
    boxes: Tensor
    classes: Tensor


def items() -> tuple[Items, Items]:
    """For training and for testing: photographs of clothes where they are installed, else scikit-learn's digits."""
    if FASHION.exists():
        source = "Fashion-MNIST (Debian's dataset-fashion-mnist)"
        return tuple(_items(*_fashion(part), CLASSES, source) for part in ("train", "t10k"))
    from sklearn.datasets import load_digits

    digits = load_digits()
    pictures = torch.from_numpy(digits.images).float()[:, None] / 16
    pictures = F.interpolate(pictures, (ITEM, ITEM), mode="bilinear")
    source = "scikit-learn's digits, since Debian's package dataset-fashion-mnist is not installed"
    classes, names = torch.from_numpy(digits.target), tuple(map(str, range(10)))
    first = len(pictures) * 3 // 4
    return tuple(_items(pictures[part], classes[part], names, source) for part in (slice(first), slice(first, None)))


def _fashion(part: str) -> tuple[Tensor, Tensor]:
    pictures, classes = (read_idx(FASHION / f"{part}-{name}-ubyte.gz") for name in ("images-idx3", "labels-idx1"))
    return pictures.unsqueeze(1).float() / 255, torch.tensor(CLASS_OF)[classes.long()]


def _items(pictures: Tensor, classes: Tensor, names: tuple[str, ...], source: str) -> Items:
    from scipy.ndimage import binary_fill_holes

    solid = np.stack([binary_fill_holes(one) for one in (pictures[:, 0] > 0.1).numpy()])
    return Items(pictures, torch.from_numpy(solid)[:, None].float(), classes, names, source)


def textures() -> list[Tensor]:
    """Photographs of scikit-image's wheel, grey, (height, width) in [0, 1]."""
    from skimage import color, data

    pictures = [getattr(data, name)() for name in TEXTURES]
    grey = [color.rgb2gray(p) if p.ndim == 3 else p / 255 for p in pictures]
    return [torch.from_numpy(p).float() for p in grey]


def draw(things: Items, backgrounds: list[Tensor], number: int, generator: torch.Generator, side: int = 96) -> Scenes:
    """Pictures whose objects are items of 40 to 72 pixels."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    def choose(n: int, *shape: int) -> Tensor:
        return torch.randint(n, shape, generator=generator)

    pictures = torch.stack([_crop(backgrounds[choose(len(backgrounds)).item()], side, choose) for _ in range(number)])
    pictures = 0.3 + 0.4 * pictures[:, None]
    for _ in range(FRAGMENTS):
        parts, corners = choose(len(things.classes), number), choose(ITEM - FRAGMENT + 1, 2, number)
        window = torch.arange(ITEM)
        inside = [(window >= c[:, None]) & (window < c[:, None] + FRAGMENT) for c in corners]
        cut = (inside[0][:, :, None] & inside[1][:, None, :])[:, None] * things.masks[parts]
        size, place = uniform(30, 60, number), uniform(0, side - FRAGMENT, 2, number)
        # A fragment's corner, not that of the item it is of, goes to its place.
        place = place - corners.flip(0) * size / ITEM
        pictures = _paste(pictures, things.pictures[parts], cut, size, place)[0]
    # As many of every class.
    members = [(things.classes == c).nonzero().flatten() for c in range(len(things.names))]
    objects = torch.stack([m[choose(len(m), 1).item()] for m in (members[c] for c in choose(len(members), number))])
    size = uniform(40, 72, number)
    place = uniform(0, 1, 2, number) * (side - size)
    pictures, masks = _paste(pictures, things.pictures[objects], things.masks[objects], size, place)
    return Scenes((pictures - 0.5) / 0.25, masks, _boxes(masks), things.classes[objects])


def _crop(photograph: Tensor, side: int, choose) -> Tensor:
    while min(photograph.shape) < side:
        photograph = torch.cat([photograph, photograph.flip(0)]) if photograph.shape[0] < side else photograph
        photograph = torch.cat([photograph, photograph.flip(1)], 1) if photograph.shape[1] < side else photograph
    top, left = (choose(n - side + 1).item() for n in photograph.shape)
    return photograph[top : top + side, left : left + side]


def _paste(pictures: Tensor, items: Tensor, masks: Tensor, size: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """Items resized to ``size`` pixels at ``place`` (x, y): the pictures, and where the items are (B, side, side)."""
    side = pictures.shape[-1]
    scale = side / size
    shift = scale - 1 - 2 * place / size
    theta = torch.zeros(len(size), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = scale
    theta[:, 0, 2], theta[:, 1, 2] = shift
    grid = F.affine_grid(theta, list(pictures.shape), align_corners=False)
    placed = F.grid_sample(torch.cat([items, masks], 1), grid, align_corners=False)
    mask = placed[:, 1:] > 0.5
    return torch.where(mask, placed[:, :1], pictures), mask[:, 0]


def _boxes(masks: Tensor) -> Tensor:
    """Left, top, right, bottom of masks (B, h, w), the last two excluded: (B, 4)."""
    sides = []
    for dim in (1, 2):  # columns, rows
        any_of = masks.any(dim).byte()
        sides.append((any_of.argmax(1), any_of.shape[1] - any_of.flip(1).argmax(1)))
    (left, right), (top, bottom) = sides
    return torch.stack([left, top, right, bottom], 1)

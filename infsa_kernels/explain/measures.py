"""What an attention map is worth: whether the model depends on what it marks, and whether it marks the object.

Every figure comes with those of two maps that know nothing of the picture: a random one and a Gaussian in its middle.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import evaluating

ORDERS = ("morf", "lerf")
FILLS = ("blur", "mean", "zero")


def random_maps(like: Tensor, seed: int = 0) -> Tensor:
    """Maps of equally distributed values, the same for a seed: (B, h, w) as ``like``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(like.shape, generator=generator, dtype=torch.float64).to(like)


def gaussian_maps(like: Tensor, width: float = 0.25) -> Tensor:
    """A Gaussian in the middle, its standard deviations ``width`` of either side: (B, h, w) as ``like``."""
    y, x = (((torch.arange(n) + 0.5) / n - 0.5) / width for n in like.shape[1:])
    return torch.exp(-(y[:, None] ** 2 + x**2) / 2).to(like).expand_as(like)


BASELINES: dict[str, Callable[[Tensor], Tensor]] = {"random": random_maps, "gaussian": gaussian_maps}


@dataclass(frozen=True)
class DeletionCurve:
    """How a model's score falls as patches are deleted.

    Attributes:
        fractions: (steps + 1,), the share of patches that are deleted, 0 to 1.
        scores: (B, steps + 1), the probability of the target class.
        area: (B,). Of scores divided by the first, over fractions, by the trapezoidal rule: what lies under them for "lerf"
            (LeRF-AUC), 1 less that for "morf" (MoRF-AOC). High is good for either.
        target: (B,), the class.
        baselines: the same of maps that know nothing, by their names.
    """

    fractions: Tensor
    scores: Tensor
    area: Tensor
    target: Tensor
    baselines: dict[str, "DeletionCurve"] = field(default_factory=dict)


@torch.no_grad()
def deletion_curve(
    model: nn.Module,
    images: Tensor,
    maps: Tensor,
    order: str = "morf",
    steps: int = 20,
    fill: str = "blur",
    *,
    target: Tensor | None = None,
    baselines: bool = True,
) -> DeletionCurve:
    """Deletes patches in the order of a map and watches the model's probability of a class.

    Args:
        model: gives class scores (B, classes), or an output with ``logits``, for (B, C, height, width).
        images: (B, C, height, width), sides multiples of the maps'.
        maps: (B, h, w); of equal values the first in reading order goes first.
        order: "morf", most relevant first, or "lerf", least relevant first.
        steps: into how many parts the patches are cut; the model runs steps + 1 times.
        fill: what takes a patch's place: "blur", the picture under a Gaussian filter with a standard deviation of 1/20 of its
            longer side; "mean", the mean of its channels; "zero".
        target: (B,), the classes; default: those that the model finds in the whole pictures.
        baselines: whether to run the two baselines too, each steps + 1 times.

    Raises:
        ValueError: a wrong argument.
    """
    _one_of("order", order, ORDERS)
    _one_of("fill", fill, FILLS)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"deletion_curve: steps is {steps!r}, expected an int of at least 1")
    cells = _cells("deletion_curve", maps, images.shape)
    filled = {"blur": blurred, "mean": _mean, "zero": torch.zeros_like}[fill](images)

    def probabilities(pictures: Tensor) -> Tensor:
        out = model(pictures)
        out = getattr(out, "logits", out)
        if not isinstance(out, Tensor) or out.dim() != 2 or len(out) != len(images):
            got = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(f"deletion_curve: the model gives {got}, expected class scores (B, classes)")
        return out.float().softmax(-1)

    def curve(maps: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and area."""
        ranks = maps.flatten(1).argsort(descending=order == "morf", stable=True).argsort().view_as(maps)
        ranks = ranks.repeat_interleave(cells[0], 1).repeat_interleave(cells[1], 2)[:, None]
        pictures = (torch.where(ranks < count, filled, images) for count in counts[1:])
        scores = torch.stack([first, *(probabilities(p).gather(1, target[:, None])[:, 0] for p in pictures)], 1)
        under = torch.trapezoid(scores / first[:, None], fractions.to(scores), dim=1)
        return scores, 1 - under if order == "morf" else under

    total = maps[0].numel()
    counts = [round(total * step / steps) for step in range(steps + 1)]
    fractions = torch.tensor(counts, dtype=torch.float64) / total
    with evaluating(model):
        whole = probabilities(images)
        if target is None:
            target = whole.argmax(-1)
        elif target.shape != (len(images),) or target.is_floating_point():
            raise ValueError(
                f"deletion_curve: target is {list(target.shape)}, expected (B,) = [{len(images)}] class indices"
            )
        first = whole.gather(1, target[:, None])[:, 0]
        found = curve(maps)
        others = {name: curve(make(maps)) for name, make in BASELINES.items()} if baselines else {}
    by_name = {name: DeletionCurve(fractions, *other, target) for name, other in others.items()}
    return DeletionCurve(fractions, *found, target, by_name)


@dataclass(frozen=True)
class Localisation:
    """How well maps tell an object's pixels from others.

    Attributes:
        roc_auc: (B,), the probability that a pixel of the object has a higher value than another; 0.5 by chance.
        pr_auc: (B,), average precision; by chance the object's share of the picture.
        baselines: the same of maps that know nothing, by their names.
    """

    roc_auc: Tensor
    pr_auc: Tensor
    baselines: dict[str, "Localisation"] = field(default_factory=dict)


def localisation(
    maps: Tensor, boxes_or_masks: Tensor, size: tuple[int, int] | None = None, *, baselines: bool = True
) -> Localisation:
    """ROC-AUC and PR-AUC of maps as detectors of an object's pixels, by scikit-learn.

    Args:
        maps: (B, h, w), resized bilinearly to the picture.
        boxes_or_masks: masks (B, height, width) bool, True = object; or boxes (B, n, 4) or (B, 4), whose union is the object:
            left, top, right, bottom in pixels, the last two excluded.
        size: (height, width) of the picture, with boxes.
        baselines: whether to give those of the two baselines too.

    Raises:
        ValueError: shapes that do not fit, boxes outside the picture, a picture with no object or nothing else.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    masks = boxes_or_masks
    if masks.dtype != torch.bool:
        if size is None:
            raise ValueError("localisation: size is None, expected the picture's (height, width) with boxes")
        masks = boxes_to_masks(masks, size)
    _cells("localisation", maps, masks[:, None].shape if masks.dim() == 3 else masks.shape)
    share = masks.flatten(1).double().mean(1)
    if not ((share > 0) & (share < 1)).all():
        raise ValueError(
            "localisation: a mask is all object or has none, expected pixels of both kinds in every picture"
        )

    def measure(maps: Tensor) -> tuple[Tensor, Tensor]:
        found = upsampled(maps, masks.shape[1:]).flatten(1).double().cpu().numpy()
        truth = masks.flatten(1).cpu().numpy()
        return tuple(
            torch.tensor([float(score(t, f)) for t, f in zip(truth, found)], dtype=torch.float64)
            for score in (roc_auc_score, average_precision_score)
        )

    others = {name: Localisation(*measure(make(maps))) for name, make in BASELINES.items()} if baselines else {}
    return Localisation(*measure(maps), others)


def boxes_to_masks(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes (B, n, 4) or (B, 4), left, top, right, bottom in pixels, as the mask of their union: (B, height, width)."""
    if boxes.dim() not in (2, 3) or boxes.shape[-1] != 4:
        raise ValueError(f"localisation: boxes has shape {list(boxes.shape)}, expected (B, n, 4) or (B, 4)")
    boxes = boxes if boxes.dim() == 3 else boxes[:, None]
    height, width = size
    left, top, right, bottom = boxes.unbind(-1)
    inside = (left >= 0) & (left < right) & (right <= width) & (top >= 0) & (top < bottom) & (bottom <= height)
    if not inside.all():
        raise ValueError(
            f"localisation: a box is {boxes[~inside][0].tolist()}, expected 0 <= left < right <= {width} and "
            f"0 <= top < bottom <= {height}: left, top, right, bottom in pixels"
        )
    y, x = torch.arange(height, device=boxes.device) + 0.5, torch.arange(width, device=boxes.device) + 0.5
    rows = (top[..., None] < y) & (y < bottom[..., None])
    columns = (left[..., None] < x) & (x < right[..., None])
    return (rows[..., None] & columns[..., None, :]).any(1)


def upsampled(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (B, h, w) or (B, H, h, w) resized bilinearly to (height, width)."""
    found = F.interpolate(maps.flatten(0, -3)[:, None], tuple(size), mode="bilinear")
    return found.reshape(*maps.shape[:-2], *size)


def blurred(images: Tensor) -> Tensor:
    """Pictures under a Gaussian filter with a standard deviation of 1/20 of the longer side, their edges mirrored."""
    deviation = max(images.shape[2:]) / 20
    for dim in (2, 3):
        reach = min(math.ceil(3 * deviation), images.shape[dim] - 1)
        x = torch.arange(-reach, reach + 1, device=images.device, dtype=torch.float64)
        weights = torch.exp(-((x / deviation) ** 2) / 2)
        weights = (weights / weights.sum()).to(images.dtype)
        around, kernel = (
            ((reach, reach, 0, 0), weights[None, :]) if dim == 3 else ((0, 0, reach, reach), weights[:, None])
        )
        channels = F.pad(images, around, mode="reflect").flatten(0, 1)[:, None]
        images = F.conv2d(channels, kernel[None, None]).view_as(images)
    return images


def _mean(images: Tensor) -> Tensor:
    return images.mean((2, 3), keepdim=True).expand_as(images)


def _cells(op: str, maps: Tensor, pictures: torch.Size) -> tuple[int, int]:
    """Height and width in pixels of what one value of a map stands for."""
    if maps.dim() != 3:
        raise ValueError(f"{op}: maps has shape {list(maps.shape)}, expected (B, h, w); choose one head or their mean")
    if not maps.isfinite().all():
        raise ValueError(f"{op}: maps holds NaN or infinity, expected numbers that can be put in order")
    fits = len(pictures) == 4 and pictures[0] == len(maps) and min(maps.shape[1:]) > 0
    if not fits or pictures[2] % maps.shape[1] or pictures[3] % maps.shape[2]:
        raise ValueError(
            f"{op}: maps has shape {list(maps.shape)} and the pictures {list(pictures)}, expected as many, their sides multiples "
            "of the maps'; cut or resize the pictures to whole patches"
        )
    return pictures[2] // maps.shape[1], pictures[3] // maps.shape[2]


def _one_of(name: str, value, expected) -> None:
    if value not in expected:
        raise ValueError(f"deletion_curve: {name} is {value!r}, expected {' or '.join(map(repr, expected))}")

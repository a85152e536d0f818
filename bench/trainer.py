"""The loop by which the benchmarks train their small models, on one thread and pictures that are in memory."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Step:
    """What a step of training did: the loss of its batch, and the norm of the gradient before it was clipped."""

    epoch: int
    loss: float
    gradient_norm: float


def fit(
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    pictures: Tensor,
    classes: Tensor,
    *,
    epochs: int,
    batch: int,
    warm_up: float,
    clip: float = math.inf,
    mirrored: bool = True,
    contrast: float = 64.0,
) -> Iterator[Step]:
    """Trains ``model`` on uint8 ``pictures``, a step whenever the next one is asked for.

    Rates rise for the part ``warm_up`` of all steps, and fall to 0 by a cosine. The order, and which pictures are ``mirrored``,
    come from torch's generator: seed it before.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    steps = epochs * math.ceil(len(pictures) / batch)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(one, lambda step: _rate(step / steps, warm_up)) for one in optimizers
    ]
    for epoch in range(epochs):
        order, flipped = torch.randperm(len(pictures)), torch.rand(len(pictures)) < 0.5
        for chosen in order.split(batch):
            x = normalised(pictures[chosen], contrast)
            if mirrored:
                x = torch.where(flipped[chosen, None, None, None], x.flip(3), x)
            loss = F.cross_entropy(model(x), classes[chosen])
            model.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(parameters, clip)
            for part in (*optimizers, *schedules):
                part.step()
            yield Step(epoch, loss.item(), norm.item())


def normalised(pictures: Tensor, contrast: float = 64.0) -> Tensor:
    return pictures.float().sub(127.5).div(contrast)


def _rate(done: float, warm_up: float) -> float:
    return done / warm_up if done < warm_up else 0.5 + 0.5 * math.cos(math.pi * (done - warm_up) / (1 - warm_up))

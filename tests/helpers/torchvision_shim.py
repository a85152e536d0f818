"""Lets torchvision's Python models import where its compiled operators do not load: beside a CPU-only torch from another index.

timm and transformers import torchvision, and torchvision registers fakes of two of its operators while it is imported: for
that they need no more than a schema. No model here calls them.
"""

import importlib.util
from pathlib import Path

import torch

_library = torch.library.Library("torchvision", "FRAGMENT")


def install() -> None:
    """To be called before anything imports torchvision; does nothing where its operators load, or where it is not installed."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None:
        return
    try:
        for extension in Path(spec.origin).parent.glob("_C*.so"):
            torch.ops.load_library(extension)
    except OSError:
        for name in ("nms", "qnms"):
            _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

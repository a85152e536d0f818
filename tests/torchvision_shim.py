"""Imports torchvision's Python models where its compiled operators do not load: beside a CPU-only torch from another index.

timm and transformers import torchvision, and torchvision registers fakes for two of its operators while it is imported: it
is enough that these have a schema. No model here calls them. Import this module before timm, torchvision or transformers.
"""

import sys

import torch

_library = torch.library.Library("torchvision", "FRAGMENT")


def _import_torchvision() -> None:
    import torchvision  # noqa: F401


try:
    _import_torchvision()
except RuntimeError as error:
    if "does not exist" not in str(error):
        raise
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    _library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _import_torchvision()

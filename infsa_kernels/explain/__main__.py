"""`python -m infsa_kernels.explain PHOTO --model ... --out DIR`: a picture of what a model looks at.

The model is one of InfViT's factories, or MODULE:CALLABLE, called with the JSON of --arguments:

    --model infvit_pure_4l --weights checkpoint.pt
    --model timm:create_model --arguments '{"model_name": "vit_small_patch16_224", "pretrained": true}'
    --model torchvision.models:vit_b_16 --arguments '{"weights": "DEFAULT"}' --convert pure_infsa
    --model transformers:ViTModel.from_pretrained --arguments '{"pretrained_model_name_or_path": "google/vit-base-patch16-224"}'
"""

import argparse
import functools
import importlib
import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..nn import convert
from ..nn.vit import FACTORIES
from .layers import attention_graphs
from .maps import KINDS

# ImageNet's, of most pretrained models.
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def main(argv: list[str] | None = None) -> None:
    args = _arguments(argv)
    try:
        model = load(args)
        photograph = read(args.photo, args.size)
        written = explain(model, photograph, args)
    except (ImportError, OSError, RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        sys.exit(f"infsa_kernels.explain: {error}")
    print(written)


def load(args: argparse.Namespace) -> nn.Module:
    factories = {factory.__name__: factory for factory in FACTORIES}
    if args.model in factories:
        make = factories[args.model]
    elif ":" in args.model:
        module, _, names = args.model.partition(":")
        try:
            make = functools.reduce(getattr, names.split("."), importlib.import_module(module))
        except AttributeError as error:
            raise ValueError(f"--model is {args.model!r}: {error}") from None
    else:
        raise ValueError(f"--model is {args.model!r}, expected MODULE:CALLABLE or one of {', '.join(factories)}")
    model = make(**args.arguments)
    if not isinstance(model, nn.Module):
        raise TypeError(f"--model {args.model} gives a {type(model).__name__}, expected an nn.Module")
    if args.convert:
        model = convert(model, args.convert, strict=True).model
    if args.weights:
        model.load_state_dict(_state(args.weights))
    return model.to(args.device).eval()


def read(photo: Path, size: tuple[int, int] | None) -> np.ndarray:
    """A photograph (height, width, 3) in [0, 1]; resized, and cut in the middle to the sides' proportion."""
    from PIL import Image, ImageOps

    with Image.open(photo) as image:
        image = ImageOps.exif_transpose(image).convert("RGB")
        if size is not None:
            image = ImageOps.fit(image, size[::-1], Image.Resampling.BICUBIC)
        return np.asarray(image, np.float32) / 255


def explain(model: nn.Module, photograph: np.ndarray, args: argparse.Namespace) -> Path:
    import matplotlib as mpl

    mpl.use("agg")
    from .picture import draw

    image = torch.from_numpy(photograph).permute(2, 0, 1)[None].to(args.device)
    mean, deviation = (torch.tensor(t, device=image.device)[:, None, None] for t in (args.mean, args.deviation))
    image = (image - mean) / deviation
    layers = len(attention_graphs(model, image))
    kinds = args.kinds or KINDS
    title = f"{args.model}, layer {args.layer % layers + 1} of {layers}" + ("" if args.trained else ", random weights")
    figure = draw(model, image, photograph, list(kinds), args.layer, args.heads, title)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{args.photo.stem}.png"
    figure.savefig(path, dpi=130)
    return path


def _state(path: Path) -> dict:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m infsa_kernels.explain",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("photo", type=Path, metavar="PHOTO")
    add("--model", required=True, help="a factory of InfViT, or MODULE:CALLABLE")
    add("--arguments", type=_json_object, default={}, metavar="JSON", help="keyword arguments of the callable")
    add("--convert", metavar="VARIANT", help="turn the model's attention into InfSA, with its weights: pure_infsa, ...")
    add("--weights", type=Path, metavar="FILE", help="a state dict, .safetensors or torch.save's")
    add("--kinds", nargs="+", choices=KINDS, help="kinds of maps, all by default")
    add("--layer", type=int, default=-1, help="an attention layer, the last by default")
    add("--heads", type=int, default=6, help="how many single heads to show, 6 by default")
    add(
        "--size",
        type=_size,
        default=(224, 224),
        metavar="SIDE|HxW|full",
        help="what the photo is resized to, 224 by default",
    )
    add(
        "--mean",
        type=float,
        nargs=3,
        default=MEAN,
        help="of the colours in [0, 1] that the model expects, ImageNet's by default",
    )
    add("--deviation", type=float, nargs=3, default=DEVIATION)
    add("--device", default="cpu")
    add("--out", type=Path, required=True, metavar="DIR")
    args = parser.parse_args(argv)
    args.trained = bool(args.weights) or ":" in args.model
    return args


def _json_object(text: str) -> dict:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object, as {{}} is")
    return found


def _size(text: str) -> tuple[int, int] | None:
    if text == "full":
        return None
    sides = text.split("x")
    if len(sides) > 2 or not all(side.isdigit() and int(side) for side in sides):
        raise argparse.ArgumentTypeError(f"{text!r} is none of 224, 480x640 (height x width) and full")
    return int(sides[0]), int(sides[-1])


if __name__ == "__main__":
    main()

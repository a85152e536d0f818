"""`python -m infsa_kernels.explain`: the picture it writes, and what it says of what it is given."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from infsa_kernels.explain.__main__ import main
from infsa_kernels.nn import InfViT

SIZES = '{"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5%s}'


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)).save(path)
    return path


def arguments(photo, *more, sizes=SIZES % "", model="infsa_kernels.nn:InfViT"):
    return [
        str(photo),
        "--model",
        model,
        "--arguments",
        sizes,
        "--out",
        str(photo.parent / "out"),
        "--size",
        "32",
        *more,
    ]


@pytest.mark.sweep
def test_a_picture_of_every_kind(photo, capsys):
    main(arguments(photo, "--heads", "1", sizes=SIZES % ', "variant": "pure_infsa"'))
    written = photo.parent / "out" / "photo.png"
    assert capsys.readouterr().out.strip() == str(written)
    pixels = np.asarray(Image.open(written).convert("RGB"))
    assert min(pixels.shape[:2]) > 400
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 1000


def test_weights_conversion_kinds_and_sizes(photo):
    torch.save(InfViT(32, 8, 3, 5, 32, 2, 2).state_dict(), photo.parent / "weights.pt")
    main(arguments(photo, "--weights", str(photo.parent / "weights.pt"), "--kinds", "in", "katz", "--layer", "0"))
    main(arguments(photo, "--kinds", "rollout", "--size", "24x40", "--heads", "1"))
    main(arguments(photo, "--size", "full", "--kinds", "in"))
    host = "torch.nn:Sequential"
    with pytest.raises(SystemExit, match="model made no call of InfSA"):
        main(arguments(photo, sizes="{}", model=host))
    vit = '{"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 16}'
    main(arguments(photo, "--convert", "pure_infsa", sizes=vit, model="torchvision.models:VisionTransformer"))


BAD = [
    (dict(model="resnet"), "--model is 'resnet', expected MODULE:CALLABLE or one of infvit_linear_4l"),
    (dict(model="torch.nn:Nothing"), "--model is 'torch.nn:Nothing': .* 'Nothing'"),
    (dict(model="nowhere:model"), "No module named 'nowhere'"),
    (dict(model="builtins:dict", sizes="{}"), "gives a dict, expected an nn.Module"),
    (dict(sizes='{"depth": -1}'), "depth is -1, expected at least 0"),
]


@pytest.mark.parametrize("change, message", BAD, ids=[message[:30] for _, message in BAD])
def test_what_is_wrong_is_one_line(photo, change, message):
    with pytest.raises(SystemExit, match=message):
        main(arguments(photo, **change))


def test_missing_photo_and_arguments_that_are_no_json(photo, capsys):
    with pytest.raises(SystemExit, match="No such file"):
        main(arguments(photo.parent / "none.jpg"))
    for sizes, message in (("{", "is no JSON: "), ("[]", "is no JSON object")):
        with pytest.raises(SystemExit):
            main(arguments(photo, sizes=sizes))
        assert message in capsys.readouterr().err


def test_help_runs_as_a_module():
    shown = subprocess.run([sys.executable, "-m", "infsa_kernels.explain", "--help"], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert "timm:create_model" in shown.stdout and "--kinds" in shown.stdout

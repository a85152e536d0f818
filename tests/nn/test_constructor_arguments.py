"""What constructors say about numbers of a wrong type or size: the argument, what it is, what is expected."""

import numpy
import pytest
import torch

from infsa_kernels.nn import InfSAAttention, InfViT, NeumannSum, convert

INTEGERS = {
    InfSAAttention: ("embed_dim", "num_heads", "kdim", "vdim"),
    NeumannSum: ("num_layers", "num_heads"),
    InfViT: ("img_size", "patch_size", "in_chans", "num_classes", "embed_dim", "depth", "num_heads"),
}
NUMBERS = {
    InfSAAttention: ("dropout", "rho_init", "eps", "score_floor"),
    NeumannSum: ("gamma_init",),
    InfViT: ("mlp_ratio", "rho_init", "score_floor"),
}
VALID = {InfSAAttention: dict(embed_dim=8, num_heads=2), NeumannSum: dict(num_layers=2),
         InfViT: dict(img_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=2)}  # fmt: skip


@pytest.mark.parametrize("kind, name", [(kind, name) for kind, names in INTEGERS.items() for name in names])
def test_integers(kind, name):
    for wrong in ("4", 4.0, True, torch.tensor(4.0).numpy()):
        with pytest.raises(
            TypeError, match=f"{kind.__name__}: {name} is .*, a {type(wrong).__name__}, expected an int"
        ):
            kind(**{**VALID[kind], name: wrong})
    with pytest.raises(ValueError, match=f"{kind.__name__}: {name} is -4, expected at least"):
        kind(**{**VALID[kind], name: -4})
    kind(**{n: numpy.int64(value) for n, value in VALID[kind].items()})


@pytest.mark.parametrize("kind, name", [(kind, name) for kind, names in NUMBERS.items() for name in names])
def test_numbers(kind, name):
    for wrong in ("0.5", None, [0.5], True):
        with pytest.raises(TypeError, match=f"{name} is .*, a {type(wrong).__name__}, expected a number"):
            kind(**{**VALID[kind], name: wrong})
    kind(**{**VALID[kind], name: torch.tensor(0.5)}), kind(**{**VALID[kind], name: numpy.float32(0.5)})


def test_sides_of_a_picture_and_convert():
    with pytest.raises(TypeError, match="InfViT: img_size is '8', a str"):
        InfViT(**VALID[InfViT] | dict(img_size=(8, "8")))
    with pytest.raises(TypeError, match=r"convert: rho_init is '0\.5', a str, expected a number"):
        convert(torch.nn.MultiheadAttention(8, 2), rho_init="0.5")

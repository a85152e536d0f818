"""InfViT by timm's names."""

import pytest
import timm
import torch

from infsa_kernels.nn import InfViT
from infsa_kernels.nn.timm import register

SMALL = dict(embed_dim=32, img_size=32, num_classes=7, in_chans=1)


def test_models_have_names_of_their_own():
    before = set(timm.list_models())
    names = register()
    assert before.isdisjoint(names) or before.issuperset(names)
    assert register() == names
    assert set(timm.list_models()) == before | set(names)
    assert set(timm.list_models("infvit_*")) == set(names)
    with pytest.raises(NotImplementedError, match="no weights have been published"):
        timm.create_model(names[0], pretrained=True)


def test_timm_creates_them(tmp_path):
    for name in register():
        model = timm.create_model(name, **SMALL)
        assert isinstance(model, InfViT) and len(model.blocks) == int(name.split("_")[2][:-1])
        torch.nn.init.normal_(model.head.weight)
        path = tmp_path / f"{name}.pt"
        torch.save(model.state_dict(), path)
        again = timm.create_model(name, **SMALL, checkpoint_path=str(path))
        x = torch.randn(2, 1, 32, 48)
        assert torch.equal(again(x), model(x))

"""`make bench-explain` from end to end at a tiny size, and the scenes that it draws."""

import json

import pytest
import torch
from PIL import Image

from bench import explain, scenes

TINY = dict(TRAIN=128, TEST=12, MAPPED=6, EPOCHS=1, SEEDS=(0, 1), STEPS=3, LARGE=2, LARGE_SIDE=190)


@pytest.fixture(scope="module")
def digits():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes, "FASHION", scenes.FASHION / "not installed")
        found = scenes.items(), scenes.textures()
    return found


def test_boxes_and_masks_are_those_of_the_objects(digits):
    """On a black background and without fragments, what is not background is the object."""
    (things, _), _ = digits
    black = [torch.full((50, 200), -0.75)]  # 0.3 + 0.4 * -0.75 = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes, "FRAGMENTS", 0)
        drawn = scenes.draw(things, black, 20, torch.Generator().manual_seed(0))
    assert drawn.pictures.shape == (20, 1, 96, 96)
    for picture, mask, (left, top, right, bottom) in zip(drawn.pictures[:, 0], drawn.masks, drawn.boxes.tolist()):
        assert (picture[~mask] == -2).all() and (picture[mask] > -2).float().mean() > 0.5
        rows, columns = mask.nonzero().T
        assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == (left, top, right, bottom)
        assert 15 < max(right - left, bottom - top) <= 72


def test_scenes_repeat_and_differ(digits):
    (things, other), photographs = digits
    first, again, another = (scenes.draw(things, photographs, 8, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert (first.pictures == again.pictures).all() and (first.boxes == again.boxes).all()
    assert (first.boxes != another.boxes).any()
    assert len(things.classes) + len(other.classes) == 1797
    assert "digits" in things.source and "dataset-fashion-mnist is not installed" in things.source


@pytest.mark.sweep
@pytest.mark.skipif(not scenes.FASHION.exists(), reason="Debian's package dataset-fashion-mnist is not installed")
def test_photographs_of_clothes():
    train, test = scenes.items()
    assert len(train.classes) == 60000 and len(test.classes) == 10000
    assert [train.names[c] for c in train.classes[:4]] == ["shoe", "top", "top", "dress"]
    assert train.classes.bincount().tolist() == [24000, 6000, 6000, 18000, 6000]
    assert (train.masks >= (train.pictures > 0.1)).all()


@pytest.mark.sweep
def test_everything_at_a_tiny_size(tmp_path, monkeypatch, capsys, digits):
    for name, value in TINY.items():
        monkeypatch.setattr(explain, name, value)
    monkeypatch.setattr(explain, "SIZES", explain.SIZES | {"embed_dim": 16, "depth": 2, "num_heads": 2})
    monkeypatch.setattr(scenes, "FASHION", scenes.FASHION / "not installed")
    monkeypatch.setattr("sys.argv", ["bench.explain", "--out", str(tmp_path)])
    explain.main()
    assert "epoch 1 of 1" in capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert {name: list(by_seed) for name, by_seed in results.items()} == {name: ["0", "1"] for name in explain.VARIANTS}
    for found in (found for by_seed in results.values() for found in by_seed.values()):
        for figures in found["maps"].values():
            assert all(0 <= figures[column] <= 1 for column in ("roc", "pr"))
        assert found["maps"]["gaussian"]["roc"] > 0.5
    text = (tmp_path / "table.txt").read_text()
    for words in ("digits", "linear_infsa", "random map", "gaussian map", "the paper", "76.1", "equal weights"):
        assert words in text
    assert Image.open(tmp_path / "maps.png").size[0] > 500
    # What was trained and measured is not done again.
    monkeypatch.setattr(torch.optim, "Muon", None)
    explain.main()
    assert (tmp_path / "table.txt").read_text() == text
    # ... unless the recipe is another one.
    monkeypatch.setattr(explain, "EPOCHS", 2)
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        explain.main()

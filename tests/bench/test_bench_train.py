"""`make bench-train` from end to end at a tiny size."""

import json

import pytest
import torch
from PIL import Image

from bench import train
from bench.trainer import fit
from examples import pictures
from infsa_kernels.nn import InfViT

TINY = ["--data", "digits", "--seeds", "0", "1", "--jobs", "1"]


@pytest.fixture
def tiny(monkeypatch):
    few = pictures.digits()
    few = pictures.Pictures(few.source, *((x[:128], y[:128]) for x, y in (few.train, few.test)), few.names, 2, False)
    monkeypatch.setitem(pictures.SMALL, "digits", lambda: few)
    monkeypatch.setitem(train.EPOCHS, "digits", 2)
    monkeypatch.setattr(train, "SIZES", train.SIZES | {"embed_dim": 16, "depth": 2})


def run(out, monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["bench.train", "--out", str(out), *TINY, *arguments])
    train.main()
    return [json.loads(line) for line in (out / "runs.jsonl").read_text().splitlines()]


def test_everything_at_a_tiny_size(tiny, tmp_path, monkeypatch):
    found = run(tmp_path, monkeypatch)
    assert len(found) == 2 * len(train.MODELS)
    # All kinds of attention before a second seed, then the sums of layers, then other activations.
    assert [(one["seed"], one["model"]) for one in found[: len(train.ATTENTION) + 1]] == [
        *((0, name) for name in train.ATTENTION), (1, "softmax"),
    ]  # fmt: skip
    rest = [one["model"] for one in found[2 * len(train.ATTENTION) :]]
    assert rest == [*train.NEUMANN] * 2 + [*train.ACTIVATIONS] * 2
    for one in found:
        assert 0 < one["accuracy"] < 1 and one["loss"] < 2.5 and max(one["norms"]) >= one["median_norm"] > 0
        assert ("dead_pairs/blocks.0.attn" in one["layers"]) == (
            one["model"] not in ("softmax", "mean pooling", *train.ACTIVATIONS)
        )
    fixed = next(one for one in found if one["model"] == "Linear, γ = 0.3")
    assert fixed["gamma"] == pytest.approx([0.3, 0.3])
    text = (tmp_path / "table.txt").read_text()
    for words in ("digits", "seeds: 0, 1", "Linear untied, floor", "Linear, γ learned", "Pure, softplus", "+-"):
        assert words in text
    assert Image.open(tmp_path / "training.png").size[0] > 1000


def test_goes_on_after_a_kill(tiny, tmp_path, monkeypatch):
    some = ["--models", "softmax", "Linear"]
    expected = run(tmp_path, monkeypatch, *some)
    kept = tmp_path / "runs.jsonl"
    lines = kept.read_text().splitlines(keepends=True)
    kept.write_text(lines[0] + lines[1] + lines[2] + lines[3][:50])
    trained, again = train.trained, []
    monkeypatch.setattr(train, "trained", lambda one: again.append(one["model"]) or trained(one))
    found = run(tmp_path, monkeypatch, *some)
    assert again == ["Linear"]
    for one, other in zip(found, expected):
        for changes in ("seconds", "environment"):
            one.pop(changes), other.pop(changes)
    assert found == expected


def test_another_recipe_is_another_run(tiny, tmp_path, monkeypatch):
    run(tmp_path, monkeypatch, "--models", "softmax")
    monkeypatch.setattr(train, "RECIPE", train.RECIPE | {"rate": 5e-4})
    assert len(run(tmp_path, monkeypatch, "--models", "softmax")) == 4


def test_the_loop_clips_and_says_what_the_norm_was():
    pictures_, classes = torch.randint(256, (40, 1, 8, 8), dtype=torch.uint8), torch.randint(3, (40,))
    model = InfViT(8, 4, 1, 3, 16, 1, 2)
    start = model.head.bias.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    steps = fit(model, [optimizer], pictures_, classes, epochs=2, batch=16, warm_up=0.5, clip=1e-3)
    first = next(steps)
    assert first.gradient_norm > 1e-2 and first.epoch == 0
    assert model.head.bias.equal(start), "the rate starts at 0"
    rest = list(steps)
    assert [step.epoch for step in rest] == [0, 0, 1, 1, 1]
    assert 0 < (model.head.bias - start).norm() < 5e-3

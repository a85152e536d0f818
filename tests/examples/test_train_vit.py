"""examples/train_vit.py in small: what it writes, that it goes on where it was killed, and how it fails."""

import csv
import os
import pickle
import resource
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import runs
import torch
import train_vit
from PIL import Image
from torch.testing import assert_close

TINY = [
    "--dim",
    "32",
    "--heads",
    "4",
    "--depth",
    "2",
    "--batch",
    "192",
    "--epochs",
    "2",
    "--warm-up",
    "1",
    "--patch",
    "4",
]
DIGITS = ["--data", "digits", *TINY]
ALL_PARTS = ["--ema", "0.9", "--mixup", "0.2", "--accumulate", "2", "--rand-augment"]


def train(run, *arguments):
    """The log without what depends on time, and the last checkpoint."""
    train_vit.main(["--out", str(run), "--device", "cpu", *arguments])
    return results(run)


def results(run):
    with open(run / "log.csv") as file:
        rows = list(csv.DictReader(file))
    assert all(float(row.pop("images_per_second")) > 0 for row in rows)
    return rows, *runs.load(runs.latest(run))


def assert_same(found, expected):
    (rows, weights, state), (expected_rows, expected_weights, expected_state) = found, expected
    assert rows == expected_rows
    assert_close(weights, expected_weights, rtol=0, atol=0)
    assert_close(state["optimizer"]["state"], expected_state["optimizer"]["state"], rtol=0, atol=0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupts."""
    run = tmp_path_factory.mktemp("whole") / "made" / "by it"
    return run, train(run, *DIGITS, *ALL_PARTS)


def test_writes_log_curves_and_checkpoint(whole):
    run, (rows, weights, state) = whole
    assert [(row["epoch"], row["step"]) for row in rows] == [("1", "7"), ("2", "14")]
    assert float(rows[1]["loss"]) < float(rows[0]["loss"]) < 2.4
    for row in rows:
        assert 0 < float(row["top1"]) <= float(row["top5"]) <= 100 and float(row["gradient_norm"]) > 0
        assert row["skipped"] == row["test_skipped"] == "0" and 0 <= float(row["dead_pairs"]) <= 100
    assert Image.open(run / "curves.png").size[0] > 500
    assert [path.name for path in run.glob("step-*")] == ["step-00000014"]
    assert set(weights) == {"model", "ema"} and state["step"] == 14
    assert not weights["model"]["head.weight"].equal(weights["ema"]["head.weight"])


def test_goes_on_to_the_same_numbers_after_a_kill_in_the_middle_of_an_epoch(whole, tmp_path, monkeypatch):
    update = train_vit.Run._update

    def killed(self, batches):
        if self.step == 10:
            raise KeyboardInterrupt
        update(self, batches)

    monkeypatch.setattr(train_vit.Run, "_update", killed)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, *DIGITS, *ALL_PARTS, "--minutes", "0")
    monkeypatch.undo()
    assert runs.latest(tmp_path).name == "step-00000010"
    assert_same(train(tmp_path, *DIGITS, *ALL_PARTS), whole[1])
    # What is finished stays so.
    assert_same(train(tmp_path, *DIGITS, *ALL_PARTS), whole[1])


def test_a_kill_while_a_checkpoint_is_written_leaves_the_last_one(tmp_path, monkeypatch):
    state = {"step": 1, "rows": [{"loss": 1.0}]}
    runs.save(tmp_path, 1, {"model": {"weight": torch.ones(3)}}, state)

    def killed(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        runs.save(tmp_path, 2, {"model": {"weight": torch.zeros(3)}}, state)
    monkeypatch.undo()
    assert runs.latest(tmp_path).name == "step-00000001"
    weights, found = runs.load(runs.latest(tmp_path))
    assert weights["model"]["weight"].tolist() == [1, 1, 1] and found == state
    runs.save(tmp_path, 2, {"model": {"weight": torch.zeros(3)}}, state)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_a_full_disk_is_one_error_and_the_last_checkpoint_stays(tmp_path):
    runs.save(tmp_path, 1, {"model": {"weight": torch.ones(3)}}, {"step": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(
            SystemExit, match=r"checkpoint of 4\.0 MB could not be written: .+ goes on from step-00000001"
        ):
            runs.save(tmp_path, 2, {"model": {"weight": torch.ones(1 << 20)}}, {"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_a_checkpoint_of_something_else_than_tensors_is_refused(tmp_path):
    runs.save(tmp_path, 1, {}, {"path": Path("anything")})
    with pytest.raises(pickle.UnpicklingError, match="weights_only"):
        runs.load(runs.latest(tmp_path))


def test_float16_goes_through_the_scaler(tmp_path):
    rows, _, state = train(tmp_path, *DIGITS, "--amp", "float16", "--variant", "linear_infsa")
    assert state["scaler"]["scale"] > 0 and state["scaler"]["_growth_tracker"] > 0, "steps were made"
    assert float(rows[1]["loss"]) < float(rows[0]["loss"])
    assert 0 < float(rows[1]["gradient_norm"]) < 1000, "unscaled"


@pytest.mark.sweep
def test_bfloat16_without_clipping(tmp_path):
    rows, _, state = train(tmp_path, *DIGITS, "--amp", "bfloat16", "--clip", "0", "--untied", "--pool", "mean")
    assert state["scaler"] == {}
    assert float(rows[1]["loss"]) < float(rows[0]["loss"])


def test_a_folder_with_broken_pictures(folder, tmp_path):
    sizes = ["--size", "32", "--patch", "8", "--dim", "32", "--heads", "2", "--depth", "1"]
    small = [*sizes, "--batch", "8", "--epochs", "1", "--warm-up", "0", "--workers", "1"]
    rows, _, _ = train(tmp_path, "--data", str(folder), *small, "--variant", "softmax", "--classes", "2")
    assert rows[0]["skipped"] == rows[0]["test_skipped"] == "2"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--data", "nowhere"], "there is no folder nowhere/train; expected FOLDER/train/CLASS/"),
        ([*DIGITS, "--classes", "7"], "--classes is 7, but digits has 10 classes"),
        ([*DIGITS, "--batch", "5000"], "--batch is 5000, expected at most the 1347 training pictures"),
        ([*DIGITS, "--accumulate", "7"], "--batch is 192, expected a multiple of 7"),
        ([*DIGITS, "--fsdp"], "--fsdp needs torchrun"),
        (
            [*DIGITS, *ALL_PARTS, "--seed", "1"],
            "seed is 1, but .*step-00000014 was trained with 0; give that, or another --out",
        ),
    ],
    ids=["missing folder", "class count", "large batch", "accumulate", "fsdp alone", "another recipe"],
)
def test_what_is_wrong_is_one_error(arguments, says, whole):
    with pytest.raises(SystemExit, match=says):
        train_vit.main(["--out", str(whole[0]), "--device", "cpu", *arguments])


def test_folders_of_other_classes_are_one_error(folder, tmp_path):
    for name in ("train", "val"):
        (tmp_path / name).symlink_to(folder / name)
    (tmp_path / "val").unlink()
    (tmp_path / "val" / "dark").mkdir(parents=True)
    (tmp_path / "val" / "dark" / "0.png").symlink_to(folder / "val" / "dark" / "1.png")
    with pytest.raises(
        SystemExit, match="train has 2 classes and val has 1, expected the same folders; only one has light"
    ):
        train_vit.main(["--out", str(tmp_path / "run"), "--device", "cpu", "--data", str(tmp_path)])


# In processes of their own, which need what tests/conftest.py does for torchvision.
SCRIPT = f"""
import runpy, sys
sys.path[:0] = {[str(Path(__file__).parents[1]), str(Path(train_vit.__file__).parent)]}
from helpers import torchvision_shim
torchvision_shim.install()
import torch
torch.set_num_threads(1)
runpy.run_path({train_vit.__file__!r}, run_name="__main__")
"""


@pytest.mark.sweep
def test_killed_again_and_again(tmp_path):
    command = [sys.executable, "-c", SCRIPT, *DIGITS, *ALL_PARTS, "--device", "cpu", "--minutes", "0", "--epochs", "4"]
    subprocess.run([*command, "--out", str(tmp_path / "whole")], check=True)
    run, kills = tmp_path / "killed", 0
    while True:
        process = subprocess.Popen([*command, "--out", str(run)], stderr=subprocess.DEVNULL)
        begin = sorted(run.glob("step-*"))
        # As soon as it has come further: at another moment of its step every time.
        while process.poll() is None and sorted(run.glob("step-*")) == begin:
            time.sleep(0.02)
        time.sleep(0.03 * kills)
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    assert process.returncode == 0 and kills >= 3
    assert_same(results(run), results(tmp_path / "whole"))


@pytest.mark.sweep
@pytest.mark.parametrize("more", [[], ["--fsdp"], ["--accumulate", "2"]], ids=["ddp", "fsdp2", "ddp, accumulated"])
def test_two_processes_learn_as_one(more, tmp_path, monkeypatch):
    """And a run of two goes on with one."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    arguments = [*DIGITS, "--ema", "0.9", "--device", "cpu", "--jitter", "0"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    two = [*torchrun, sys.executable, "-c", SCRIPT, *arguments, *more]
    subprocess.run([*two, "--out", str(tmp_path / "two")], check=True)
    expected = train(tmp_path / "one", *arguments, *[a for a in more if a != "--fsdp"])
    rows, weights, _ = results(tmp_path / "two")
    assert_close(weights, expected[1], rtol=1e-3, atol=1e-4)
    assert float(rows[-1]["test_loss"]) == pytest.approx(float(expected[0][-1]["test_loss"]), rel=1e-3)


@pytest.mark.sweep
def test_compiled(tmp_path):
    found = train(tmp_path / "compiled", *DIGITS, "--compile")
    expected = train(tmp_path / "eager", *DIGITS)
    assert_close(found[1], expected[1], rtol=1e-2, atol=1e-3)


def test_the_help_says_what_there_is(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_vit.py", "--help"])
    with pytest.raises(SystemExit):
        runpy.run_path(train_vit.__file__, run_name="__main__")
    shown = capsys.readouterr().out
    for option in ("--data", "--amp", "--accumulate", "--ema", "--compile", "--fsdp", "--mixup"):
        assert option in shown

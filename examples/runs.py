"""What a run of training leaves on disk: checkpoints that survive a kill at any moment, a log and its curves.

A checkpoint is a folder, RUN/step-00001234: weights as .safetensors, the rest in state.pt, which is read with weights_only=True.
It is written under another name and renamed when it is whole.
"""

import csv
import io
import os
import shutil
import zlib
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor


def seed_of(*numbers: int) -> int:
    """A seed for what these numbers say. Where nothing depends on what was drawn before, a run can go on from any step."""
    return zlib.crc32(repr(numbers).encode())


def save(run: Path, step: int, weights: dict[str, dict[str, Tensor]], state: dict) -> None:
    """Writes the checkpoint of a step, and then removes older ones.

    Args:
        weights: state dicts by the name of their file, as "model". state: whatever torch.load(weights_only=True) takes.
    """
    unfinished, whole = run / "unfinished", run / f"step-{step:08d}"
    buffer = io.BytesIO()
    torch.save(state, buffer)
    files = {"state.pt": buffer.getvalue()}
    for name, tensors in weights.items():
        files[f"{name}.safetensors"] = safetensors.torch.save({n: t.contiguous() for n, t in tensors.items()})
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        for name, data in files.items():
            with open(unfinished / name, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        shutil.rmtree(whole, ignore_errors=True)
        unfinished.rename(whole)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        size = sum(map(len, files.values())) / 2**20
        kept = latest(run)
        raise SystemExit(
            f"{run}: a checkpoint of {size:.1f} MB could not be written: {error.strerror}; make room and start the same command "
            f"again, which goes on from {kept.name if kept else 'the beginning'}"
        ) from None
    for older in sorted(run.glob("step-*"))[:-1]:
        shutil.rmtree(older, ignore_errors=True)


def latest(run: Path) -> Path | None:
    """The newest whole checkpoint."""
    return max(run.glob("step-*"), default=None)


def load(checkpoint: Path) -> tuple[dict[str, dict[str, Tensor]], dict]:
    """The weights and the state that :func:`save` was given."""
    weights = {file.stem: safetensors.torch.load_file(file) for file in checkpoint.glob("*.safetensors")}
    return weights, torch.load(checkpoint / "state.pt", map_location="cpu", weights_only=True)


def write_log(run: Path, rows: list[dict]) -> None:
    """RUN/log.csv, a line per row, and RUN/curves.png."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        with open(run / "log.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        draw(rows, run / "curves.png")
    except OSError as error:
        raise SystemExit(f"{run}: the log could not be written: {error.strerror}") from None


def draw(rows: list[dict], file: Path) -> None:
    """The numbers of a log over its epochs, a panel per unit."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    panels = {
        "loss": ("loss", "test_loss"),
        "accuracy, %": ("top1", "top5", "ema_top1"),
        "gradient norm, the largest of the epoch": ("gradient_norm",),
        "image-head pairs without a positive score, %": ("dead_pairs",),
    }
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4), layout="constrained")
    for ax, (title, columns) in zip(axes, panels.items()):
        for column in columns:
            if column in rows[0]:
                ax.plot([row["epoch"] for row in rows], [row[column] for row in rows], marker=".", label=column)
        ax.set(title=title, xlabel="epoch", yscale="log" if "norm" in title else "linear")
        ax.grid(alpha=0.3)
        ax.legend()
    figure.savefig(file, dpi=100)
    plt.close(figure)

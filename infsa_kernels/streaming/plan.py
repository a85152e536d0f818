"""What a picture will cost before it is begun: operations, bytes, disk; and time, from rates that are measured or given."""

import math
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from ..nn.vit import Block, InfViT

# For the progress bar: how many operations of a matrix product take as long as a byte of the tokens.
OPERATIONS_PER_BYTE = 8
# Slots of the store beyond the chunks, as a share of these: the disk that is spent on writing states less often.
SPARE = 1 / 16
PROBE_BYTES = 1 << 29


@dataclass(frozen=True)
class Work:
    """A pass over the tokens; all numbers are of one token."""

    name: str
    operations: int
    picture_bytes: int
    read: int
    written: int

    @property
    def cost(self) -> float:
        return self.operations + OPERATIONS_PER_BYTE * (self.picture_bytes + self.read + self.written)


def schedule(model: InfViT, map_layer: int | None = None, pixel_bytes: int = 1) -> list[Work]:
    """The passes of a model over a picture, in their order. ``pixel_bytes``: of one channel."""
    D, depth = model.embed_dim, len(model.blocks)
    token = D * model.patch_embed.weight.dtype.itemsize
    pixels = model.patch_embed.in_channels * model.patch_size**2
    queries = 2 * D * D
    found = [Work("patches", 2 * pixels * D + queries * (depth > 0), pixels * pixel_bytes, 0, token * (depth > 0))]
    for number, block in enumerate(model.blocks):
        last, name = number == depth - 1, f"layer {number + 1} of {depth}"
        scores = 4 * D * model.num_heads
        found.append(Work(f"{name}: scores", scores, 0, token, 0))
        if number == map_layer:
            found.append(Work(f"{name}: map", scores // 2, 0, token, 0))
        if not (last and model.pool == "cls"):
            mlp = 4 * D * block.mlp.fc1.out_features
            found.append(Work(f"{name}: update", mlp + queries * (not last), 0, token, token * (not last)))
    return found


@dataclass(frozen=True)
class Plan:
    """A picture's whole way through a model.

    Attributes:
        tokens: N. work: its passes. store: bytes of disk or memory between the layers.
    """

    tokens: int
    work: list[Work]
    store: int

    @property
    def operations(self) -> int:
        return self.tokens * sum(w.operations for w in self.work)

    @property
    def bytes_read(self) -> int:
        return self.tokens * sum(w.picture_bytes + w.read for w in self.work)

    @property
    def bytes_written(self) -> int:
        return self.tokens * sum(w.written for w in self.work)

    def seconds(self, operations: float, read: float, write: float, picture: float | None = None) -> list[float]:
        """Of every pass, at these rates a second: moving and computing overlap, reading and writing do not."""
        picture = picture or read
        return [
            self.tokens * max(w.operations / operations, w.picture_bytes / picture + w.read / read + w.written / write)
            for w in self.work
        ]


def plan(model: InfViT, height: int, width: int, map_layer: int | None = None, pixel_bytes: int = 1) -> Plan:
    """The plan of a picture. The model may be on the meta device, where it takes no memory.

    Args:
        height, width: of the picture, in pixels.
        map_layer: the layer whose attention map is asked for, or None.
        pixel_bytes: bytes of one channel of a pixel: 1, 2 or 4.
    """
    p = model.patch_size
    tokens = math.ceil(height / p) * math.ceil(width / p)
    token = model.embed_dim * model.patch_embed.weight.dtype.itemsize
    return Plan(tokens, schedule(model, map_layer, pixel_bytes), int(tokens * token * (1 + SPARE)))


def measured_disk(folder: str | os.PathLike, size: int = PROBE_BYTES) -> tuple[float, float]:
    """Bytes a second that the disk of a folder reads and writes in order, past the system's cache where it lets go of it."""
    data = os.urandom(1 << 24)
    with tempfile.NamedTemporaryFile(dir=folder, buffering=0) as file:
        begin = time.perf_counter()
        for _ in range(size // len(data)):
            file.write(data)
        os.fsync(file.fileno())
        write = size / (time.perf_counter() - begin)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        begin, buffer = time.perf_counter(), bytearray(len(data))
        while file.readinto(buffer):
            pass
        return size / (time.perf_counter() - begin), write


@torch.no_grad()
def measured_operations(model: InfViT, tokens: int, device: torch.device) -> float:
    """Operations a second of an update of one layer like the model's, on some tokens."""
    from .layers import Attention

    D, hidden = model.embed_dim, model.blocks[0].mlp.fc1.out_features
    dtype = model.patch_embed.weight.dtype
    block = Block(D, model.num_heads, hidden / D, model.variant, device=device, dtype=dtype)
    layer, x = Attention(block), torch.randn(tokens, D, device=device, dtype=dtype)
    best = math.inf
    for _ in range(3):
        begin = time.perf_counter()
        layer.query_sums(block._add_mlp(x[None])[0])[1].cpu()
        best = min(best, time.perf_counter() - begin)
    return tokens * (4 * D * hidden + 2 * D * D) / best


def described(found: Plan, rates: dict[str, float], store: str | Path) -> str:
    """The plan as lines of text."""
    lines = [
        f"{found.tokens:,} tokens; {found.operations / 1e12:,.1f} TFLOP; {found.bytes_read / 1e9:,.1f} GB read, "
        f"{found.bytes_written / 1e9:,.1f} GB written; {found.store / 1e9:,.1f} GB of {store} for the tokens",
        "at " + ", ".join(f"{name} {value / 1e9:,.2f} G/s" for name, value in rates.items()) + ":",
    ]
    seconds = found.seconds(**rates)
    lines += [f"  {work.name:<24}{each:>10,.1f} s" for work, each in zip(found.work, seconds)]
    return "\n".join([*lines, f"  {'in all':<24}{sum(seconds):>10,.1f} s"])

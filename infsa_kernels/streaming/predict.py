"""`predict_file`: an InfViT of Linear-InfSA on a picture that no memory holds.

    picture -- patches --> tokens -- scores --> row;  tokens + row -- update --> tokens -- scores --> ... --> class scores

A layer is two passes over the tokens: its scores, which are only summed, and the update. The queries of a layer are summed on
the way out of the pass before. Scores go up and updates go down the picture: what was touched last is still in the cache.
"""

import contextlib
import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..nn.checks import integer
from ..nn.patches import whole_patches
from ..nn.vit import CHUNK_TOKENS, InfViT
from .layers import Attention, check_model
from .pictures import Picture, imported, open_picture
from .plan import SPARE, schedule
from .ranks import Ranks
from .state import State
from .tokens import Store

# Tokens of a chunk on a GPU: enough that launches and copies are small beside the products.
GPU_CHUNK_TOKENS = 32768
# Between states: an interrupted run loses no more. A state that takes long to write is written more rarely.
SECONDS, WRITING_SHARE = 10.0, 0.01
# What integers are divided by.
FULL = {"uint8": 255.0, "uint16": 65535.0, "float32": 1.0}
MAP_TILE = 256


class Prediction(NamedTuple):
    """What :func:`predict_file` gives.

    Attributes:
        scores: (1, num_classes), as of ``model(picture)``.
        attention: (rows, columns) of patches, float32, on the CPU; None if no map was asked for.
        tokens: of the picture, without the class token.
        bytes_read, bytes_written: of the picture and the tokens, by this process, since it was resumed last.
        seconds: the same of time.
    """

    scores: Tensor
    attention: Tensor | None
    tokens: int
    bytes_read: int
    bytes_written: int
    seconds: float


@torch.no_grad()
def predict_file(
    model: InfViT,
    path: str | os.PathLike,
    *,
    work_dir: str | os.PathLike | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    attention_map: str | os.PathLike | None = None,
    map_layer: int = -1,
    chunk_tokens: int | None = None,
    group: Any = None,
    progress: bool = True,
) -> Prediction:
    """Class scores of the picture in a file, whose tokens need not fit into memory.

    Arguments and errors are those of :meth:`infsa_kernels.nn.InfViT.predict_file`, which returns the scores alone.
    """
    start = time.monotonic()
    check_model(model)
    layer = _checked_map(model, attention_map, map_layer)
    if chunk_tokens is not None:
        integer("predict_file", "chunk_tokens", chunk_tokens)
    ranks = Ranks(group)
    with contextlib.ExitStack() as stack:
        with ranks.agreeing():
            picture = open_picture(path, model.patch_embed.in_channels)
            stack.callback(picture.close)
            run = _Run(model, picture, ranks, layer, chunk_tokens, _pixels(model, picture, mean, std))
            identity = _identity(run, mean, std)
            run.open(stack, work_dir, identity, progress)
        with ranks.agreeing():
            ranks.check_equal(identity)
        scores, attention = run.run()
        if attention is not None and ranks.rank == 0:
            _write_map(Path(attention_map), attention)
        ranks.wait()
        run.state.remove()
        run.store.close(remove=True)
    read, written = picture.bytes_read + run.store.bytes_read, run.store.bytes_written
    return Prediction(scores, attention, math.prod(run.grid), read, written, time.monotonic() - start)


@dataclass
class _Pass:
    """One way over the tokens of this process.

    Attributes:
        sums: before the first chunk.
        work: gets the sums, the numbers of a chunk's first and last patch row, and its tokens (n, D), or its pixels if not
            ``reads``; adds to the sums, and returns the chunk's new tokens or None.
    """

    sums: list[Tensor]
    work: Callable[[list[Tensor], tuple[int, int], Tensor], Tensor | None]
    reads: bool = True
    writes: bool = False
    down: bool = True


class _Run:
    """A model on its way over this process's rows of a picture."""

    def __init__(self, model: InfViT, picture: Picture, ranks: Ranks, map_layer, chunk_tokens, pixels):
        self.model, self.picture, self.ranks, self.map_layer, self.pixels = model, picture, ranks, map_layer, pixels
        p = model.patch_size
        self.grid = rows, columns = -(-picture.height // p), -(-picture.width // p)
        self.dtype, self.device = model.patch_embed.weight.dtype, model.patch_embed.weight.device
        usual = GPU_CHUNK_TOKENS if self.device.type == "cuda" else CHUNK_TOKENS
        step = max(1, (chunk_tokens or usual) // columns)
        self.rows = first, last = ranks.share(rows)
        self.chunks = [(row, min(row + step, last)) for row in range(first, last, step)]
        self.chunk_tokens = step * columns
        self.spare = max(1, math.ceil(SPARE * len(self.chunks)))
        # Where chunk 0 is in the ring, and how many passes there were.
        self.origin = self.number = 0
        self.schedule = schedule(model, map_layer, picture.dtype.itemsize)

    def open(self, stack: contextlib.ExitStack, work_dir, identity: dict[str, str], progress: bool) -> None:
        """Takes the disk or the memory, and looks whether there is a state to go on from."""
        tokens = state = None
        if work_dir is not None:
            folder, mine = Path(work_dir), f"{self.ranks.rank}-of-{self.ranks.size}"
            folder.mkdir(parents=True, exist_ok=True)
            tokens, state = folder / f"tokens-{mine}.bin", folder / f"state-{mine}.pt"
        shape, slots = (self.chunk_tokens, self.model.embed_dim), len(self.chunks) + self.spare
        # The store first: its lock keeps others from this state.
        self.store = Store(tokens, slots, shape, self.dtype, self.device)
        stack.callback(self.store.close)
        self.state = State(state, identity)
        if self.state.resumed and not self.store.there:
            raise ValueError(
                f"predict_file: {state} goes with {tokens}, which is not there, or cut off; delete {folder} to begin anew"
            )
        self.bar = stack.enter_context(_bar(self._cost(), progress and self.ranks.rank == 0))

    def run(self) -> tuple[Tensor, Tensor | None]:
        """Class scores (1, num_classes), and the map (rows, columns)."""
        model, depth = self.model, len(self.model.blocks)
        layers = [Attention(block) for block in model.blocks]
        D, H = model.embed_dim, model.num_heads
        first, attention, added = self._first_token(), None, []
        last_update = depth - (model.pool == "cls")

        def what_follows(number: int):
            """Sums over the tokens that enter a layer, or leave the last: zeros, and a chunk's part."""
            if number < depth:
                return self._zeros((H, D // H), (H,)), layers[number].query_sums
            if model.pool == "cls":
                return [], lambda x: []
            return self._zeros((D,)), lambda x: [self._normed(x, added).sum(0, dtype=torch.float64)]

        sums, part = what_follows(0)
        sums = self._pass(_Pass(sums, _embedding(self, part, keep=depth > 0), reads=False, writes=depth > 0))
        for number, (block, layer) in enumerate(zip(model.blocks, layers)):
            layer.set_queries(_with(first, sums, layer.query_sums))
            sums = self._pass(_Pass(self._zeros(*layer.score_shapes), _summing(layer.score_sums), down=False))
            added.append(layer.set_scores(_with(first, sums, layer.score_sums)))
            if number == self.map_layer:
                attention = self._map(layer)
            if number < last_update:
                sums, part = what_follows(number + 1)
                keep = number + 1 < depth
                sums = self._pass(_Pass(sums, _updating(block, added[-1], part, keep), writes=keep))
            if first is not None:
                first = block._add_mlp((first + added[-1])[None])[0]
        if first is not None:
            pooled = self._normed(first, added)
        else:
            pooled = (sums[0] / math.prod(self.grid)).to(self.dtype)[None]
        return model.head(pooled), attention

    def _normed(self, x: Tensor, added: list[Tensor]) -> Tensor:
        """Tokens (n, D) as the head takes them."""
        if self.model.neumann is not None:
            x = x + self.model.neumann(added)
        return self.model.norm(x[None])[0]

    def _first_token(self) -> Tensor | None:
        if self.model.cls_token is None:
            return None
        return self.model._first_token(self.model.cls_token)[0].to(self.dtype)

    def _map(self, layer: Attention) -> Tensor:
        rows, columns = self.grid
        begin, end = self.rows

        def work(sums, chunk, x):
            sums[0][chunk[0] - begin : chunk[1] - begin] = layer.weights(x).view(-1, columns)

        mine = torch.zeros(end - begin, columns, device=self.device)
        return self.ranks.join(self._pass(_Pass([mine], work, down=False), summed=False)[0]).cpu()

    def _zeros(self, *shapes: tuple[int, ...]) -> list[Tensor]:
        return [torch.zeros(shape, dtype=torch.float64, device=self.device) for shape in shapes]

    def _pass(self, this: _Pass, summed: bool = True) -> list[Tensor]:
        """The sums of a pass, of all processes; from the state if it ended before."""
        number, self.number = self.number, self.number + 1
        if number < len(self.state.ended):
            self.bar.update(self._cost(self.schedule[number]))
            sums = [t.to(self.device) for t in self.state.ended[number]]
        else:
            sums = self._go(this, number)
        if this.reads and this.writes:
            self.origin -= self.spare
        return self.ranks.sum(sums) if summed else sums

    def _go(self, this: _Pass, number: int) -> list[Tensor]:
        """From where the state says, chunk by chunk."""
        cost, store, slots = self.schedule[number].cost, self.store, self.store.slots
        self.bar.set_description_str(self.schedule[number].name)
        target = self.origin - self.spare if this.reads else self.origin
        order = range(len(self.chunks)) if this.down else range(len(self.chunks) - 1, -1, -1)
        done, sums = self.state.chunks, this.sums
        if self.state.sums is not None:
            sums = [t.to(self.device) for t in self.state.sums]
        self.state.chunks, self.state.sums = 0, None
        self.bar.update(cost * sum(self._tokens(i) for i in order[:done]))
        if this.reads:
            source = store.read(((self.origin + i) % slots, self._tokens(i)) for i in order[done:])
        else:
            source = self._strips([self.chunks[i] for i in order[done:]])
        saved, due = done, time.monotonic() + SECONDS
        for count, (i, x) in enumerate(zip(order[done:], source), done):
            # What chunk i will be written over has to be done in the last state.
            if (this.reads and this.writes and count - saved == self.spare) or (
                count > saved and time.monotonic() > due
            ):
                began = time.monotonic()
                store.settle()
                self.state.reached(count, sums)
                saved, now = count, time.monotonic()
                due = now + max(SECONDS, (now - began) / WRITING_SHARE)
            tokens = this.work(sums, self.chunks[i], x)
            if tokens is not None:
                store.write((target + i) % slots, tokens)
            self.bar.update(cost * self._tokens(i))
        store.settle()
        self.state.end_pass(sums)
        return sums

    def _strips(self, chunks: list[tuple[int, int]]) -> Iterator[Tensor]:
        """The pixels of rows of patches, (1, C, h, w) in the dtype of the model; the next are read and decoded meanwhile."""
        p, picture = self.model.patch_size, self.picture
        with ThreadPoolExecutor(1) as reader:

            def ask(chunk):
                return reader.submit(picture.rows, chunk[0] * p, min(chunk[1] * p, picture.height))

            ahead = ask(chunks[0]) if chunks else None
            for number in range(len(chunks)):
                strip = ahead.result()
                ahead = ask(chunks[number + 1]) if number + 1 < len(chunks) else None
                yield self.pixels(strip)

    def _tokens(self, chunk: int) -> int:
        begin, end = self.chunks[chunk]
        return (end - begin) * self.grid[1]

    def _cost(self, *work) -> float:
        return sum(w.cost for w in work or self.schedule) * (self.rows[1] - self.rows[0]) * self.grid[1]


def _embedding(run: _Run, part: Callable, keep: bool):
    def work(sums, chunk, pixels):
        x = run.model._patches(
            whole_patches(pixels, run.picture.channels, run.model.patch_size), run.grid, slice(*chunk)
        )[0]
        _add(sums, part(x))
        return x if keep else None

    return work


def _summing(part: Callable):
    return lambda sums, chunk, x: _add(sums, part(x))


def _updating(block, row: Tensor, part: Callable, keep: bool):
    def work(sums, chunk, x):
        x = block._add_mlp((x + row)[None])[0]
        _add(sums, part(x))
        return x if keep else None

    return work


def _add(sums: list[Tensor], parts: list[Tensor]) -> None:
    for t, part in zip(sums, parts):
        t += part


def _with(first: Tensor | None, sums: list[Tensor], part: Callable) -> list[Tensor]:
    """The sums over the patches and the first token, which no process has among its own."""
    return sums if first is None else [t + p for t, p in zip(sums, part(first))]


def _pixels(model: InfViT, picture: Picture, mean, std) -> Callable:
    """What turns rows of pixels (h, w, C) into a picture (1, C, h, w) of the model's device and dtype."""
    weight = model.patch_embed.weight
    scale = []
    for name, given, usual in (("mean", mean, 0.0), ("std", std, 1.0)):
        values = torch.as_tensor([usual] * picture.channels if given is None else given, dtype=torch.float32)
        if values.shape != (picture.channels,):
            raise ValueError(
                f"predict_file: {name} has shape {list(values.shape)}, expected a number for each of the "
                f"{picture.channels} channels"
            )
        scale.append(values.to(weight.device)[:, None, None])
    if not (scale[1] > 0).all():
        raise ValueError(f"predict_file: std is {list(std)}, expected numbers above 0")
    full = FULL[picture.dtype.name]

    def pixels(strip) -> Tensor:
        x = (
            torch.from_numpy(strip)
            .to(weight.device)
            .permute(2, 0, 1)
            .to(torch.float32, memory_format=torch.contiguous_format)
        )
        return (((x / full - scale[0]) / scale[1])[None]).to(weight.dtype)

    return pixels


def _identity(run: _Run, mean, std) -> dict[str, str]:
    """What a state must have been made with."""
    digest = hashlib.sha256(repr(run.model).encode())
    for name, t in run.model.state_dict().items():
        digest.update(f"{name} {t.dtype} {list(t.shape)}".encode())
        digest.update(memoryview(t.detach().cpu().reshape(-1).view(torch.uint8).numpy()))
    facts = {
        **{f"picture's {name}": value for name, value in run.picture.identity().items()},
        "model": digest.hexdigest()[:16], "mean": mean and [float(m) for m in mean], "std": std and [float(s) for s in std],
        "map_layer": run.map_layer, "chunk_tokens": run.chunk_tokens, "number of processes": run.ranks.size,
        "torch": torch.__version__, "device": run.device.type,
    }  # fmt: skip
    return {name: str(value) for name, value in facts.items()}


def _checked_map(model: InfViT, attention_map, map_layer: int) -> int | None:
    """The layer of the map, from 0; None if there is none to be written."""
    if attention_map is None:
        return None
    integer("predict_file", "map_layer", map_layer, at_least=-math.inf)
    depth = len(model.blocks)
    if not -depth <= map_layer < depth:
        raise ValueError(
            f"predict_file: map_layer is {map_layer}, expected {-depth} to {depth - 1}: the model has {depth} layers"
        )
    imported("tifffile", Path(attention_map))
    if not Path(attention_map).absolute().parent.is_dir():
        raise FileNotFoundError(
            f"predict_file: attention_map is {attention_map}, expected a file in a folder that exists"
        )
    return map_layer % depth


def _write_map(path: Path, attention: Tensor) -> None:
    beside = path.with_name(path.name + ".new")
    imported("tifffile").imwrite(
        beside, attention.numpy(), tile=(MAP_TILE, MAP_TILE), compression="zlib", metadata={"axes": "YX"}
    )
    os.replace(beside, path)


@contextlib.contextmanager
def _bar(total: float, shown: bool):
    """A bar that counts operations, so that its estimate of the time left holds across passes of different kinds."""
    if not shown:
        yield _NoBar()
        return
    layout = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left"
    with imported("tqdm").tqdm(total=total, bar_format=layout, smoothing=0.05) as bar:
        yield bar


class _NoBar:
    def update(self, n: float) -> None:
        """Nothing."""

    def set_description_str(self, text: str) -> None:
        """Nothing."""

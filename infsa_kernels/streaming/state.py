"""What an interrupted run needs to go on: the sums of the passes that are done, and how far the next has come.

The file is written beside its place, made durable and then moved there: at every moment there is a whole one. It says whose state
it is; one of another picture, model or argument is refused.
"""

import os
import pickle
from pathlib import Path

import torch
from torch import Tensor


class State:
    """Sums of every pass that ended, in their order; of the next, how many chunks are done and their sums.

    Args:
        path: the file; None keeps nothing.
        identity: whose state this is, as names and what they stand for.

    Raises:
        ValueError: the file is the state of another run, or none.
    """

    def __init__(self, path: Path | None, identity: dict[str, str]):
        self.path, self.identity = path, identity
        self.ended: list[list[Tensor]] = []
        self.chunks, self.sums = 0, None
        self.resumed = path is not None and path.exists()
        if not self.resumed:
            return
        advice = f"give another work_dir, or delete {path.parent} to begin anew"
        try:
            saved = torch.load(path, weights_only=True)
            theirs, self.ended, self.chunks, self.sums = (saved[key] for key in ("identity", "ended", "chunks", "sums"))
        except (OSError, EOFError, KeyError, RuntimeError, TypeError, pickle.UnpicklingError) as error:
            raise ValueError(f"predict_file: {path} is no state of a run: {error}; {advice}") from None
        other = [name for name in identity | theirs if identity.get(name) != theirs.get(name)]
        if other:
            told = ", ".join(f"{name} {theirs.get(name)}, here {identity.get(name)}" for name in other)
            raise ValueError(f"predict_file: {path} is the state of a run with another {told}; {advice}")

    def save(self) -> None:
        if self.path is None:
            return
        beside = self.path.with_suffix(".new")
        with open(beside, "wb") as file:
            torch.save({key: getattr(self, key) for key in ("identity", "ended", "chunks", "sums")}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, self.path)
        if hasattr(os, "O_DIRECTORY"):
            folder = os.open(self.path.parent, os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def reached(self, chunks: int, sums: list[Tensor]) -> None:
        """So many chunks of the pass are done."""
        if self.path is not None:
            self.chunks, self.sums = chunks, [t.cpu() for t in sums]
            self.save()

    def end_pass(self, sums: list[Tensor]) -> None:
        if self.path is not None:
            self.ended.append([t.cpu() for t in sums])
            self.chunks, self.sums = 0, None
            self.save()

    def remove(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)

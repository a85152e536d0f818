"""The tokens of a picture between two layers, (N, D), in a file or in memory, moved a chunk at a time.

Layers write over what they read, and an interrupted one goes on where it was. So the store is a ring of a few more slots than
there are chunks: a layer writes every chunk ``spare`` slots before the place it was read from. What it overwrites was read
``spare`` chunks ago, and is not needed again if the state has been saved since.

The file is read and written, not mapped: its pages would count as the process's memory and address space, and a full disk would
end it by a signal.
"""

import errno
import os
import shutil
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

# Chunks that are on their way while another is worked on.
AHEAD = 2
# Of a GPU's free memory, what tokens may take; chunks and what is between their layers take the rest.
GPU_SHARE = 0.75


class Store:
    """A ring of ``slots`` slots of ``shape`` = (tokens, D) each.

    Args:
        path: its file, made if it is not there; None for memory: the GPU's if they fit there, else the host's.
        device: where chunks are worked on.

    Attributes:
        there: whether the file was there before, with what another run left in it.
        bytes_read, bytes_written: so far.

    Raises:
        OSError: the disk is too small, or another process has the file. MemoryError: the memory is too small.
    """

    def __init__(self, path: Path | None, slots: int, shape: tuple[int, int], dtype: torch.dtype, device: torch.device):
        self.path, self.slots, self.shape, self.dtype, self.device = path, slots, shape, dtype, device
        self.slot_bytes = shape[0] * shape[1] * dtype.itemsize
        self.bytes_read = self.bytes_written = 0
        self.cuda = device.type == "cuda"
        self._memory, self._files = None, ()
        self._write_errors: deque[Future] = deque()
        size = slots * self.slot_bytes
        self.there = path is not None and path.exists() and path.stat().st_size == size
        if path is not None:
            self._files = _open_file(path, size)
        else:
            self._memory = _allocate(size, (slots, *shape), dtype, device)
        # One thread each: a file object has one position.
        self._reader, self._writer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        if self.cuda:
            self._in, self._out = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def read(self, chunks: Iterable[tuple[int, int]]) -> Iterator[Tensor]:
        """The tokens (n, D) of every (slot, n), on the device. One is there until the next is asked for."""
        ready: deque[Future] = deque()
        chunks = iter(chunks)
        spare = [(self._host(), None) for _ in range(AHEAD + 1)] if self._files else [(None, None)] * (AHEAD + 1)
        in_use = None
        while True:
            while spare and (chunk := next(chunks, None)) is not None:
                ready.append(self._reader.submit(self._fetch, *spare.pop(), *chunk))
            if not ready:
                return
            tokens, buffer, arrived = ready.popleft().result()
            if arrived is not None:
                torch.cuda.current_stream(self.device).wait_event(arrived)
                tokens.record_stream(torch.cuda.current_stream(self.device))
            in_use = buffer, arrived
            yield tokens
            spare.append(in_use)

    def write(self, slot: int, tokens: Tensor) -> None:
        """Returns at once; ``tokens`` must not change until :meth:`settle`."""
        while len(self._write_errors) >= AHEAD:
            self._write_errors.popleft().result()
        left = None
        if self.cuda:
            computed = torch.cuda.current_stream(self.device).record_event()
            with torch.cuda.stream(self._out):
                self._out.wait_event(computed)
                tokens.record_stream(self._out)
                if self._files:
                    tokens = self._pinned(tokens)
                else:
                    self._memory[slot, : len(tokens)].copy_(tokens, non_blocking=True)
                left = self._out.record_event()
        elif not self._files:
            self._memory[slot, : len(tokens)] = tokens
        self.bytes_written += tokens.nbytes
        self._write_errors.append(self._writer.submit(self._put, slot, tokens, left))

    def settle(self) -> None:
        """Waits until all is written, and durable."""
        while self._write_errors:
            self._write_errors.popleft().result()
        if self._files:
            os.fsync(self._files[1].fileno())

    def close(self, remove: bool = False) -> None:
        self._reader.shutdown(cancel_futures=True)
        self._writer.shutdown(cancel_futures=True)
        for file in self._files:
            file.close()
        if remove and self.path is not None:
            self.path.unlink(missing_ok=True)
        self._memory = None

    def _fetch(self, buffer: Tensor | None, copied, slot: int, n: int):
        """On the reader's thread: the tokens, the buffer that they take and, on a GPU, the event of their arrival."""
        if self._files:
            if copied is not None:
                copied.synchronize()
            tokens = buffer[:n]
            file, target = self._files[0], memoryview(tokens.view(torch.uint8).numpy()).cast("B")
            file.seek(slot * self.slot_bytes)
            if file.readinto(target) != len(target):
                raise OSError(f"predict_file: {self.path} has become shorter while it was in use")
        else:
            tokens = self._memory[slot, :n]
        self.bytes_read += tokens.nbytes
        if tokens.device == self.device:
            return tokens, buffer, None
        with torch.cuda.stream(self._in):
            return tokens.to(self.device, non_blocking=True), buffer, self._in.record_event()

    def _put(self, slot: int, tokens: Tensor, left) -> None:
        if left is not None:
            left.synchronize()
        if self._files:
            file = self._files[1]
            file.seek(slot * self.slot_bytes)
            data = memoryview(tokens.contiguous().view(torch.uint8).numpy()).cast("B")
            while data:  # an unbuffered file may take a part
                data = data[file.write(data) :]

    def _pinned(self, tokens: Tensor) -> Tensor:
        """A copy of the GPU's tokens on its way to the host; torch keeps pinned memory for the next."""
        return torch.empty(tokens.shape, dtype=self.dtype, pin_memory=True).copy_(tokens, non_blocking=True)

    def _host(self) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, pin_memory=self.cuda)


def _open_file(path: Path, size: int):
    """The file for reading and the file for writing, each with its position; the disk's space is taken now."""
    there = path.stat().st_size if path.exists() else 0
    free = shutil.disk_usage(path.parent).free
    if size - there > free:
        raise OSError(errno.ENOSPC, f"predict_file: {path.parent} has {free / 1e9:.1f} GB free, expected {size / 1e9:.1f} GB for "
                      "the tokens of this picture; free some, or give a work_dir on another disk")  # fmt: skip
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o644)
    write = open(descriptor, "r+b", buffering=0)  # noqa: SIM115
    try:
        if fcntl is not None:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise OSError(
                    errno.EBUSY, f"predict_file: {path} is in use by another run; give another work_dir"
                ) from None
        if hasattr(os, "posix_fallocate") and size:
            os.posix_fallocate(descriptor, 0, size)
        else:
            os.truncate(path, size)
        return open(path, "rb", buffering=0), write
    except BaseException:
        write.close()
        raise


def _allocate(size: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type == "cuda" and size <= torch.cuda.mem_get_info(device)[0] * GPU_SHARE:
        return torch.empty(shape, dtype=dtype, device=device)
    free = available_memory()
    if size > free:
        raise MemoryError(
            f"predict_file: {free / 1e9:.1f} GB of memory are free, expected {size / 1e9:.1f} GB for the tokens of this picture; "
            "give a work_dir, a folder on a disk that has them"
        )
    return torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")


def available_memory() -> int:
    """Bytes of memory that are free; where the system does not tell, none that could be exceeded."""
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable"))
    except OSError:
        return 1 << 62

"""The two memories of a launch. Every access is checked: where it goes, its alignment, and that what it reads was written.

An address of global memory is not that of the tensor on the CPU: tensors lie far apart, above what 32 bits can address.
"""

import numpy as np
import torch
from helpers.layouts import whole_storage

from .parse import Instruction

UINT = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}

# Of a byte. What torch.empty gives is filled in the tests, and so counts as unwritten, as do the gaps of a strided layout and
# the tokens that a mask ignores, which no kernel has to read.
WRITTEN, UNWRITTEN, OUTSIDE, IN_FLIGHT, BARRIER = range(5)
FILL = {torch.float32: 0x7FC00000, torch.bfloat16: 0x7FC0, torch.float16: 0x7E00, torch.int32: 0x7FFFFFFF}

WARP = 32


class Fault(AssertionError):
    """What an instruction must not do."""


class Memory:
    """Bytes and the state of each. Offsets are int64, one per access."""

    def __init__(self, size: int):
        self.data = np.zeros(size, np.uint8)
        self.state = np.full(size, OUTSIDE, np.uint8)
        # Of several lanes that store to one place at once the last one wins, or the first.
        self.lanes = slice(None)

    def elements(self, bytes_: np.ndarray, width: int) -> np.ndarray:
        return bytes_.view(UINT[width])

    def check(self, at: np.ndarray, width: int, count: int, i: Instruction, reads: bool) -> None:
        """Of accesses to `count` elements of `width` bytes each."""
        if (at % (width * count)).any():
            raise Fault(
                f"{i}: misaligned, offset {at[at % (width * count) != 0][0]} of an access of {width * count} bytes"
            )
        if ((at < 0) | (at + width * count > len(self.data))).any():
            raise Fault(f"{i}: far outside of any memory")
        for j in range(count):
            found = self.elements(self.state, width)[at // width + j]
            if not found.any():
                continue
            states = found.view(np.uint8).reshape(len(at), width).max(1)
            if (states >= (UNWRITTEN if reads else OUTSIDE)).any():
                worst = int(states.argmax())
                raise Fault(f"{i}: {self.describe(int(at[worst]), int(states[worst]))}")

    def describe(self, offset: int, state: int) -> str:
        what = {
            UNWRITTEN: "was never written",
            OUTSIDE: "is out of bounds",
            IN_FLIGHT: "has an asynchronous copy on its way",
            BARRIER: "is part of an mbarrier",
        }
        return f"{type(self).__name__.lower()} memory at {offset} {what[state]}"

    def load(self, at: np.ndarray, width: int, count: int, i: Instruction) -> list[np.ndarray]:
        self.check(at, width, count, i, reads=True)
        elements = self.elements(self.data, width)
        return [elements[at // width + j] for j in range(count)]

    def store(self, at: np.ndarray, width: int, values: list[np.ndarray], i: Instruction) -> None:
        self.check(at, width, len(values), i, reads=False)
        elements, states = self.elements(self.data, width), self.elements(self.state, width)
        for j, value in enumerate(values):
            elements[(at // width + j)[self.lanes]] = value[self.lanes]
            states[at // width + j] = 0  # WRITTEN, all of its bytes


class Global(Memory):
    """The storages of a launch's tensors, each between two that nothing may touch."""

    BASE = 0x7F3A_0000_0000
    APART = 4096

    def __init__(self, tensors: list[torch.Tensor]):
        storages = {t.untyped_storage().data_ptr(): t for t in tensors}
        self.places: dict[int, tuple[int, torch.Tensor]] = {}
        size = self.APART
        for pointer, t in storages.items():
            assert pointer % 64 == 0, "torch aligns what it allocates"
            self.places[pointer] = size, t
            size += -(-t.untyped_storage().nbytes() // self.APART) * self.APART + self.APART
        super().__init__(size)
        for start, t in self.places.values():
            storage = whole_storage(t).numpy()
            self.data[start : start + len(storage)] = storage
            self.state[start : start + len(storage)] = WRITTEN
            if t.dtype in FILL:
                filled = storage.view(UINT[t.itemsize]) == FILL[t.dtype]
                self.state[start : start + len(storage)] = np.repeat(filled, t.itemsize) * UNWRITTEN

    def address(self, t: torch.Tensor) -> int:
        start = t.untyped_storage().data_ptr()
        return self.BASE + self.places[start][0] + t.data_ptr() - start

    def write_back(self) -> None:
        """To the tensors."""
        for start, t in self.places.values():
            storage = whole_storage(t).numpy()
            storage[:] = self.data[start : start + len(storage)]

    def describe(self, offset: int, state: int) -> str:
        near = min(self.places.values(), key=lambda place: abs(place[0] - offset))
        shape = f"{near[1].dtype} of shape {list(near[1].shape)}"
        return f"{super().describe(offset, state)}: byte {offset - near[0]} of the storage of a {shape}"


class Shared(Memory):
    """Shared memory of every program, and which thread touched what since the program's last barrier.

    Two threads that touch a place between two barriers, one of them writing, race. Threads of one warp do too, if no barrier of
    the warp is between: since Volta nothing else orders them. Only where one instruction has several write to a place, which
    Triton does with what they all hold, PTX lets any of them win.

    Hopper's products and tensor copies touch it through another proxy: what threads have read or written there themselves a
    fence has to order before.
    """

    WINDOW = 0x7E00_0000_0000  # where addresses of all spaces have it

    def __init__(self, programs: int, size: int, unit: int, base: int):
        """``unit``: of the bytes in which threads are told apart, the shortest access that there is."""
        self.size, self.unit, self.base = size, unit, base
        self.pitch = -(-size // 64) * 64 + 64
        super().__init__(programs * self.pitch)
        self.state.reshape(programs, self.pitch)[:, :size] = UNWRITTEN
        self.writers, self.readers = (_Threads(programs, self.pitch // unit) for _ in range(2))
        self.products = np.zeros(programs * self.pitch // unit, np.int16)  # on their way that read a place
        # Of a place, since the last fence: whether a thread has read it itself, and has written it.
        self.unfenced_reads, self.unfenced_writes = (np.zeros((programs, self.pitch // unit), bool) for _ in range(2))

    def offsets(self, addresses: np.ndarray, program: np.ndarray, length: int, i: Instruction) -> np.ndarray:
        at = addresses.astype(np.int64) - self.base
        if ((at < 0) | (at + length > self.size)).any():
            raise Fault(f"{i}: shared memory is out of bounds, {at.min()} to {at.max() + length} of {self.size} bytes")
        return program * self.pitch + at

    def barrier(self, programs: np.ndarray) -> None:
        self.writers.forget(programs)
        self.readers.forget(programs)

    def warp_barrier(self, warps: np.ndarray) -> None:
        self.writers.order(warps)
        self.readers.order(warps)

    def fence(self, programs: np.ndarray) -> None:
        self.unfenced_reads[programs] = self.unfenced_writes[programs] = False

    def reads(self, at: np.ndarray, length: int, thread: np.ndarray, i: Instruction) -> None:
        self.unfenced_reads.reshape(-1)[self.touches(at, length, thread, i)] = True

    def writes(self, at: np.ndarray, length: int, thread: np.ndarray, i: Instruction) -> None:
        self.unfenced_writes.reshape(-1)[self._writes(at, length, thread, i)] = True

    def touches(self, at: np.ndarray, length: int, thread: np.ndarray, i: Instruction) -> np.ndarray:
        """What must not meet another thread's write, as a read or an operation of an mbarrier. The places."""
        places = self._places(at, length)
        self._alone(self.writers, places, thread, i, "reads what another thread writes")
        self.readers.add(places, thread)
        return places

    def reads_by_proxy(self, at: np.ndarray, length: int, thread: np.ndarray, i: Instruction) -> np.ndarray:
        places = self.touches(at, length, thread, i)
        self._fenced(self.unfenced_writes, places, i, "reads what a thread has written")
        return places

    def writes_by_proxy(self, at: np.ndarray, length: int, thread: np.ndarray, i: Instruction) -> None:
        places = self._writes(at, length, thread, i)
        self._fenced(self.unfenced_writes, places, i, "writes what a thread has written")
        self._fenced(self.unfenced_reads, places, i, "writes what a thread has read")

    def arrived(self, at: np.ndarray, length: int, thread: int | None) -> None:
        """What another proxy wrote is there for all threads of the program (None), for one, or for some (SEVERAL)."""
        self.state[at[:, None] + np.arange(length)] = WRITTEN
        self.writers.set(self._places(at, length), thread)

    def _writes(self, at: np.ndarray, length: int, thread: np.ndarray, i: Instruction) -> np.ndarray:
        places = self._places(at, length)
        self._alone(self.writers, places, thread, i, "writes what another thread writes")
        self._alone(self.readers, places, thread, i, "writes what another thread reads")
        if self.products[places].any():
            raise Fault(f"{i}: writes what a product on its way reads")
        self.writers.add(places, thread)
        return places

    def _places(self, at: np.ndarray, length: int) -> np.ndarray:
        return at[:, None] // self.unit + np.arange(length // self.unit)

    def _alone(self, others: "_Threads", places: np.ndarray, thread: np.ndarray, i: Instruction, what: str) -> None:
        if others.conflict(places, thread):
            raise Fault(f"{i}: {what}, with no barrier between")

    def _fenced(self, unfenced: np.ndarray, places: np.ndarray, i: Instruction, what: str) -> None:
        if unfenced.reshape(-1)[places].any():
            raise Fault(f"{i}: {what}, with no fence.proxy.async between")


# In place of a thread. ORDERED: some threads of a warp, before its own last barrier.
NOBODY, SEVERAL, ORDERED = -1, -2, -3


class _Threads:
    """Who has touched each place since the last barrier: the thread, and the warp, or that there were several of them."""

    def __init__(self, programs: int, places: int):
        self.thread, self.warp = (np.full((programs, places), NOBODY, np.int32) for _ in range(2))
        self.flat_thread, self.flat_warp = self.thread.reshape(-1), self.warp.reshape(-1)

    def forget(self, programs: np.ndarray) -> None:
        self.thread[programs] = self.warp[programs] = NOBODY

    def set(self, places: np.ndarray, thread: int | None) -> None:
        self.flat_thread[places] = NOBODY if thread is None else thread
        self.flat_warp[places] = NOBODY if thread is None else thread // WARP if thread >= 0 else SEVERAL

    def order(self, warps: np.ndarray) -> None:
        self.flat_thread[np.isin(self.flat_warp, warps)] = ORDERED

    def conflict(self, places: np.ndarray, thread: np.ndarray) -> bool:
        before, me = self.flat_thread[places], thread[:, None]
        other = (before != NOBODY) & (before != me)
        return bool(other.any() and (other & ~self._ordered(before, places, me)).any())

    def add(self, places: np.ndarray, thread: np.ndarray) -> None:
        before, me = self.flat_thread[places], thread[:, None]
        alone = (before == NOBODY) | (before == me) | self._ordered(before, places, me)
        of_warp = self.flat_warp[places]
        within = (of_warp == NOBODY) | (of_warp == me // WARP)
        for flat, one, mine in ((self.flat_thread, alone, me), (self.flat_warp, within, me // WARP)):
            flat[places] = np.where(one, mine, SEVERAL)
            # Where several come in this very instruction, the last to be noted is not the only one.
            flat[places[(flat[places] != mine) & (flat[places] != SEVERAL)]] = SEVERAL

    def _ordered(self, before, places, me) -> np.ndarray:
        return (before == ORDERED) & (self.flat_warp[places] == me // WARP)

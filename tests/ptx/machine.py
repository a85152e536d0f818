"""Runs a kernel: one lane per element of an array, all programs of a launch at once or in any other order."""

import re
from collections.abc import Callable, Iterable

import numpy as np

from . import arithmetic, exchange, products, transfers
from .arithmetic import TYPES
from .memory import UINT, WARP, Fault, Global, Shared
from .parse import Instruction, Kernel
from .races import History
from .transfers import GENERIC, TensorMap

# Where shared memory begins. On sm_80 no more aligned than PTX promises, so that nothing can rely on more. Triton promises no
# more for Hopper either, though swizzles need 1024 bytes there: it relies on what the system reserves before, which is as much.
SHARED_BASE = {"sm_80": 0x410, "sm_90a": 0x400}
# Of the parameters that are read by address.
PARAMETER_BASE = 0x210

# Which programs run for a while, of those (bool) that can. Only atomics make the order matter, or else there is a race: so no
# other instruction is interrupted.
Order = Callable[[np.ndarray], np.ndarray]


def together(ready: np.ndarray) -> np.ndarray:
    return ready


def ascending(ready: np.ndarray) -> np.ndarray:
    return np.arange(len(ready)) == ready.argmax()


def descending(ready: np.ndarray) -> np.ndarray:
    return ascending(ready[::-1])[::-1]


def shuffled(seed: int) -> Order:
    random = np.random.default_rng(seed)

    def some(ready: np.ndarray) -> np.ndarray:
        chosen = ready & (random.random(len(ready)) < 0.5)
        return chosen if chosen.any() else np.arange(len(ready)) == random.choice(np.flatnonzero(ready))

    return some


class Machine:
    """One launch."""

    def __init__(
        self, kernel: Kernel, parameters: Iterable[bytes | TensorMap], programs: int, threads: int, shared: int, memory: Global,
        workspace: int = 0,
    ):  # fmt: skip
        """``workspace``: where a cooperative launch counts who has come to its barrier; all its programs are there at once."""
        self.kernel, self.threads, self.memory = kernel, threads, memory
        self.parameters = dict(zip(kernel.parameters, parameters, strict=True))
        maps = {name: value for name, value in self.parameters.items() if isinstance(value, TensorMap)}
        addresses = {name: PARAMETER_BASE + 128 * j for j, name in enumerate(maps)}
        self.tensor_maps = {GENERIC + addresses[name]: value for name, value in maps.items()}
        lanes = np.arange(programs * threads)
        self.thread, self.program = lanes, lanes // threads
        self.special = {
            "%tid.x": (lanes % threads).astype(np.uint32),
            "%ctaid.x": self.program.astype(np.uint32),
            "%ntid.x": np.uint32(threads),
            "%nctaid.x": np.uint32(programs),
            kernel.shared: np.uint32(SHARED_BASE[kernel.target]),
            "%envreg1": np.uint32(workspace >> 32),
            "%envreg2": np.uint32(workspace & 0xFFFFFFFF),
        } | {name: np.uint32(address) for name, address in addresses.items()}
        self.special |= {f"%{of}.{axis}": np.uint32(0) for of in ("tid", "ctaid") for axis in "yz"}
        self.special |= {f"%{of}.{axis}": np.uint32(1) for of in ("ntid", "nctaid") for axis in "yz"}
        # Other parameters have a space of addresses of their own.
        self.special |= {name: np.uint64(0) for name in self.parameters if name not in addresses}
        self.registers = {
            name: np.zeros(len(lanes), bool if bits == 1 else UINT[bits // 8])
            for name, bits in kernel.registers.items()
        }
        bytewise = any(re.match(r"(ld|st)\.shared.*8$", i.opcode) for i in kernel.code)
        self.shared = Shared(programs, shared, 1 if bytewise else 2, SHARED_BASE[kernel.target])
        self.history = History(programs, threads)
        self.copies, self.transfers = exchange.Copies(self), transfers.Transfers(self)
        self.products = products.Products(self)
        self.pc = np.zeros(len(lanes), np.int64)
        self.alive = np.ones(len(lanes), bool)
        self.waiting = np.zeros(len(lanes), bool)  # for the others at a barrier
        self.blocked = np.zeros(len(lanes), bool)  # for the phase of an mbarrier
        self.reached = np.zeros(len(kernel.code), bool)
        # Who asks again for what an atomic has to change waits for one, and would else keep all others from going on.
        self.polls = np.array(
            [*(i.opcode.startswith("ld.acquire") for i in kernel.code), False]
        )  # behind the last: who left
        self.atomics, self.polled = 0, np.full(len(lanes), -1)
        self.steps = [self._step(i) for i in kernel.code]
        self.ends = self._ends()

    def read(self, operand: str, kind: str) -> np.ndarray:
        """A register, as an array that stays the same one, or an immediate, as an element of the type."""
        dtype = TYPES[kind]
        if operand in self.registers or operand in self.special:
            value = self.registers.get(operand, self.special.get(operand))
            same = value.dtype.itemsize == dtype.itemsize and (value.dtype.kind == "b") == (kind == "pred")
            assert same, f"{operand} is no {kind}"
            return value.view(dtype)
        if operand[:2] == "0f":
            return np.uint32(int(operand[2:], 16)).view(dtype)
        if kind == "pred":
            return np.bool_(int(operand))
        bits = 8 * dtype.itemsize
        return UINT[dtype.itemsize](int(operand.rstrip("U"), 0) & ((1 << bits) - 1)).view(dtype)

    def writer(self, operand: str, kind: str) -> Callable[[np.ndarray, np.ndarray], None]:
        """Of values of a type to a register, in the lanes of a mask."""
        if operand == "_":
            return lambda value, mask: None
        register = self.read(operand, kind)

        def write(value, mask):
            np.copyto(register, value, where=mask)

        return write

    def address(self, operand: str, kind: str) -> Callable[[np.ndarray], np.ndarray]:
        """Of `[register+offset]`, in some lanes, as int64."""
        base, _, offset = operand.strip("[]").partition("+")
        register, offset = self.read(base, kind), int(offset or "0", 0)

        def of(lanes):
            at = register[lanes] if register.shape else np.full(len(lanes), register)
            return at.astype(np.int64) + offset

        return of

    def whole_warps(self, mask: np.ndarray, i: Instruction) -> np.ndarray:
        """The warps that a mask holds: an instruction of a whole warp needs all lanes of it."""
        warps = mask.reshape(-1, WARP)
        if (warps.any(1) != warps.all(1)).any():
            raise Fault(f"{i}: only some lanes of a warp are here")
        return np.flatnonzero(warps.any(1))

    def run(self, order: Order = together, first_wins: bool = False) -> None:
        """``first_wins``: where several lanes store to one place of shared memory at once, and not the last."""
        self.shared.lanes = slice(None, None, -1) if first_wins else slice(None)
        with np.errstate(all="ignore"):
            while self.alive.any():
                free = self.alive & ~self.waiting & ~self.blocked
                if self.polls.any():
                    free &= ~(self.polls[self.pc] & (self.polled == self.atomics))
                if not free.any():
                    at = self.kernel.code[int(self.pc[self.alive].min())]
                    raise Fault(f"{at}: all threads wait here or at a barrier, for ever")
                lanes = free & np.repeat(order(free.reshape(-1, self.threads).any(1)), self.threads)
                pc = int(self.pc[lanes].min())
                self._block(pc, lanes & (self.pc == pc))
        self.transfers.end()
        self.products.end()
        self.history.check(len(self.memory.data))

    def _block(self, pc: int, lanes: np.ndarray) -> None:
        """From an instruction to the next that decides where lanes go on."""
        while True:
            i, step = self.kernel.code[pc], self.steps[pc]
            mask = lanes
            if i.guard:
                held = self.registers[i.guard]
                mask = lanes & (~held if i.negated else held)
            if self.ends[pc]:
                self.pc[lanes] = pc + 1
            if not i.guard or mask.any():
                self.reached[pc] = True
                step(mask)
            if self.ends[pc]:
                return
            pc += 1

    def _ends(self) -> np.ndarray:
        ends = np.zeros(len(self.kernel.code), bool)
        ends[[at - 1 for at in self.kernel.labels.values() if at]] = True
        for at, i in enumerate(self.kernel.code):
            control = i.opcode.startswith(("bra", "ret", "exit", "bar.sync", "barrier.sync", "mbarrier.try_wait"))
            atomic = i.opcode.startswith(("atom.", "red.", "ld.acquire"))
            ends[at] |= control or atomic
            if atomic and at:
                ends[at - 1] = True
        return ends

    def _step(self, i: Instruction) -> Callable[[np.ndarray], None]:
        step = self._unguarded(i)
        rows = self.products.rows_of(i)
        if not len(rows):
            return step

        def watched(mask):
            self.products.touch(rows, mask, i)
            step(mask)

        return watched

    def _unguarded(self, i: Instruction) -> Callable[[np.ndarray], None]:
        if i.opcode in ("bra", "bra.uni"):
            target = self.kernel.labels[i.operands[0]]

            def branch(mask):
                self.pc[mask] = target

            return branch
        if i.opcode in ("ret", "exit"):

            def leave(mask):
                self.alive &= ~mask
                self._release(np.unique(self.program[mask]))

            return leave
        if i.opcode in ("bar.sync", "barrier.sync") and i.operands == ("0",):

            def wait(mask):
                if i.opcode == "bar.sync":  # the other one counts threads
                    self.whole_warps(mask, i)
                self.waiting |= mask
                self._release(np.unique(self.program[mask]))

            return wait
        if i.opcode == "trap":

            def trap(mask):
                raise Fault(f"{i}: the kernel gives up")

            return trap
        if found := arithmetic.operation(i.opcode):
            kinds, result, compute = found
            destination, *sources = i.operands
            values = [self.read(source, kind) for source, kind in zip(sources, kinds, strict=True)]
            write = self.writer(destination, result)
            return lambda mask: write(compute(*values), mask)
        for table in (exchange, transfers, products):
            if step := table.step(self, i):
                return step
        raise NotImplementedError(f"{self.kernel.name}: {i}")

    def _release(self, programs: np.ndarray) -> None:
        """Of those whose threads have all come to the barrier, or have left."""
        here = (self.waiting | ~self.alive).reshape(-1, self.threads)[programs].all(1)
        over = programs[here & self.waiting.reshape(-1, self.threads)[programs].any(1)]
        if len(over):
            self.waiting.reshape(-1, self.threads)[over] = False
            self.shared.barrier(over)
            self.transfers.barrier(over)
            self.history.barrier(over)

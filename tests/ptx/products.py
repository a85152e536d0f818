"""wgmma: Hopper's asynchronous products of four warps, whose operands lie in shared memory, A also in registers.

What a product on its way reads or writes nothing else may touch until the wait for its group: not the registers, which is an
error here, nor what it reads of shared memory (memory.py). Threads' own accesses to the registers are before a wgmma.fence.

A move into a sum counts as what was last done to its source: LLVM puts constants and copies right before the product that takes
them, behind a fence too. ptxas has them before it or, of zeros, a product that adds nothing: tests/gpu/test_triton_hopper.py
looks for what it leaves behind.
"""

import re
from dataclasses import dataclass

import numpy as np

from .arithmetic import from_bits
from .exchange import by_pattern, left_matrix, sums_in, write_sums
from .memory import WARP, Fault
from .parse import Instruction, parts

GROUP = 4 * WARP  # threads of a product


@dataclass
class Started:
    group: int  # of four warps, counted over all programs
    commit: int  # the number of its group of products
    at: np.ndarray  # what it reads of shared memory, 16 bytes each
    places: np.ndarray
    instruction: Instruction


class Products:
    """Per four warps: which products are on their way, and which registers they hold."""

    def __init__(self, m):
        self.m = m
        operands = (o for i in m.kernel.code if i.opcode.startswith("wgmma.mma") for o in i.operands if o[0] == "{")
        self.used = dict.fromkeys(register for operand in operands for register in parts(operand))
        sums = {r for i in m.kernel.code if i.opcode.startswith("wgmma.mma") for r in parts(i.operands[0])}
        self.moves = _moves_into(sums, m.kernel.code)
        sources = dict.fromkeys(i.operands[1] for i in m.kernel.code if i in self.moves and i.operands[1][0] == "%")
        self.row = {register: row for row, register in enumerate(self.used | sources)}
        groups = len(m.thread) // GROUP
        self.committed, self.completed = np.zeros(groups, np.int64), np.zeros(groups, np.int64)
        # The last product, by its group, that sums in a register, and that reads A from it.
        self.sums_in, self.reads = (np.full((len(self.row), groups), -1, np.int64) for _ in range(2))
        self.shape = np.full((len(self.row), groups), -1, np.int64)  # of the last product that sums in a register
        # When threads last touched a register, and when they last passed a fence.
        self.now, self.fenced = 1, np.zeros(groups, np.int64)
        self.touched = np.zeros((len(self.row), groups), np.int64)
        self.started: list[Started] = []

    def rows_of(self, i: Instruction) -> np.ndarray:
        """Of the registers that an instruction other than products names; what is only moved into them it has to write."""
        operands = () if i.opcode.startswith("wgmma") else i.operands
        names = [name for name in re.findall(r"%\w+", " ".join(operands[1:])) if name in self.used]
        names += [name for name in re.findall(r"%\w+", " ".join(operands[:1])) if name in self.row]
        return np.array([self.row[name] for name in names], np.int64)

    def touch(self, rows: np.ndarray, mask: np.ndarray, i: Instruction) -> None:
        groups = np.flatnonzero(mask.reshape(-1, GROUP).any(1))
        at = np.ix_(rows, groups)
        if (np.maximum(self.sums_in[at], self.reads[at]) >= self.completed[groups]).any():
            raise Fault(f"{i}: touches a register of a product on its way")
        if i in self.moves:
            to, source = (self.row.get(operand) for operand in i.operands)
            self.touched[to, groups] = 0 if source is None else self.touched[source, groups]
            return
        self.now += 1
        self.touched[at] = self.now

    def fence(self, i, found):
        def fence(mask):
            self.now += 1
            self.fenced[self.whole_groups(mask, i)] = self.now

        return fence

    def commit(self, i, found):
        def commit(mask):
            self.committed[self.whole_groups(mask, i)] += 1

        return commit

    def wait(self, i, found):
        left = int(i.operands[0], 0)

        def wait(mask):
            groups = self.whole_groups(mask, i)
            self.completed[groups] = np.maximum(self.completed[groups], self.committed[groups] - left)
            started, self.started = self.started, []
            for s in started:
                if s.commit >= self.completed[s.group]:
                    self.started.append(s)
                    continue
                np.subtract.at(self.m.shared.products, s.places, 1)
                # Up to now it may have read: other threads may write after a barrier.
                self._by_all(self.m.shared.touches, s.at, s.group, s.instruction)

        return wait

    def end(self) -> None:
        if self.started:
            raise Fault(f"{self.started[0].instruction}: a program ends while this product is on its way")

    def start(self, groups: np.ndarray, sums: list[int], of_a: list[int], shape: int, i: Instruction) -> None:
        """Checks the registers that a product in these four warps each is about to use, and notes that it does."""
        if not self.fenced[groups].all():
            raise Fault(f"{i}: no wgmma.fence before the first product")
        at, a = (np.ix_(np.array(rows, np.int64), groups) for rows in (sums, of_a))
        for rows in (at, a):
            if (self.touched[rows] > self.fenced[groups]).any():
                raise Fault(f"{i}: no wgmma.fence since threads touched a register")
        on_its_way = self.sums_in[at] >= self.completed[groups]
        if (on_its_way & (self.shape[at] != shape)).any():
            raise Fault(f"{i}: sums in a register of a product of another shape, which is on its way")
        if (self.reads[at] >= self.completed[groups]).any() or (self.sums_in[a] >= self.completed[groups]).any():
            raise Fault(f"{i}: A is in a register in which a product on its way sums, or the other way round")
        self.sums_in[at], self.shape[at], self.reads[a] = self.committed[groups], shape, self.committed[groups]

    def load(self, groups: np.ndarray, addresses: np.ndarray, width: int, i: Instruction) -> np.ndarray:
        """[group, 16 bytes] of addresses in shared memory, as a product on its way reads them: [group, 16 bytes, elements]."""
        m, found = self.m, []
        program = groups * GROUP // m.threads
        at = m.shared.offsets(addresses.reshape(-1), np.repeat(program, addresses.shape[1]), 16, i).reshape(
            addresses.shape
        )
        for group, here in zip(groups, at):
            places = self._by_all(m.shared.reads_by_proxy, here, group, i)
            np.add.at(m.shared.products, places, 1)
            self.started.append(Started(group, self.committed[group], here, places, i))
            found.append(np.stack(m.shared.load(here, width, 16 // width, i), 1))
        return np.stack(found)

    def _by_all(self, access, at: np.ndarray, group: int, i: Instruction) -> np.ndarray:
        """Of the places once: two threads stand for all, so that whoever writes there is another one."""
        first = np.full(len(at), group * GROUP)
        access(at, 16, first, i)
        return access(at, 16, first + GROUP - 1, i)

    def whole_groups(self, mask: np.ndarray, i: Instruction) -> np.ndarray:
        groups = mask.reshape(-1, GROUP)
        if (groups.any(1) != groups.all(1)).any():
            raise Fault(f"{i}: only some threads of four warps are here")
        return np.flatnonzero(groups.any(1))


def _moves_into(registers: set[str], code: tuple[Instruction, ...]) -> set[Instruction]:
    """Moves whose value ends in one of these registers, after more moves or none."""
    moves, before = {i for i in code if i.opcode == "mov.b32" and i.guard is None and i.operands[0][0] == "%"}, -1
    found: set[Instruction] = set()
    while len(found) > before:
        before = len(found)
        found |= {i for i in moves if i.operands[0] in registers | {move.operands[1] for move in found}}
    return found


def addresses_of(descriptors: np.ndarray, rows: int, columns: int, mn_major: bool, i: Instruction) -> np.ndarray:
    """[descriptor, 16 bytes]: where a matrix of K elements a row lies, 16 bytes at a time, rows of these slowest.

    ``rows`` x ``columns``, of which columns are the 16 bytes along a line of memory: K of them where the matrix is K-major, and
    M or N of them where it is MN-major.
    """
    field = [(descriptors >> np.uint64(low) & np.uint64(0x3FFF)).astype(np.int64)[:, None] << 4 for low in (0, 16, 32)]
    start, leading, stride = field
    swizzle = descriptors >> np.uint64(62)
    if (descriptors >> np.uint64(49) & np.uint64(7)).any() or (swizzle == 0).any():
        raise NotImplementedError(f"{i}: matrices without a swizzle or with a base offset")
    line = (256 >> swizzle.astype(np.int64))[:, None]  # bytes: 128, 64, 32
    row, column = (a.reshape(-1) for a in np.mgrid[:rows, :columns])
    # Eight lines are a pattern, `stride` is between patterns down the rows, `leading` between those along a line.
    along = 16 * column
    if mn_major:
        at = start + row // 8 * stride + row % 8 * line + along // line * leading + along % line
    else:
        at = start + row // 8 * stride + row % 8 * line + along
    return swizzled(at, line)


def swizzled(address: np.ndarray, line: np.ndarray | int) -> np.ndarray:
    """Of lines of 128 bytes the bits 4 to 6 of an address are changed by bits 7 to 9, of shorter ones as many as they have."""
    return address ^ (address >> 3 & (line - 16))


def _matrix(m, operand: str, mn: int, k: int, mn_major: bool, kind: str, i: Instruction):
    """groups -> [group, mn, k], of a descriptor."""
    descriptor, width = m.read(operand, "b64"), 4 if kind == "tf32" else 2
    each = 16 // width
    shape = (k, mn // each) if mn_major else (mn, k // each)

    def load(groups):
        lanes = np.broadcast_to(descriptor, m.thread.shape).reshape(-1, GROUP)[groups]
        if (lanes != lanes[:, :1]).any():
            raise Fault(f"{i}: threads of four warps have different descriptors")
        addresses = addresses_of(lanes[:, 0], *shape, mn_major, i)
        bits = m.products.load(groups, addresses, width, i)
        values = from_bits(bits, kind).reshape(len(groups), shape[0], shape[1] * each)
        return values.swapaxes(1, 2) if mn_major else values

    return load


def _multiply(m, i, found):
    """wgmma.mma_async m64nNk16 of 16-bit types and m64nNk8 of tf32, into float32."""
    kind, n, k = found["kind"], int(found["n"]), int(found["k"])
    in_registers = i.operands[1][0] == "{"
    destination, a, b, scale, *given = i.operands
    # Signs of A and B; of 16-bit types whether they are MN-major, A only where it is in memory.
    signs, major = given[:2], [int(o) for o in given[2:]]
    assert k == (8 if kind == "tf32" else 16) and n % 8 == 0 and len(parts(destination)) == n // 2
    assert len(major) == (0 if kind == "tf32" else 2 - in_registers), f"{i}: operands"
    if signs != ["1", "1"]:
        raise NotImplementedError(f"{i}: products with a sign")
    sums, writes = ([of(r, "f32") for r in parts(destination)] for of in (m.read, m.writer))
    adds = m.read(scale, "pred")
    B = _matrix(m, b, n, k, bool(major and major[-1]), kind, i)
    if in_registers:
        registers = [m.read(r, "b32") for r in parts(a)]
    else:
        A = _matrix(m, a, 64, k, bool(major and major[0]), kind, i)
    of_sums, of_a = ([m.products.row[r] for r in rs] for rs in (parts(destination), parts(a) if in_registers else ()))

    def multiply(mask):
        groups = m.products.whole_groups(mask, i)
        m.products.start(groups, of_sums, of_a, n, i)
        left = left_matrix(registers, kind).reshape(-1, 64, k)[groups] if in_registers else A(groups)
        added = np.broadcast_to(adds, mask.shape).reshape(-1, GROUP)[groups]
        if (added != added[:, :1]).any():
            raise Fault(f"{i}: threads of four warps differ in whether it adds")
        found = sums_in(sums).reshape(-1, 64, n)
        found[groups] = np.where(added[:, :1, None], found[groups], 0) + left @ B(groups).swapaxes(1, 2)
        write_sums(writes, found.reshape(-1, 16, n), mask)

    return multiply


def _of_products(method: str):
    return lambda m, i, found: getattr(m.products, method)(i, found)


step = by_pattern(
    {
        r"wgmma\.mma_async\.sync\.aligned\.m64n(?P<n>\d+)k(?P<k>8|16)\.f32\.(?P<kind>f16|bf16|tf32)\.(?P=kind)": _multiply,
        r"wgmma\.fence\.sync\.aligned": _of_products("fence"),
        r"wgmma\.commit_group\.sync\.aligned": _of_products("commit"),
        r"wgmma\.wait_group\.sync\.aligned": _of_products("wait"),
    }
)

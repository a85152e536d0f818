"""What moves between registers, memory and the lanes of a warp: loads, stores, copies, shuffles, products, atomics."""

import functools
import re
from collections.abc import Callable

import numpy as np

from .arithmetic import TYPES, from_bits
from .memory import IN_FLIGHT, UINT, WARP, WRITTEN, Fault, Global, Shared
from .parse import Instruction, parts

LANE = np.arange(WARP)


def by_pattern(table: dict[str, Callable]) -> Callable:
    """(machine, instruction) -> what it does in the lanes of a mask; None if none of the table's patterns is its opcode."""

    @functools.cache
    def maker(opcode: str) -> tuple[Callable | None, re.Match | None]:
        matches = ((make, re.fullmatch(pattern, opcode)) for pattern, make in table.items())
        return next((match for match in matches if match[1]), (None, None))

    def step(m, i: Instruction) -> Callable[[np.ndarray], None] | None:
        make, found = maker(i.opcode)
        return make and make(m, i, found)

    return step


def _move(m, i, found):
    kind = found["t"]
    destination, source = i.operands
    bits = 1 if kind == "pred" else 8 * TYPES[kind].itemsize
    if destination[0] == "{":
        value, pieces = m.read(source, f"b{bits}"), parts(destination)
        width = bits // len(pieces)
        writes = [m.writer(piece, f"b{width}") for piece in pieces]

        def unpack(mask):
            for j, write in enumerate(writes):
                write((value >> value.dtype.type(j * width)).astype(TYPES[f"b{width}"]), mask)

        return unpack
    write = m.writer(destination, kind)
    if source[0] == "{":
        pieces = parts(source)
        width, whole = bits // len(pieces), TYPES[f"b{bits}"]
        values = [m.read(piece, f"b{width}") for piece in pieces]

        def pack(mask):
            packed = [value.astype(whole) << whole.type(j * width) for j, value in enumerate(values)]
            write(np.bitwise_or.reduce(packed), mask)

        return pack
    value = m.read(source, kind)
    return lambda mask: write(value, mask)


def _bits(kind: str) -> str:
    """What memory holds of a floating-point number."""
    return kind.replace("f", "b")


def _parameter(m, i, found):
    """Of one to four elements, of a parameter by its name or at an address that is the same in all lanes."""
    kind, count = _bits(found["t"]), int(found["count"] or 1)
    base, _, offset = i.operands[1].strip("[]").partition("+")
    named = base in m.parameters
    space = m.parameters[base] if named else b"".join(m.parameters.values())
    at = None if named else m.read(base, "b64")
    registers = [m.registers[r] for r in parts(i.operands[0])]
    width = TYPES[kind].itemsize

    def load(mask):
        addresses = np.unique(at[mask]) if at is not None else [0]
        assert len(addresses) == 1, f"{i}: a parameter for each lane"
        start = int(addresses[0]) + int(offset or 0)
        values = np.frombuffer(space[start : start + count * width], TYPES[kind])
        for j, register in enumerate(registers):
            register[mask] = _extended(values[j : j + 1], kind, register)

    return load


def _extended(value: np.ndarray, kind: str, register: np.ndarray) -> np.ndarray:
    """As a register wider than the value holds it: by its sign, or with zeros."""
    return value.view(TYPES[kind]).astype(register.dtype)


def _load(m, i, found):
    """Of one to four elements."""
    kind, targets = _bits(found["t"]), parts(i.operands[0])
    width, count = TYPES[kind].itemsize, int(found["count"] or 1)
    assert len(targets) == count
    registers = [None if r == "_" else m.registers[r] for r in targets]
    at = place(m, i, i.operands[1], found["space"], width * count)

    def load(mask):
        lanes = np.flatnonzero(mask)
        offsets = at(lanes)
        if found["space"] == "shared":
            m.shared.reads(offsets, width * count, lanes, i)
            values = m.shared.load(offsets, width, count, i)
        else:
            m.history.note(offsets, width * count, lanes, i, writes=False)
            values = m.memory.load(offsets, width, count, i)
        for register, value in zip(registers, values):
            if register is not None:
                register[lanes] = _extended(value, kind, register)

    return load


def _store(m, i, found):
    kind, sources = _bits(found["t"]), parts(i.operands[1])
    width, count = TYPES[kind].itemsize, int(found["count"] or 1)
    assert len(sources) == count
    # Of a wider register the low bits.
    values = [m.registers[source] if source in m.registers else m.read(source, kind) for source in sources]
    at = place(m, i, i.operands[0], found["space"], width * count)

    def store(mask):
        lanes = np.flatnonzero(mask)
        offsets = at(lanes)
        stored = [(value[lanes] if value.shape else np.full(len(lanes), value)).astype(UINT[width]) for value in values]
        if found["space"] == "shared":
            m.shared.writes(offsets, width * count, lanes, i)
            m.shared.store(offsets, width, stored, i)
        else:
            m.history.note(offsets, width * count, lanes, i, writes=True)
            m.memory.store(offsets, width, stored, i)

    return store


def place(m, i, operand: str, space: str, length: int) -> Callable[[np.ndarray], np.ndarray]:
    address = m.address(operand, "b32" if space == "shared" else "b64")
    if space == "shared":
        return lambda lanes: m.shared.offsets(address(lanes), m.program[lanes], length, i)
    return lambda lanes: address(lanes) - Global.BASE


class Copies:
    """cp.async: copies that arrive at some time up to the wait for their group, which each thread does for itself."""

    def __init__(self, m):
        self.m = m
        self.groups = np.zeros(len(m.thread), np.int64)  # that each thread has committed
        self.pending: list[tuple] = []  # lanes, their group, where to, the data, the instruction

    def start(self, i, found):
        """cp.async to, from, bytes, bytes to read: what is not read becomes 0."""
        m, length = self.m, int(i.operands[2], 0)
        to, source = place(m, i, i.operands[0], "shared", length), place(m, i, i.operands[1], "global", length)
        size = m.read(i.operands[3], "b32") if len(i.operands) > 3 else np.full(len(m.thread), length)
        assert length == 16 or found["cache"] == "ca"

        def start(mask):
            lanes = np.flatnonzero(mask)
            if not np.isin(size[lanes], (0, length)).all():
                raise Fault(f"{i}: reads a part of its {length} bytes")
            reading = lanes[size[lanes] > 0]
            data = np.zeros((len(lanes), length // 4), np.uint32)
            offsets = source(reading)
            m.history.note(offsets, length, reading, i, writes=False)
            data[size[lanes] > 0] = np.stack(m.memory.load(offsets, 4, length // 4, i), 1)
            at = to(lanes)
            m.shared.writes(at, length, lanes, i)
            m.shared.store(at, 4, list(data.T), i)
            self._mark(at, length, IN_FLIGHT)
            self.pending.append((lanes, self.groups[lanes].copy(), at, length, i))

        return start

    def commit(self, i, found):
        def commit(mask):
            self.groups[mask] += 1

        return commit

    def wait(self, i, found):
        """wait_group n: all but the thread's last n groups have arrived; wait_all: also what is in none yet."""
        everything = i.opcode == "cp.async.wait_all"
        left = 0 if everything else int(i.operands[0], 0)

        def wait(mask):
            pending, self.pending = self.pending, []
            for lanes, group, at, length, copy in pending:
                done = mask[lanes] & (everything | (group < self.groups[lanes] - left))
                self._mark(at[done], length, WRITTEN)
                # The thread sees them, others do after a barrier.
                self.m.shared.writes(at[done], length, lanes[done], copy)
                if not done.all():
                    self.pending.append((lanes[~done], group[~done], at[~done], length, copy))

        return wait

    def _mark(self, at: np.ndarray, length: int, state: int) -> None:
        self.m.shared.state[at[:, None] + np.arange(length)] = state


def _shuffle(m, i, found):
    destination, source, other, *whole = i.operands
    destination, _, inside = destination.partition("|")
    value, other, write = m.read(source, "b32"), m.read(other, "b32"), m.writer(destination, "b32")
    clamp, members = (m.read(operand, "b32") for operand in whole)
    lane, within = m.thread % WARP, m.writer(inside or "_", "pred")

    def shuffle(mask):
        m.whole_warps(mask, i)
        for given, needed in ((clamp, 31), (members, 0xFFFFFFFF)):
            if not np.all(np.broadcast_to(given, mask.shape)[mask] == needed):
                raise NotImplementedError(f"{i}: only shuffles of whole warps")
        source = lane ^ other if found["how"] == "bfly" else other
        write(value[m.thread - lane + (source & 31).astype(np.int64)], mask)
        within(np.bool_(True), mask)  # the source is a lane of the warp

    return shuffle


REDUCTIONS = {"add": np.add, "min": np.minimum, "max": np.maximum}


def _reduce(m, i, found):
    destination, source, members = i.operands
    kind, reduction = found["t"], REDUCTIONS[found["how"]]
    value, members, write = m.read(source, kind), m.read(members, "b32"), m.writer(destination, kind)

    def reduce(mask):
        m.whole_warps(mask, i)
        if not np.all(np.broadcast_to(members, mask.shape)[mask] == 0xFFFFFFFF):
            raise NotImplementedError(f"{i}: only reductions of whole warps")
        of_warps = reduction.reduce(np.broadcast_to(value, mask.shape).reshape(-1, WARP), axis=1, dtype=TYPES[kind])
        write(np.repeat(of_warps, WARP), mask)

    return reduce


def _warp_barrier(m, i, found):
    if i.operands not in (("-1",), ("0xffffffff",)):
        raise NotImplementedError(f"{i}: only barriers of whole warps")
    return lambda mask: m.shared.warp_barrier(m.whole_warps(mask, i))


def _load_matrices(m, i, found):
    """ldmatrix: lanes 8 j to 8 j + 7 name the rows of 16 bytes of matrix j; lane l gets elements 2 l and 2 l + 1 of each."""
    count, transposed = int(found["count"]), found["trans"]
    writes = [m.writer(r, "b32") for r in parts(i.operands[0])]
    assert len(writes) == count
    at = place(m, i, i.operands[1], "shared", 16)

    def load(mask):
        warps = m.whole_warps(mask, i)
        naming = (warps[:, None] * WARP + np.arange(8 * count)).reshape(-1)
        offsets = at(naming)
        m.shared.reads(offsets, 16, naming, i)
        matrices = np.stack(m.shared.load(offsets, 2, 8, i), 1)
        matrices = matrices.reshape(len(warps), count, 8, 8).astype(np.uint32)
        if transposed:
            matrices = matrices.swapaxes(2, 3)
        pairs = matrices.reshape(len(warps), count, WARP, 2)
        value = np.zeros((len(m.thread) // WARP, WARP), np.uint32)
        for j, write in enumerate(writes):
            value[warps] = pairs[:, j, :, 0] | pairs[:, j, :, 1] << np.uint32(16)
            write(value.reshape(-1), mask)

    return load


def _store_matrices(m, i, found):
    """stmatrix: ldmatrix the other way."""
    count, transposed = int(found["count"]), found["trans"]
    values = [m.read(r, "b32") for r in parts(i.operands[1])]
    assert len(values) == count
    at = place(m, i, i.operands[0], "shared", 16)

    def store(mask):
        warps = m.whole_warps(mask, i)
        naming = (warps[:, None] * WARP + np.arange(8 * count)).reshape(-1)
        offsets = at(naming)
        m.shared.writes(offsets, 16, naming, i)
        pairs = np.stack([value.reshape(-1, WARP)[warps] for value in values], 1)
        matrices = pairs.view(np.uint16).reshape(-1, 8, 8)
        if transposed:
            matrices = matrices.swapaxes(1, 2)
        m.shared.store(offsets, 2, list(matrices.reshape(len(naming), 8).T), i)

    return store


def _elect(m, i, found):
    """One lane of the warp, the same every time; PTX leaves open which. The last one, so that nothing can rely on the first."""
    lane, predicate = i.operands[0].split("|")
    if i.operands[1] not in ("-1", "0xffffffff"):
        raise NotImplementedError(f"{i}: only elections by whole warps")
    write_lane, write_predicate = m.writer(lane, "b32"), m.writer(predicate, "pred")
    last = np.full(len(m.thread), WARP - 1, np.uint32)

    def elect(mask):
        m.whole_warps(mask, i)
        write_lane(last, mask)
        write_predicate(m.thread % WARP == WARP - 1, mask)

    return elect


def _multiply(m, i, found):
    """mma.m16n8k16 of 16-bit types and m16n8k8 of tf32, into float32."""
    kind, k = found["kind"], int(found["k"])
    assert k == (8 if kind == "tf32" else 16)
    a, b, c = ([m.read(r, "b32") for r in parts(operand)] for operand in i.operands[1:])
    writes = [m.writer(r, "f32") for r in parts(i.operands[0])]

    def multiply(mask):
        m.whole_warps(mask, i)
        B = _fragment(b, kind, (k, 8), lambda j, g, q: (q + k // 2 * j, g))
        write_sums(writes, left_matrix(a, kind) @ B + sums_in(c), mask)

    return multiply


def left_matrix(registers: list[np.ndarray], kind: str) -> np.ndarray:
    """A, [warp, 16, k], of the four registers of each lane."""
    k = 8 if kind == "tf32" else 16
    return _fragment(registers, kind, (16, k), lambda j, g, q: (g + 8 * (j % 2), q + k // 2 * (j // 2)))


def _fragment(registers: list[np.ndarray], kind: str, shape: tuple[int, int], where: Callable) -> np.ndarray:
    """[warp, *shape], of registers with an element of TF32 each or two neighbours along k. ``where`` register j of a lane has its
    first, by g = lane / 4 and q, which counts elements in the first half of k."""
    matrix = np.empty((len(registers[0]) // WARP, *shape), np.float32)
    g, q = LANE // 4, LANE % 4
    for j, register in enumerate(registers):
        register = register.reshape(-1, WARP)
        if kind == "tf32":
            matrix[(slice(None), *where(j, g, q))] = from_bits(register, kind)
            continue
        for half in (0, 1):
            bits = (register >> np.uint32(16 * half)).astype(np.uint16)
            matrix[(slice(None), *where(j, g, 2 * q + half))] = from_bits(bits, kind)
    return matrix


def _place_of_sum(j: int) -> tuple:
    """Of the j-th register of a lane in the sums of a warp, [warp, 16, n]."""
    return slice(None), LANE // 4 + 8 * (j % 4 // 2), 8 * (j // 4) + 2 * (LANE % 4) + j % 2


def sums_in(registers: list[np.ndarray]) -> np.ndarray:
    sums = np.empty((len(registers[0]) // WARP, 16, 2 * len(registers)), np.float32)
    for j, register in enumerate(registers):
        sums[_place_of_sum(j)] = register.view(np.float32).reshape(-1, WARP)
    return sums


def write_sums(writes: list[Callable], sums: np.ndarray, mask: np.ndarray) -> None:
    for j, write in enumerate(writes):
        write(sums[_place_of_sum(j)].reshape(-1), mask)


def _atomic_add(m, i, found):
    """atom.add of 32-bit integers; it orders other programs unless it is relaxed or of one program's scope."""
    write = m.writer(i.operands[0], "b32")
    at, value = place(m, i, i.operands[1], "global", 4), m.read(i.operands[2], "b32")
    order = found["order"] if found["scope"] != "cta" else "relaxed"

    def add(mask):
        before = np.zeros(len(m.thread), np.uint32)
        for lane in np.flatnonzero(mask):
            one = np.array([lane])
            offsets = at(one)
            (before[lane],) = m.memory.load(offsets, 4, 1, i)[0]
            added = before[one] + (value[one] if value.shape else value)
            m.memory.store(offsets, 4, [added.astype(np.uint32)], i)
            m.history.note(offsets, 4, one, i, writes=True, atomic=True)
            m.history.synchronise(
                int(offsets[0]), int(lane), order in ("acquire", "acq_rel"), order in ("release", "acq_rel")
            )
        write(before, mask)
        m.atomics += 1

    return add


def _acquire(m, i, found):
    """A load that sees what was released before what it reads was written."""
    at, write = place(m, i, i.operands[1], "global", 4), m.writer(i.operands[0], "b32")

    def load(mask):
        lanes = np.flatnonzero(mask)
        offsets, values = at(lanes), np.zeros(len(m.thread), np.uint32)
        (values[lanes],) = m.memory.load(offsets, 4, 1, i)
        m.history.note(offsets, 4, lanes, i, writes=False, atomic=True)
        for offset, lane in zip(offsets, lanes):
            m.history.synchronise(int(offset), int(lane), acquires=True, releases=False)
        m.polled[mask] = m.atomics
        write(values, mask)

    return load


def _generic(m, i, found):
    """cvta: from a space of addresses to that of all, or back. Tensors have the same in both."""
    write = m.writer(i.operands[0], "u64")
    if i.operands[1] == m.kernel.shared or found["space"] == "shared":
        source, base = m.read(i.operands[1], "u64"), np.uint64(Shared.WINDOW)
        return lambda mask: write(source - base if found["back"] else source + base, mask)
    source = m.read(i.operands[1], "u64")
    return lambda mask: write(source, mask)


def _copies(method: str):
    return lambda m, i, found: getattr(m.copies, method)(i, found)


SPACE = r"(?P<space>global|shared)(?:::cta)?"
VECTOR = r"(?:\.v(?P<count>2|4))?"
MADE = {
    r"mov\.(?P<t>pred|[bsu](?:16|32|64)|f32|f64)": _move,
    rf"ld\.param{VECTOR}\.(?P<t>[bsu](?:8|32|64)|f32)": _parameter,
    rf"ld\.{SPACE}(?:\.c[ag])?{VECTOR}\.(?P<t>[bsu](?:8|16|32|64)|f32)": _load,
    rf"st\.{SPACE}{VECTOR}\.(?P<t>[bsu](?:8|16|32|64)|f32)": _store,
    r"ld\.acquire\.gpu\.u32": _acquire,
    r"cvta\.(?P<back>to\.)?(?P<space>global|shared)\.u64": _generic,
    r"cp\.async\.(?P<cache>c[ag])\.shared\.global": _copies("start"),
    r"cp\.async\.commit_group": _copies("commit"),
    r"cp\.async\.(?:wait_group|wait_all)": _copies("wait"),
    r"shfl\.sync\.(?P<how>bfly|idx)\.b32": _shuffle,
    r"redux\.sync\.(?P<how>add|min|max)\.(?P<t>[su]32)": _reduce,
    r"bar\.warp\.sync": _warp_barrier,
    r"ldmatrix\.sync\.aligned\.m8n8\.x(?P<count>1|2|4)(?P<trans>\.trans)?\.shared\.b16": _load_matrices,
    r"stmatrix\.sync\.aligned\.m8n8\.x(?P<count>1|2|4)(?P<trans>\.trans)?\.shared\.b16": _store_matrices,
    r"elect\.sync": _elect,
    r"mma\.sync\.aligned\.m16n8k(?P<k>8|16)\.row\.col\.f32\.(?P<kind>f16|bf16|tf32)\.(?P=kind)\.f32": _multiply,
    r"atom\.global\.(?P<scope>cta|gpu|sys)\.(?P<order>relaxed|acquire|release|acq_rel)\.add\.u32": _atomic_add,
    # Of an address that may be of any space, and here is of a tensor.
    r"atom\.add\.(?P<order>relaxed|acquire|release|acq_rel)\.(?P<scope>gpu)\.u32": _atomic_add,
}

step = by_pattern(MADE)

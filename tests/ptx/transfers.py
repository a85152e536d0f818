"""Hopper's copies of tiles (TMA) by tensor map, and the mbarriers that count their bytes.

A copy arrives as late as it can: when threads wait for a phase of its mbarrier, and then one by one, until that phase is over.
Until a thread has waited for it, what it writes must not be touched.
"""

from dataclasses import dataclass, field

import numpy as np

from .exchange import by_pattern, place
from .memory import BARRIER, IN_FLIGHT, SEVERAL, UNWRITTEN, Fault, Global
from .parse import Instruction, listed
from .products import swizzled

# How far above the addresses of parameters are those that cvta makes of them.
GENERIC = 1 << 40


@dataclass(frozen=True)
class TensorMap:
    """What cuTensorMapEncodeTiled makes of these; dimensions from the innermost on. Without interleaving and element strides,
    outside of the tensor are zeros."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in bytes, but for the first dimension, whose elements lie side by side
    box: tuple[int, ...]  # elements of a copy
    width: int  # bytes of an element
    line: int  # bytes of a swizzle's lines

    def __post_init__(self):
        """Refused as by the driver."""
        inner = self.box[0] * self.width
        allowed = {
            "an address on 16 bytes": self.address % 16 == 0,
            "strides in steps of 16 bytes": all(0 < s < 1 << 40 and s % 16 == 0 for s in self.strides),
            "1 to 5 dimensions": len(self.shape) == len(self.box) == len(self.strides) + 1 <= 5,
            "sizes of 1 to 2^32": all(0 < n <= 1 << 32 for n in self.shape),
            "boxes of 1 to 256": all(0 < n <= 256 for n in self.box),
            "lines of 16 bytes up to the swizzle's": inner % 16 == 0 and inner <= self.line,
        }
        if wrong := [what for what, right in allowed.items() if not right]:
            raise Fault(f"a tensor map needs {', '.join(wrong)}: {self}")
        if inner != self.line:
            raise NotImplementedError(f"boxes narrower than the lines of their swizzle: {self}")

    @property
    def bytes(self) -> int:
        return int(np.prod(self.box)) * self.width

    def addresses(self, first: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Of the elements of a copy from these coordinates on, the first dimension fastest; and which are in the tensor."""
        at, inside = np.int64(self.address), np.bool_(True)
        for dimension, step in reversed(list(enumerate((self.width, *self.strides)))):
            index = first[dimension] + np.arange(self.box[dimension])
            at = np.add.outer(at, index * step)
            inside = np.logical_and.outer(inside, (index >= 0) & (index < self.shape[dimension]))
        return at.reshape(-1), inside.reshape(-1)


@dataclass
class Copy:
    at: np.ndarray  # offsets in shared memory, 16 bytes each
    bytes: int
    waited: np.ndarray  # which threads of the program know that it has arrived
    phase: int | None = None  # of the mbarrier in which it arrived


@dataclass
class Barrier:
    count: int  # of arrivals in a phase
    program: int
    pending: int  # arrivals that are missing
    bytes: int = 0  # that are missing
    phase: int = 0  # how many are over
    copies: list[Copy] = field(default_factory=list)

    def over(self, parity: int) -> bool:
        """Whether the last phase of this parity is, if need be once another copy has arrived."""
        for copy in self.on_their_way():
            if self.phase % 2 != parity:
                break
            copy.phase, self.bytes = self.phase, self.bytes - copy.bytes
            self.settle()
        return self.phase % 2 != parity

    def on_their_way(self) -> list[Copy]:
        return [copy for copy in self.copies if copy.phase is None]

    def settle(self) -> None:
        """Begins the next phase where nothing is missing in this one."""
        if not self.pending and not self.bytes:
            self.phase, self.pending = self.phase + 1, self.count


class Transfers:
    def __init__(self, m):
        self.m = m
        self.barriers: dict[int, Barrier] = {}  # by offset in shared memory

    def _each(self, i: Instruction, operand: str, do):
        """Does (barrier, lane) in every lane of the mask, of which there are few."""
        at = place(self.m, i, operand, "shared", 8)

        def step(mask):
            lanes = np.flatnonzero(mask)
            for lane, offset in zip(lanes, at(lanes)):
                do(self._barrier(offset, np.array([lane]), i), lane)

        return step

    def _barrier(self, offset: int, lanes: np.ndarray, i: Instruction) -> Barrier:
        if offset not in self.barriers:
            raise Fault(f"{i}: no mbarrier is there")
        self.m.shared.touches(np.full(len(lanes), offset), 8, lanes, i)
        return self.barriers[offset]

    def init(self, i, found):
        m, at, count = self.m, place(self.m, i, i.operands[0], "shared", 8), int(i.operands[1], 0)

        def init(mask):
            lanes = np.flatnonzero(mask)
            offsets = at(lanes)
            m.shared.writes(offsets, 8, lanes, i)
            m.shared.store(offsets, 8, [np.zeros(len(lanes), np.uint64)], i)
            m.shared.state[offsets[:, None] + np.arange(8)] = BARRIER
            for lane, offset in zip(lanes, offsets):
                self.barriers[offset] = Barrier(count, m.program[lane], count)

        return init

    def invalidate(self, i, found):
        m, at = self.m, place(self.m, i, i.operands[0], "shared", 8)

        def invalidate(mask):
            lanes = np.flatnonzero(mask)
            for lane, offset in zip(lanes, at(lanes)):
                barrier = self._barrier(offset, np.array([lane]), i)
                if barrier.on_their_way() or m.blocked[m.program == barrier.program].any():
                    raise Fault(f"{i}: copies are on their way to this mbarrier, or threads wait for it")
                del self.barriers[offset]
                m.shared.writes(np.array([offset]), 8, np.array([lane]), i)
                m.shared.state[offset : offset + 8] = UNWRITTEN

        return invalidate

    def arrive(self, i, found):
        """arrive.expect_tx: so many bytes more are to come in this phase, and one arrival less."""
        if i.operands[0] != "_":
            raise NotImplementedError(f"{i}: the state of an mbarrier")
        expected = int(i.operands[2], 0)

        def arrive(barrier, lane):
            if not barrier.pending:
                raise Fault(f"{i}: arrives once more than the mbarrier counts")
            barrier.bytes, barrier.pending = barrier.bytes + expected, barrier.pending - 1
            barrier.settle()
            self._wake(barrier)

        return self._each(i, i.operands[1], arrive)

    def _wake(self, barrier: Barrier) -> None:
        self.m.blocked[self.m.program == barrier.program] = False

    def wait(self, i, found):
        """try_wait.parity: true once the phase is over. Where it is not, the thread tries again after the next arrival."""
        m = self.m
        done, parity = m.writer(i.operands[0], "pred"), m.read(i.operands[2], "b32")
        at = place(m, i, i.operands[1], "shared", 8)

        def wait(mask):
            lanes = np.flatnonzero(mask)
            offsets, parities = at(lanes), np.broadcast_to(parity, mask.shape)[lanes]
            for offset, wanted in {(o, p) for o, p in zip(offsets.tolist(), parities.tolist())}:
                here = lanes[(offsets == offset) & (parities == wanted)]
                barrier = self._barrier(offset, here, i)
                if barrier.over(wanted):
                    self._arrived(barrier, here)
                else:
                    m.blocked[here] = True
                    m.pc[here] -= 1
            done(np.ones(len(mask), bool), mask)

        return wait

    def _arrived(self, barrier: Barrier, lanes: np.ndarray) -> None:
        """What these threads have waited for is there, for them."""
        for copy in barrier.copies:
            if copy.phase is not None and copy.phase < barrier.phase:
                copy.waited[lanes % self.m.threads] = True
                some = lanes[0] if copy.waited.sum() == 1 else SEVERAL
                self.m.shared.arrived(copy.at, 16, None if copy.waited.all() else some)
        barrier.copies = [copy for copy in barrier.copies if not copy.waited.all()]

    def barrier(self, programs: np.ndarray) -> None:
        """After a barrier of these programs all of their threads know what one has known."""
        for barrier in self.barriers.values():
            if barrier.program in programs:
                barrier.copies = [copy for copy in barrier.copies if not copy.waited.any()]

    def copy(self, i, found):
        """cp.async.bulk.tensor to shared memory, a copy by each lane of the mask, of which there are few."""
        m = self.m
        tensor_map, coordinates = listed(i.operands[1].strip("[]"))
        to, describes = m.address(i.operands[0], "b32"), m.address(tensor_map, "b64")
        mbarrier = place(m, i, i.operands[2], "shared", 8)
        first = [m.read(r, "s32") for r in coordinates.strip("{}").split(",")]

        def copy(mask):
            for lane in np.flatnonzero(mask):
                one = np.array([lane])
                described = m.tensor_maps.get(int(describes(one)[0]))
                if described is None or len(described.box) != int(found["dimensions"]):
                    raise Fault(f"{i}: no tensor map of {found['dimensions']} dimensions is there")
                self._copy(
                    i, lane, described, int(to(one)[0]), tuple(int(c[lane] if c.shape else c) for c in first),
                    self._barrier(mbarrier(one)[0], one, i),
                )  # fmt: skip

        return copy

    def _copy(self, i, lane: int, described: TensorMap, to: int, first: tuple[int, ...], barrier: Barrier) -> None:
        m, one = self.m, np.array([lane])
        if to % 128:
            raise Fault(f"{i}: misaligned, a copy to {to:#x} and not to a multiple of 128")
        addresses, inside = described.addresses(first)
        data = np.zeros(len(addresses), f"u{described.width}")
        read = addresses[inside] - Global.BASE
        m.history.note(read, described.width, np.full(len(read), lane), i, writes=False)
        (data[inside],) = m.memory.load(read, described.width, 1, i)
        lines = data.reshape(-1, described.box[0]).view(np.uint8).reshape(-1, 16)
        at = swizzled(to + 16 * np.arange(len(lines)), described.line)
        at = m.shared.offsets(at, m.program[one].repeat(len(lines)), 16, i)
        m.shared.writes_by_proxy(at, 16, one.repeat(len(lines)), i)
        m.shared.store(at, 4, list(np.ascontiguousarray(lines).view(np.uint32).T), i)
        m.shared.state[at[:, None] + np.arange(16)] = IN_FLIGHT
        barrier.copies.append(Copy(at, described.bytes, np.zeros(m.threads, bool)))
        self._wake(barrier)

    def end(self) -> None:
        for barrier in self.barriers.values():
            if barrier.on_their_way():
                raise Fault("a program ends while copies to its shared memory are on their way")

    def fence(self, i, found):
        m = self.m

        def fence(mask):
            programs = mask.reshape(-1, m.threads)
            if (programs.any(1) != programs.all(1)).any():
                raise NotImplementedError(f"{i}: by some threads of a program")
            m.shared.fence(np.flatnonzero(programs.any(1)))

        return fence


def _address_of_parameter(m, i, found):
    value, write = m.read(i.operands[1], "b64"), m.writer(i.operands[0], "b64")
    return lambda mask: write(value + np.uint64(GENERIC), mask)


def _of_transfers(method: str):
    return lambda m, i, found: getattr(m.transfers, method)(i, found)


step = by_pattern(
    {
        r"cvta\.param\.u64": _address_of_parameter,
        r"fence\.proxy\.async\.shared::cta": _of_transfers("fence"),
        r"mbarrier\.init\.shared::cta\.b64": _of_transfers("init"),
        r"mbarrier\.inval\.shared::cta\.b64": _of_transfers("invalidate"),
        r"mbarrier\.arrive\.expect_tx\.shared::cta\.b64": _of_transfers("arrive"),
        r"mbarrier\.try_wait\.parity\.shared::cta\.b64": _of_transfers("wait"),
        r"cp\.async\.bulk\.tensor\.(?P<dimensions>[1-5])d\.shared::cta\.global\.mbarrier::complete_tx::bytes": _of_transfers(
            "copy"
        ),
    }
)

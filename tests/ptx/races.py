"""Races in global memory: two accesses to one place, one of them a write, that nothing orders.

Within a program barriers order: what lies between two of them is an epoch. Between programs only an atomic orders, and only
what the epochs before it hold: a release publishes them, an acquire makes them known from the program's next epoch on. That is
less than PTX grants a thread on its own, and what code that several threads share must keep to.
"""

from dataclasses import dataclass

import numpy as np

from .memory import Fault
from .parse import Instruction

# Threads are told apart in units of 2 bytes, the shortest that anything is stored in.
GRANULE = 2


@dataclass
class Access:
    at: np.ndarray  # offsets
    length: int  # bytes at each
    thread: np.ndarray
    epoch: np.ndarray  # of each program then
    known: np.ndarray  # [program, other]: the first epoch of the other that is not known to be over
    writes: bool
    atomic: bool
    instruction: Instruction


class History:
    """Every access to global memory, in the order in which they were simulated, on which no verdict depends."""

    def __init__(self, programs: int, threads: int):
        self.threads = threads
        self.epoch = np.zeros(programs, np.int64)
        self.known = np.zeros((programs, programs), np.int64)
        self.acquired = np.zeros((programs, programs), np.int64)
        self.published: dict[int, np.ndarray] = {}  # by the offset of an atomic
        self.accesses: list[Access] = []

    def barrier(self, programs: np.ndarray) -> None:
        self.epoch = self.epoch.copy()
        self.epoch[programs] += 1
        if (self.acquired[programs] > self.known[programs]).any():
            self.known = self.known.copy()
            self.known[programs] = np.maximum(self.known[programs], self.acquired[programs])

    def note(self, at, length: int, thread, i: Instruction, writes: bool, atomic: bool = False) -> None:
        self.accesses.append(Access(at, length, thread, self.epoch, self.known, writes, atomic, i))

    def synchronise(self, offset: int, thread: int, acquires: bool, releases: bool) -> None:
        """By an atomic at an offset."""
        program = thread // self.threads
        there = self.published.setdefault(offset, np.zeros_like(self.epoch))
        if acquires:
            self.acquired[program] = np.maximum(self.acquired[program], there)
        if releases:
            mine = self.known[program].copy()
            mine[program] = self.epoch[program]
            self.published[offset] = np.maximum(there, mine)

    def check(self, size: int) -> None:
        """Of the whole launch, in a memory of this size."""
        written = np.zeros(-(-size // GRANULE) + 8, bool)
        for a in self.accesses:
            if a.writes:
                assert a.length >= GRANULE, f"{a.instruction}: shorter than the places that are told apart"
                written[self._granules(a)] = True
        kept = [(a, granules) for a in self.accesses if written[granules := self._granules(a)].any()]
        if not kept:
            return
        granule = np.concatenate([g.reshape(-1) for _, g in kept])
        index = np.repeat(np.arange(len(kept)), [g.size for _, g in kept])
        thread = np.concatenate([np.repeat(a.thread, g.shape[1]) for a, g in kept])
        order = np.argsort(granule, kind="stable")
        granule, index, thread = granule[order], index[order], thread[order]
        starts = np.flatnonzero(np.r_[True, granule[1:] != granule[:-1]])
        group = np.cumsum(np.r_[0, granule[1:] != granule[:-1]])
        writes = np.array([a.writes for a, _ in kept])[index]
        # The first write to each place beside all accesses to it, then the second write, and so on.
        rank = np.cumsum(writes) - (np.cumsum(writes) - writes)[starts][group]
        for nth in range(1, int(rank.max(initial=0)) + 1):
            write = np.full(len(starts), -1)
            is_nth = writes & (rank == nth)
            write[group[is_nth]] = np.flatnonzero(is_nth)
            other = np.flatnonzero(write[group] >= 0)
            one = write[group[other]]
            pairs = thread[one] != thread[other]
            self._unordered(kept, index, thread, one[pairs], other[pairs])

    def _granules(self, a: Access) -> np.ndarray:
        return a.at[:, None] // GRANULE + np.arange(max(1, a.length // GRANULE))

    def _unordered(self, kept, index, thread, one, other) -> None:
        pairs = np.unique(np.stack([index[one], thread[one], index[other], thread[other]]), axis=1)
        for first, second in {(int(a), int(b)) for a, b in zip(pairs[0], pairs[2])}:
            a, b = kept[first][0], kept[second][0]
            if a.atomic and b.atomic:
                continue
            here = (pairs[0] == first) & (pairs[2] == second)
            p, q = pairs[1, here] // self.threads, pairs[3, here] // self.threads
            together = (p == q) & (a.epoch[p] == b.epoch[q])
            unknown = (p != q) & (b.known[q, p] <= a.epoch[p]) & (a.known[p, q] <= b.epoch[q])
            if (together | unknown).any():
                what = "no barrier between" if together.any() else "of another program, that no atomic orders"
                raise Fault(f"{a.instruction} writes what {b.instruction} {'writes' if b.writes else 'reads'}, {what}")

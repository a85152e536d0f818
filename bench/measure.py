"""Time and peak memory of one call, and of many calls in turn.

An action is a function of one argument, `lap`, that it may call to end one part of its work and begin the next: a
training step calls it between forward and backward. It returns the tensors it made.
"""

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Action = Callable[[Callable[[], None]], list[Tensor]]

# A short call is repeated within its turn, until the turn has lasted this long, and the first repetition is dropped:
# what is measured is then the call, not the caches that another candidate left behind.
TURN_SECONDS = 2e-3
TURN_CALLS = 20
LEAST_SAMPLES, MAX_SAMPLES = 3, 100

# A call above this time is measured once.
LONG_CALL_SECONDS = 4.0
COLD_CACHE_BYTES = 256 << 20


@dataclass
class Observation:
    """What calls of one action showed: seconds of every lap, and peak bytes per lap beyond those before the call."""

    samples: list[list[float]]
    peaks: list[int] | None
    result_bytes: int

    @property
    def seconds(self) -> float:
        return sorted(sum(laps) for laps in self.samples)[len(self.samples) // 2]


def observe(action: Action, device: torch.device, warm_up: bool) -> tuple[Observation, list[Tensor]]:
    """One call, after one that does not count if ``warm_up``: its times and peak memory, and what it returned."""
    if warm_up:
        _call(action, device)
    memory = CudaMemory(device) if device.type == "cuda" else HostMemory()
    laps, results = _call(action, device, memory)
    return Observation([laps], memory.peaks, sum(t.nbytes for t in results)), results


def interleave(actions: dict[str, Action], seen: dict[str, Observation], budget: float, device: torch.device) -> None:
    """Calls the actions in turn, each until it has taken about ``budget`` seconds, and puts the samples into ``seen``.

    An action whose one observed call was long keeps that sample; the others get fresh ones.
    """
    seconds = {name: seen[name].seconds for name in actions}
    wanted = {name: _samples(seconds[name], budget) for name in actions if seconds[name] <= LONG_CALL_SECONDS}
    fresh = {name: [] for name in wanted}
    while wanted:
        for name in list(wanted):
            calls = int(min(TURN_CALLS, max(1, TURN_SECONDS / max(seconds[name], 1e-9))))
            laps = [_call(actions[name], device)[0] for _ in range(calls)]
            fresh[name] += laps[1:] if calls > 1 else laps
            if len(fresh[name]) >= wanted[name]:
                seen[name].samples = fresh[name]
                del wanted[name]


def _samples(seconds: float, budget: float) -> int:
    return int(min(MAX_SAMPLES, max(LEAST_SAMPLES, budget / max(seconds, 1e-9))))


def _call(action: Action, device: torch.device, memory=None) -> tuple[list[float], list[Tensor]]:
    """Seconds of every lap, and the results. On a GPU every call starts with a cold L2 cache."""
    if device.type == "cuda":
        torch.empty(COLD_CACHE_BYTES, dtype=torch.int8, device=device).zero_()
        torch.cuda.synchronize(device)
    clock = CudaClock() if device.type == "cuda" else HostClock()

    def lap():
        clock.stop()
        if memory:
            memory.lap()
        clock.start()

    if memory:
        memory.start()
    clock.start()
    results = action(lap)
    clock.stop()
    if memory:
        memory.lap()
    return clock.laps(), results


class HostClock:
    def __init__(self):
        self._laps = []

    def start(self) -> None:
        self._began = time.perf_counter()

    def stop(self) -> None:
        self._laps.append(time.perf_counter() - self._began)

    def laps(self) -> list[float]:
        return self._laps


class CudaClock:
    """Times the stream with events: launches that hide behind running kernels cost nothing, an idle stream does."""

    def __init__(self):
        self._events = []

    def start(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._events.append(event)

    stop = start

    def laps(self) -> list[float]:
        self._events[-1].synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in zip(self._events[::2], self._events[1::2])]


class HostMemory:
    """Peak resident memory in every lap, by Linux's high-water mark; ``peaks`` is None where it cannot be reset."""

    def __init__(self):
        self.peaks: list[int] | None = []

    def start(self) -> None:
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):  # what glibc keeps from earlier calls would hide what this one takes
            libc.malloc_trim(0)
        try:
            self._reset()
            self._base = _status("VmRSS")
        except OSError:
            self.peaks = None

    def lap(self) -> None:
        if self.peaks is not None:
            self.peaks.append(max(0, _status("VmHWM") - self._base))
            self._reset()

    def _reset(self) -> None:
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")


class CudaMemory:
    """Peak memory of torch's allocator in every lap."""

    def __init__(self, device: torch.device):
        self.peaks: list[int] = []
        self._device = device

    def start(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)
        self._base = torch.cuda.memory_allocated(self._device)

    def lap(self) -> None:
        self.peaks.append(torch.cuda.max_memory_allocated(self._device) - self._base)
        torch.cuda.reset_peak_memory_stats(self._device)


def available_memory(device: torch.device) -> int:
    """Bytes that a new allocation may take; where the system does not tell, none that could be exceeded."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as f:
            return next(int(line.split()[1]) << 10 for line in f if line.startswith("MemAvailable"))
    except OSError:
        return 1 << 62


def _status(key: str) -> int:
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) << 10 for line in f if line.startswith(key))

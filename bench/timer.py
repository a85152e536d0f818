"""The one timer: one call, or many calls in turn, with cold or warm caches, and the peak memory of a call.

An action is a function of one argument, `lap`, that it may call to end one part of its work and begin the next: a
training step calls it between forward and backward. It returns the tensors it made.
"""

import contextlib
import ctypes
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

Action = Callable[[Callable[[], None]], list[Tensor]]

# A short call is repeated within its turn, until the turn has lasted this long, and the first repetition is dropped:
# what is measured is then the call, not the caches that another candidate left behind.
TURN_SECONDS = 2e-3
TURN_CALLS = 20
LEAST_SAMPLES, MAX_SAMPLES = 3, 100

# A call above this time is measured once, and at once: that it finds fresh memory is a small part of it. Above the next, the
# state of the caches makes no difference to it.
LONG_CALL_SECONDS = 3.0
CACHED_SECONDS = 0.05
OTHER_SAMPLES = 3
CACHE_BYTES = {"cpu": 96 << 20, "cuda": 256 << 20}

ENERGY_SECONDS = 2.0


@dataclass
class Observation:
    """What calls of one action showed: seconds of every lap, and peak bytes per lap beyond those before the call.

    ``other`` has the samples with the other state of the caches: warm on a GPU, cold on a CPU.
    """

    samples: list[list[float]]
    peaks: list[int] | None
    result_bytes: int
    other: list[list[float]] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return sorted(sum(laps) for laps in self.samples)[len(self.samples) // 2]


def observe(action: Action, device: torch.device, warm_up: bool = True) -> tuple[Observation, list[Tensor]]:
    """One call, after one that does not count if ``warm_up``: its times and peak memory, and what it returned."""
    if warm_up:
        _call(action, device)
    memory = Memory(device)
    laps, results = _call(action, device, memory=memory)
    return Observation([laps], memory.peaks, sum(t.nbytes for t in results)), results


def first(action: Action, device: torch.device, warm_up: bool) -> tuple[Observation, list[Tensor]]:
    """One call that counts, after one that does not, unless the first is long and nobody asks for ``warm_up``."""
    if warm_up or (seen := observe(action, device, warm_up=False))[0].seconds < LONG_CALL_SECONDS:
        return observe(action, device, warm_up)
    return seen


def interleave(actions: dict[str, Action], seen: dict[str, Observation], budget: float, device: torch.device) -> None:
    """Calls the actions in turn, each until it has taken about ``budget`` seconds, and puts the samples into ``seen``.

    The one observed call of an action counts if caches make no difference to it, and is all of a long one. A GPU's calls start
    with a cold L2, a CPU's with what the call before left; short ones are then also called a few times the other way round.
    """
    cold = device.type == "cuda"
    seconds = {name: seen[name].seconds for name in actions}
    wanted = {name: _samples(seconds[name], budget) for name in actions if seconds[name] <= LONG_CALL_SECONDS}
    fresh = {name: seen[name].samples if seconds[name] > CACHED_SECONDS else [] for name in wanted}
    while wanted:
        for name in list(wanted):
            calls = int(min(TURN_CALLS, max(1, TURN_SECONDS / max(seconds[name], 1e-9))))
            laps = [_call(actions[name], device, cold)[0] for _ in range(calls)]
            fresh[name] += laps[1:] if calls > 1 else laps
            if len(fresh[name]) >= wanted[name]:
                seen[name].samples = fresh[name]
                del wanted[name]
    for _ in range(OTHER_SAMPLES):
        for name in fresh:
            if seconds[name] <= CACHED_SECONDS:
                if cold:
                    _call(actions[name], device, False)
                seen[name].other.append(_call(actions[name], device, not cold)[0])


def _samples(seconds: float, budget: float) -> int:
    return int(min(MAX_SAMPLES, max(LEAST_SAMPLES, budget / max(seconds, 1e-9))))


@functools.cache
def _cache(device: torch.device) -> Tensor:
    return torch.empty(CACHE_BYTES[device.type], dtype=torch.int8, device=device)


def _call(action: Action, device: torch.device, cold: bool = False, memory=None) -> tuple[list[float], list[Tensor]]:
    """Seconds of every lap, and the results; ``cold``: after something else has filled the caches.

    On a GPU events time the stream: launches that hide behind running kernels cost nothing, an idle stream does.
    """
    cuda, stamps = device.type == "cuda", []
    if cold:
        _cache(device).zero_()
    if cuda:
        torch.cuda.synchronize(device)

    def stamp():
        stamps.append(torch.cuda.Event(enable_timing=True) if cuda else time.perf_counter())
        if cuda:
            stamps[-1].record()

    def lap():
        stamp()
        if memory:
            memory.lap()
        stamp()

    if memory:
        memory.start()
    stamp()
    results = action(lap)
    stamp()
    if memory:
        memory.lap()
    if cuda:
        stamps[-1].synchronize()
    pairs = zip(stamps[::2], stamps[1::2])
    return [begin.elapsed_time(end) / 1e3 if cuda else end - begin for begin, end in pairs], results


def times(laps: list[list[float]], which: str = "train") -> dict:
    """Median and 20th to 80th percentile of a pass in seconds; the backward pass is the last lap of a training step."""
    seconds = [lap[-1] if which == "bwd" else sum(lap) for lap in laps]
    low, median, high = np.quantile(seconds, (0.2, 0.5, 0.8)).tolist()
    return {"median_s": median, "p20_s": low, "p80_s": high, "samples": len(seconds)}


@functools.cache
def capture_stream():
    """The one stream of all captures: autograd runs a backward pass on the stream of its forward pass, which has to be it."""
    return torch.cuda.Stream()


@contextlib.contextmanager
def on_capture_stream(device: torch.device):
    if device.type == "cpu":
        yield
        return
    capture_stream().wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(capture_stream()):
        yield
    torch.cuda.current_stream().wait_stream(capture_stream())


def capture(run: Callable[[], list[Tensor]], keep_graph: bool = False):
    """A CUDA graph of one call, and the tensors that a replay writes. ``keep_graph`` leaves it open to inspection."""
    with on_capture_stream(torch.device("cuda")):
        for _ in range(3):
            run()
    graph = torch.cuda.CUDAGraph(keep_graph=keep_graph)
    with torch.cuda.graph(graph, stream=capture_stream()):
        results = run()
    return graph, results


def energy(action: Action, device: torch.device) -> float | None:
    """Joules of a call, by the board's own counter over at least ENERGY_SECONDS; None where there is no such counter."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        read = functools.partial(pynvml.nvmlDeviceGetTotalEnergyConsumption, handle)
        read()
    except Exception:
        return None
    torch.cuda.synchronize()
    before, began, calls = read(), time.perf_counter(), 0
    while time.perf_counter() - began < ENERGY_SECONDS:
        action(lambda: None)
        torch.cuda.synchronize()
        calls += 1
    return (read() - before) / 1e3 / calls


class Memory:
    """Peak bytes in every lap beyond those before the call: of torch's allocator, or resident by Linux's high-water mark.

    ``peaks`` is None where that mark cannot be reset.
    """

    def __init__(self, device: torch.device):
        self.peaks: list[int] | None = []
        self._cuda = device if device.type == "cuda" else None

    def start(self) -> None:
        if self._cuda is None and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)  # what glibc keeps from earlier calls would hide what this one takes
        try:
            self._reset()
            self._base = torch.cuda.memory_allocated(self._cuda) if self._cuda else _status("VmRSS")
        except OSError:
            self.peaks = None

    def lap(self) -> None:
        if self.peaks is not None:
            peak = torch.cuda.max_memory_allocated(self._cuda) if self._cuda else _status("VmHWM")
            self.peaks.append(max(0, peak - self._base))
            self._reset()

    def _reset(self) -> None:
        if self._cuda:
            torch.cuda.reset_peak_memory_stats(self._cuda)
        else:
            Path("/proc/self/clear_refs").write_text("5")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))

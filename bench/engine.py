"""One turn: mechanisms in the same case, built, checked, and called in turn beside the anchors; a row for each pass.

A turn is a case with "names" to measure and "anchors" to measure them beside: Linear-InfSA, and what the machine needs at least.
Rows keep the anchors' medians, so that a ratio is one of calls in turn.
"""

import resource
import sys
import time

import torch

from . import gate, peers, timer
from .subject import PATCH, Subject

# What names a measurement.
IDENTITY = ("level", "device", "dtype", "layout", "batch", "depth", "dim", "pixels", "pass", "way", "name")
CASE = ("level", "device", "dtype", "layout", "batch", "depth", "dim", "pixels", "way")

# Passes that a phase gives: a training step is timed in two laps.
PASSES = {("fwd", "eager"): ("fwd",), ("train", "eager"): ("bwd", "train"), ("train", "graph"): ("bwd",)}

# A status that is no result.
OVER = {"status": "not reached", "reason": "the minutes were over"}

# Part of a turn's seconds after which nothing more is built: the rest is for calls in turn.
BUILDING = 0.7

_verdicts: dict[tuple, gate.Verdict | None] = {}


def passes(case: dict) -> tuple[str, ...]:
    return PASSES.get((case["phase"], case["way"])) or PASSES[case["phase"], "eager"]


def blank(case: dict, name: str, which: str) -> dict:
    """What is known of a row before it is measured."""
    known = {f: case.get(f) for f in CASE} | {"name": name, "label": peers.label(name), "pass": which}
    return known | {"N": (case["pixels"] // PATCH) ** 2}


def failure(error: Exception) -> dict:
    """Status and reason for a call that raised."""
    text = (str(error).strip().splitlines() or [""])[0]
    memory = (
        isinstance(error, torch.OutOfMemoryError | MemoryError)
        or "can't allocate memory" in text
        or "bad_alloc" in text
    )
    if memory:
        return {"status": "out of memory", "reason": text[:200]}
    return {"status": "unsupported", "reason": f"{type(error).__name__}: {text}"[:200]}


def measure(turn: dict, device: torch.device, budget: float, say=lambda name: None) -> list[dict]:
    """The rows of a turn; tells ``say`` the name of what is being built and checked, and None when calls in turn begin."""
    began, ready, rows = time.perf_counter(), {}, []
    if device.type == "cuda":
        torch.cuda.empty_cache()
    anchors = [name for name in turn["anchors"] if name not in turn["names"]]
    for name in (*anchors, *turn["names"]):
        if time.perf_counter() - began > BUILDING * turn.get("seconds", float("inf")):
            rows += [blank(turn, name, which) | OVER for which in passes(turn) if name in turn["names"]]
            continue
        say(name)
        case = turn | ({"way": "eager"} if name in anchors and turn["way"] == "compile" else {})
        try:
            ready[name] = _prepare(case, name, device)
        except Exception as error:
            found = failure(error)
        else:
            found = ready[name].facts
        if found.get("status") and name in turn["names"]:
            rows += [blank(turn, name, which) | found for which in passes(turn)]
    say(None)
    right = {name: it for name, it in ready.items() if not it.facts.get("status")}
    timer.interleave({n: it.action for n, it in right.items()}, {n: it.seen for n, it in right.items()}, budget, device)
    for name in (n for n in turn["names"] if n in right):
        rows += [right[name].row(which, right) for which in passes(turn)]
    for row in rows:
        row["turn_seconds"] = time.perf_counter() - began
    return rows


class _prepare:
    """A mechanism that has been checked and called once, ready to be called in turn: or ``facts`` with a status."""

    def __init__(self, case: dict, name: str, device: torch.device):
        if why := peers.of(name).unavailable(device):
            raise NotImplementedError(why)
        self.case, self.name, self.device = case, name, device
        self.subject = subject = Subject(case, name, device)
        function, self.limit = subject.function(), isinstance(subject.module, peers.machine.Limit)
        self.facts = {} if self.limit else {"parameters": sum(p.numel() for p in subject.parameters())}
        if (mechanism := subject.mechanism) and not self.limit:
            self.facts |= {"H": mechanism.num_heads, "d": mechanism.head_dim, "time": mechanism.TIME}
            self.facts |= {"state": mechanism.STATE, "state_size": mechanism.state_size(), "note": mechanism.NOTE}
            self.facts |= {"causal": mechanism.CAUSAL}
        if not self.limit:
            key = (name, *sorted((k, str(v)) for k, v in case.items() if k not in ("names", "anchors", "seconds")))
            if key not in _verdicts:
                _verdicts[key] = gate.examine(subject, function)
            verdict = _verdicts[key]
            self.facts |= verdict.row() if verdict else {"checked": "finite: float64 would take longer than the rest"}
            if mechanism is not None and mechanism.PLAIN:  # what the rule measures by is not judged by it
                self.facts = {k: v for k, v in self.facts.items() if k not in ("status", "reason")}
        if "status" in self.facts:
            return
        self.action = subject.action(function)
        warm_up = device.type == "cuda" or case["way"] == "compile"
        self.seen, results = timer.first(self.action, device, warm_up)
        if not self.limit and not all(t.isfinite().all() for t in results):
            self.facts |= {"status": "wrong", "reason": "not finite"}

    def row(self, which: str, turn: dict) -> dict:
        """The row of a pass beside the medians of whatever else was called in the turn."""
        seen, row = self.seen, blank(self.case, self.name, which) | self.facts | {"status": "ok"}
        row |= timer.times(seen.samples, which)
        if seen.other:
            cold = self.device.type == "cuda"
            row |= {"cold_s": row["median_s"], "warm_s": row["median_s"]}
            row["warm_s" if cold else "cold_s"] = timer.times(seen.other, which)["median_s"]
        if seen.peaks:
            row |= {
                "peak_bytes": seen.peaks[-1] if which == "bwd" else max(seen.peaks),
                "result_bytes": seen.result_bytes,
            }
        beside = {n: timer.times(it.seen.samples, "train" if it.limit else which)["median_s"] for n, it in turn.items()}
        row["beside"] = {n: s for n, s in beside.items() if n in self.case["anchors"] and n != self.name}
        mechanism = self.subject.mechanism
        limits = mechanism.limits(self.case, which) if mechanism else {}
        if limits and all(name in beside for name in limits):
            least = sum(count * beside[name] for name, count in limits.items())
            row |= {"limit": "+".join(limits), "share_of_limit": least / row["median_s"]}
        if self.limit and self.name.startswith("gemm"):
            row["flops_per_s"] = 2 * peers.machine.GEMM_SIZE[self.device.type] ** 3 / row["median_s"]
        if isinstance(mechanism, peers.InfSA):
            row |= self._rates(mechanism, which, row["median_s"])
        if self.case["level"] == "model":
            row["parts_s"] = dict(self.subject.parts)
            row["resident_bytes"] = (
                resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << (sys.platform != "darwin") * 10
            )
            if self.device.type == "cuda" and which == "fwd":
                row["joules"] = timer.energy(self.action, self.device)
        return row

    def _rates(self, mechanism, which: str, median: float) -> dict:
        """Bytes and operations of a pass at least, and how many of them a second."""
        batch, N = self.case["batch"], mechanism.tokens
        if self.case["level"] == "layer":
            flops = batch * mechanism.layer_flops(which == "train") if which != "bwd" else None
            return {"flops": flops, "flops_per_s": flops / median} if flops else {}
        heads = batch * mechanism.dim * self.subject.dtype.itemsize
        tied = not mechanism.untied
        flops = peers.infsa.flops(mechanism.OP, which, batch, mechanism.num_heads, N, mechanism.head_dim)
        moved = peers.infsa.traffic(mechanism.OP, which, tied, N * heads, heads)
        return {"bytes": moved, "flops": flops, "bytes_per_s": moved / median, "flops_per_s": flops / median}

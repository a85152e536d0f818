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

CASE = ("level", "device", "dtype", "layout", "batch", "depth", "dim", "pixels", "way")
# What names a measurement.
IDENTITY = (*CASE[:-1], "pass", "way", "name")

# Passes that a phase gives: a training step is timed in two laps; in a graph there is the backward pass alone.
PASSES = {"fwd": ("fwd",), "train": ("bwd", "train")}

# A status that is no result.
OVER = {"status": "not reached", "reason": "the minutes were over"}

# Part of a turn's seconds after which nothing more is built: the rest is for calls in turn.
BUILDING = 0.7


def passes(case: dict) -> tuple[str, ...]:
    return PASSES[case["phase"]][: 1 if case["way"] == "graph" else None]


def blank(case: dict, name: str, which: str) -> dict:
    """What is known of a row before it is measured."""
    known = {f: case.get(f) for f in CASE} | {"name": name, "label": peers.label(name), "pass": which}
    return known | {"N": (case["pixels"] // PATCH) ** 2}


def failure(error: Exception) -> dict:
    """Status and reason for a call that raised."""
    text = (str(error).strip().splitlines() or [""])[0]
    memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
    if memory or "can't allocate memory" in text or "bad_alloc" in text:
        return {"status": "out of memory", "reason": text[:200]}
    return {"status": "unsupported", "reason": f"{type(error).__name__}: {text}"[:200]}


def measure(turn: dict, device: torch.device, budget: float, say=lambda name: None) -> list[dict]:
    """The rows of a turn; tells ``say`` the name of what is being built and checked, and None when calls in turn begin."""
    began, ready, rows = time.perf_counter(), {}, []
    if device.type == "cuda":
        torch.cuda.empty_cache()
    anchors = [name for name in turn["anchors"] if name not in turn["names"]]
    for name in (*anchors, *turn["names"]):
        case = turn | ({"way": "eager"} if name in anchors and turn["way"] == "compile" else {})
        if time.perf_counter() - began > BUILDING * turn.get("seconds", float("inf")):
            found = OVER
        else:
            say(name)
            try:
                found = Ready(case, name, device)
            except Exception as error:
                found = failure(error)
        if isinstance(found, Ready) and "status" not in found.facts:
            ready[name] = found
        elif name in turn["names"]:
            rows += [blank(turn, name, which) | getattr(found, "facts", found) for which in passes(turn)]
    say(None)
    seen = {name: it.seen for name, it in ready.items()}
    timer.interleave({name: it.action for name, it in ready.items()}, seen, budget, device)
    rows += [ready[name].row(which, ready) for name in turn["names"] if name in ready for which in passes(turn)]
    for row in rows:
        row["turn_seconds"] = time.perf_counter() - began
    return rows


class Ready:
    """A mechanism that has been checked and called once, ready to be called in turn; or ``facts`` with a status."""

    def __init__(self, case: dict, name: str, device: torch.device):
        if why := peers.of(name).unavailable(device):
            raise NotImplementedError(why)
        self.case, self.name, self.device = case, name, device
        self.subject = subject = Subject(case, name, device)
        function, self.limit = subject.function(), isinstance(subject.module, peers.Limit)
        self.facts = {} if self.limit else self._facts(function)
        if "status" in self.facts:
            return
        self.action = subject.action(function)
        warm_up = device.type == "cuda" or case["way"] == "compile"
        self.seen, results = timer.first(self.action, device, warm_up)
        if not self.limit and not all(t.isfinite().all() for t in results):
            self.facts |= {"status": "wrong", "reason": "not finite"}

    def _facts(self, function) -> dict:
        facts, mechanism = {"parameters": sum(p.numel() for p in self.subject.parameters())}, self.subject.mechanism
        if mechanism is not None:
            facts |= {"H": mechanism.num_heads, "d": mechanism.head_dim, "time": mechanism.TIME, "state": mechanism.STATE,
                      "state_size": mechanism.state_size(), "note": mechanism.NOTE, "causal": mechanism.CAUSAL}  # fmt: skip
        verdict = gate.examine(self.subject, function).row()
        if mechanism is not None and mechanism.PLAIN:  # what the rule measures by is not judged by it
            verdict = {f: v for f, v in verdict.items() if f not in ("status", "reason")}
        return facts | verdict

    def row(self, which: str, turn: "dict[str, Ready]") -> dict:
        """The row of a pass beside the medians of whatever else was called in the turn."""
        seen, mechanism, cold = self.seen, self.subject.mechanism, self.device.type == "cuda"
        row = blank(self.case, self.name, which) | self.facts | {"status": "ok"} | timer.times(seen.samples, which)
        if seen.other:
            other = timer.times(seen.other, which)["median_s"]
            row |= dict(zip(("cold_s", "warm_s"), (row["median_s"], other)[:: 1 if cold else -1]))
        if seen.peaks:
            row["peak_bytes"] = seen.peaks[-1] if which == "bwd" else max(seen.peaks)
            row["result_bytes"] = seen.result_bytes
        beside = {n: timer.times(it.seen.samples, "train" if it.limit else which)["median_s"] for n, it in turn.items()}
        row["beside"] = {n: s for n, s in beside.items() if n in self.case["anchors"] and n != self.name}
        limits = mechanism.limits(self.case, which) if mechanism else {}
        if limits and all(name in beside for name in limits):
            least = sum(count * beside[name] for name, count in limits.items())
            row |= {"limit": "+".join(limits), "share_of_limit": least / row["median_s"]}
        for count, amount in (mechanism.work(self.case, which) if mechanism else {}).items():
            row |= {count: amount, f"{count}_per_s": amount / row["median_s"]}
        if self.case["level"] == "model":
            row["parts_s"] = dict(self.subject.parts)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            row["resident_bytes"] = peak << (sys.platform != "darwin") * 10
            if self.device.type == "cuda" and which == "fwd":
                row["joules"] = timer.energy(self.action, self.device)
        return row

"""A row of results: one candidate, one case, one direction. Plain dictionaries, as they stand in the JSON."""

import math

import numpy as np
import torch

from .cases import Case, short
from .measure import Observation
from .truth import Truth, Verdict

STATUSES = ("ok", "wrong", "skipped", "out of memory", "unsupported")


def describe(case: Case, candidate: str, direction: str, base_dtype: torch.dtype) -> dict:
    """What was to be measured. ``sweep`` marks the rows that make a curve over N."""
    return {
        "op": case.op,
        "direction": direction,
        "candidate": candidate,
        "pixels": case.pixels,
        "N": case.N,
        "H": case.H,
        "d": case.d,
        "dtype": short(case.dtype),
        "layout": case.layout,
        "tied": case.tied,
        "variant": case.variant,
        "sweep": case.tied and case.layout == "bnhd" and case.dtype == base_dtype,
    }


def times(seen: Observation, direction: str) -> dict:
    """Seconds of a direction; the backward pass is the last lap of a training step."""
    seconds = [laps[-1] if direction == "bwd" else sum(laps) for laps in seen.samples]
    p20, median, p80 = np.percentile(seconds, [20, 50, 80]).tolist()
    return {"status": "ok", "median_s": median, "p20_s": p20, "p80_s": p80, "samples": len(seconds)}


def memory(seen: Observation, direction: str) -> dict:
    """Peak bytes beyond the inputs, and how many of them are the results'."""
    if not seen.peaks:
        return {}
    peak = seen.peaks[-1] if direction == "bwd" else max(seen.peaks)
    return {"peak_bytes": peak, "result_bytes": seen.result_bytes}


def rates(case: Case, direction: str, median: float, limit: str, limit_seconds: float) -> dict:
    """What the time means against the case's bytes and FLOPs, and against what the machine needs for them at least."""
    traffic, flops = case.traffic(direction), case.flops(direction)
    return {
        "bytes": traffic,
        "flops": flops,
        "bytes_per_s": traffic / median,
        "flops_per_s": flops / median,
        "limit": limit,
        "share_of_limit": limit_seconds / median,
    }


def accuracy(verdict: Verdict | None, truth: Truth) -> dict:
    """The largest error, relative to the largest entry of its tensor, and what was allowed."""
    if verdict is None:
        return {}
    error = verdict.error if math.isfinite(verdict.error) else None
    return {"error": error, "bound": verdict.bound, "worst": verdict.what, "checked": truth.checked}


def failure(error: Exception) -> dict:
    """Status and reason for a call that raised."""
    text = (str(error).strip().splitlines() or [""])[0]
    if (
        isinstance(error, torch.OutOfMemoryError | MemoryError)
        or "can't allocate memory" in text
        or "bad_alloc" in text
    ):
        return {"status": "out of memory", "reason": text[:200]}
    return {"status": "unsupported", "reason": f"{type(error).__name__}: {text}"[:200]}

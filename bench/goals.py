"""The figures that the kernels are to reach on a CPU, each beside what this run measured."""

LINEAR = {"op": "linear", "N": 65536, "dtype": "fp32", "layout": "bnhd", "tied": True}
PURE = {"op": "pure", "N": 4096, "dtype": "fp32", "layout": "bnhd", "tied": True}
LAYER = {"N": 4096, "dtype": "fp32"}
UNTIED = {"tied": False}
HEADS_FIRST = {"layout": "bhnd"}

# What is said, case, pass, the candidate beside it, and the largest ratio of the operator's time to that candidate's.
TIME_OVER = [
    ("Linear forward: time over its own read of Q, Q, V", LINEAR, "fwd", "read Q, Q, V", 1.10),
    ("Linear forward, [B,H,N,d]: time over a read of Q, V", LINEAR | HEADS_FIRST, "fwd", "read", 1.25),
    ("Linear backward: time over a fresh copy of equal bytes", LINEAR, "bwd", "clone", 1.25),
    ("Linear backward, untied: time over a fresh copy of equal bytes", LINEAR | UNTIED, "bwd", "clone", 1.25),
]

# The same with the least speed-up.
SPEED_UPS = [
    ("Linear forward: times faster than eager", LINEAR, "fwd", "eager", 20),
    ("Linear forward + backward: times faster than eager", LINEAR, "fwd+bwd", "eager", 10),
    ("Pure forward: times faster than SDPA", PURE, "fwd", "sdpa", 1.3),
    ("Pure forward, untied: times faster than SDPA", PURE | UNTIED, "fwd", "sdpa", 1.3),
    ("Pure backward: times faster than SDPA's", PURE, "bwd", "sdpa", 1.2),
    ("Pure backward, untied: times faster than SDPA's", PURE | UNTIED, "bwd", "sdpa", 1.2),
]


def compare(results: dict) -> list[dict]:
    """Every goal with the value measured and whether that reaches it; None for both where the run has no such row."""
    if results["environment"]["device_type"] != "cpu":
        return []
    rows, dispatch = results["rows"], results["dispatch"]
    found = []
    for what, case, direction, other, target in TIME_OVER:
        found.append(_at_most(target, what, _own(rows, case, direction), look_up(rows, case, direction, other)))
    for what, case, direction, other, target in SPEED_UPS:
        found.append(_at_least(target, what, look_up(rows, case, direction, other), _own(rows, case, direction)))

    bf16 = LINEAR | {"dtype": "bf16"}
    what = "Linear forward: times faster in bfloat16 than in float32"
    found.append(_at_least(1, what, _own(rows, LINEAR, "fwd"), _own(rows, bf16, "fwd")))

    untied = PURE | UNTIED
    rate, mm = (look_up(rows, untied, "fwd", name, "flops_per_s") for name in ("infsa", "torch.mm"))
    found.append(_at_least(0.95, "Pure forward, untied: FLOP rate over torch.mm's", rate, mm))

    long = PURE | {"N": 65536}
    peak, result = (look_up(rows, long, "fwd", "infsa", field) for field in ("peak_bytes", "result_bytes"))
    scratch = None if peak is None else max(0, peak - result) / 1e6
    found.append(_at_most(64, "Pure forward at N = 65536: MB beyond inputs and result", scratch, 1))

    for direction, target in (("fwd", 2), ("fwd+bwd", 1.6)):
        passes = {"fwd": "forward", "fwd+bwd": "forward + backward"}[direction]
        plain, pooled = (look_up(results["layer"], LAYER, direction, name) for name in ("plain", "pooled"))
        found.append(_at_least(target, f"Pooled layer {passes}: times faster than the plain path", plain, pooled))
        plain, pooled = (look_up(results["layer"], LAYER, direction, c, "peak_bytes") for c in ("plain", "pooled"))
        found.append(_at_most(0.5, f"Pooled layer {passes}: peak memory over the plain path's", pooled, plain))

    overhead = (dispatch["public"] - dispatch["kernel"]) * 1e6 if "kernel" in dispatch else None
    found.append(_at_most(15, "Dispatch of a tiny forward: us beyond its C++ operator", overhead, 1))
    return found


def look_up(rows: list[dict], case: dict, direction: str, candidate: str, field: str = "median_s"):
    """The value of a field in the one row that fits; None if it was not measured."""
    wanted = case | {"direction": direction, "candidate": candidate, "status": "ok"}
    return next((r.get(field) for r in rows if wanted.items() <= r.items()), None)


def _own(rows, case, direction):
    return look_up(rows, case, direction, "infsa")


def _at_most(target: float, what: str, value: float | None, over: float | None) -> dict:
    ratio = _ratio(value, over)
    return {
        "goal": what,
        "target": f"<= {target:g}",
        "value": ratio,
        "reached": None if ratio is None else ratio <= target,
    }


def _at_least(target: float, what: str, value: float | None, over: float | None) -> dict:
    ratio = _ratio(value, over)
    return {
        "goal": what,
        "target": f">= {target:g}",
        "value": ratio,
        "reached": None if ratio is None else ratio >= target,
    }


def _ratio(value: float | None, over: float | None) -> float | None:
    return None if value is None or over is None else value / over

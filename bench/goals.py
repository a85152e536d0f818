"""The figures that are to be reached, each beside what the rows say: ratios of calls in turn."""

from dataclasses import dataclass
from itertools import product

from . import peers
from .cases import DTYPE, POOLED_PIXELS
from .rows import best, over_linear, select, usual

# Linear: N = 65536, Pure: N = 4096, tied, [B, N, H, d], in the device's own dtype where nothing else is said.
LINEAR = {"level": "operator", "pixels": 4096, "batch": 1, "layout": "bnhd", "name": "linear_infsa"}
PURE = LINEAR | {"pixels": 1024, "name": "pure_infsa"}
LAYER = {"level": "layer", "pixels": 1024, "name": "linear_infsa"}
MODEL = {"level": "model", "pixels": 1024, "depth": 4, "name": "linear_infsa"}
UNTIED = {"name": "linear_infsa_untied"}
FLOOR = LINEAR | {"name": "linear_infsa_floor"}


@dataclass(frozen=True)
class Goal:
    """A ratio of two rows: of the operator's time to another's (``most``), or of another's to its own (``least``)."""

    what: str
    case: dict
    which: str
    other: str
    most: float | None = None
    least: float | None = None
    field: str = "median_s"
    factor: float = 1.0  # of the other's value
    other_case: dict | None = None


CPU = [
    Goal("Linear forward: time over its own read of Q, Q, V", LINEAR, "fwd", "read_qqv", most=1.10),
    Goal("Linear forward, [B,H,N,d]: time over a read of Q, V", LINEAR | {"layout": "bhnd"}, "fwd", "read", most=1.25),
    Goal("Linear backward: time over a fresh copy of equal bytes", LINEAR, "bwd", "clone", most=1.25),
    Goal("Linear backward, untied: time over a fresh copy of equal bytes", LINEAR | UNTIED, "bwd", "clone_qkv", most=1.25),
    Goal("Linear forward: times faster than plain torch", LINEAR, "fwd", "linear_plain", least=20),
    Goal("Linear forward + backward: times faster than plain torch", LINEAR, "train", "linear_plain", least=10),
    Goal("Linear forward with a floor: time over that without", FLOOR, "fwd", "linear_infsa", most=1.03),
    Goal("Linear forward with a floor, N = 196: time over that without", FLOOR | {"pixels": 224}, "fwd", "linear_infsa",
         most=1.03),
    Goal("Linear backward with a floor: time over that without", FLOOR, "bwd", "linear_infsa", most=1.03),
    Goal("Pure forward: times faster than SDPA", PURE, "fwd", "softmax", least=1.3),
    Goal("Pure forward, untied: times faster than SDPA", PURE | {"name": "pure_infsa_untied"}, "fwd", "softmax", least=1.3),
    Goal("Pure backward: times faster than SDPA's", PURE, "bwd", "softmax", least=1.2),
    Goal("Pure backward, untied: times faster than SDPA's", PURE | {"name": "pure_infsa_untied"}, "bwd", "softmax", least=1.2),
    Goal("Linear forward: times faster in bfloat16 than in float32", LINEAR | {"dtype": "bf16"}, "fwd", "linear_infsa", least=1,
         other_case={"dtype": "fp32"}),
    Goal("Pure forward, untied: FLOP rate over torch.mm's", PURE | {"name": "pure_infsa_untied"}, "fwd", "gemm_mm", least=0.95,
         field="flops_per_s"),
    Goal("Pooled layer forward: times faster than per token", LAYER, "fwd", "linear_infsa_per_token", least=2),
    Goal("Pooled layer forward: peak memory over per token's", LAYER, "fwd", "linear_infsa_per_token", most=0.5,
         field="peak_bytes"),
    Goal("Pooled layer forward + backward: times faster than per token", LAYER, "train", "linear_infsa_per_token", least=1.6),
    Goal("Pooled layer forward + backward: peak memory over per token's", LAYER, "train", "linear_infsa_per_token", most=0.5,
         field="peak_bytes"),
    Goal("4-layer model forward: times faster than per token", MODEL, "fwd", "linear_infsa_per_token", least=1.2),
    Goal("4-layer model forward: times faster than its softmax twin", MODEL, "fwd", "softmax", least=3),
]  # fmt: skip


def _gpu() -> list[Goal]:
    graph, goals = {"way": "graph"}, []
    for pixels, batch in ((1024, 32), (4096, 1), (9216, 1)):
        case, at = LINEAR | graph | {"pixels": pixels, "batch": batch}, f"N={(pixels // 16) ** 2} x{batch}"
        goals += [
            Goal(f"1 Linear forward tied / read, {at}", case, "fwd", "read", most=1.15),
            Goal(f"2 Linear forward untied / read, {at}", case | UNTIED, "fwd", "read_qkv", most=1.15),
            Goal(f"4 Linear forward: plain / ours, {at}", case, "fwd", "linear_plain", least=5),
            Goal(f"4 Linear forward: compiled / ours, {at}", case, "fwd", "linear_plain", least=1.4,
                 other_case={"way": "compile"}),
        ]  # fmt: skip
    # A clone reads and writes: tied, Q is read twice, 5 of its 4 units of bytes; untied all that is moved is what it moves.
    for name, copy, factor in (("linear_infsa", "clone", 5 / 4), ("linear_infsa_untied", "clone_qkv", 1.0)):
        what = f"5 Linear backward {'un' * ('untied' in name)}tied / copy of its bytes, N=65536"
        goals.append(Goal(what, LINEAR | graph | {"name": name}, "bwd", copy, most=1.25, factor=factor))
    small = LINEAR | graph | {"pixels": 224}
    goals += [
        Goal("3 Linear forward / empty launch, N=196", small, "fwd", "launch", most=1.5),
        Goal("3 Linear forward: plain / ours, N=196", small, "fwd", "linear_plain", least=8),
    ]
    for pixels, batch in ((1024, 8), (2048, 1), (4096, 1)):
        case, at = PURE | graph | {"pixels": pixels, "batch": batch}, f"N={(pixels // 16) ** 2} x{batch}"
        untied = case | {"name": "pure_infsa_untied"}
        goals += [
            Goal(f"6 Pure forward / GEMM rate, {at}", untied, "fwd", "gemm", least=0.65, field="flops_per_s"),
            Goal(f"7 Pure forward / cuDNN SDPA, {at}", untied, "fwd", "sdpa_cudnn", least=1.25),
            Goal(f"7 Pure forward / FA2, {at}", untied, "fwd", "sdpa_flash", least=1.6),
            Goal(f"8 Pure backward untied / FA2, {at}", untied, "bwd", "sdpa_flash", least=1.1),
            Goal(f"8 Pure backward tied / cuDNN, {at}", case, "bwd", "sdpa_cudnn", least=1.1),
        ]
    last = PURE | graph | {"pixels": 9216, "name": "pure_infsa_untied"}
    # 1 / 1.6 of the GEMM rate.
    what, rate = "9 Pure forward N=331776: FLOP rate / GEMM rate", {"least": 1 / 1.6, "field": "flops_per_s"}
    goals.append(Goal(what, last, "fwd", "gemm", other_case={"pixels": 4096}, **rate))
    for pixels in POOLED_PIXELS:
        case, at = LAYER | {"pixels": pixels}, f"N={(pixels // 16) ** 2}"
        goals += [
            Goal(f"10 Pooled layer {which}: per token / ours, {at}", case, which, "linear_infsa_per_token", least=1)
            for which in ("fwd", "train")
        ]
    return goals


GPU = _gpu()

# What the layers are to reach: name, how many times as long the next one takes, and which comparators count.
NEXT = (
    ("linear_infsa", 1.5, lambda cls: cls is not peers.mean.Mean),
    ("pure_infsa", 1.0, lambda cls: cls.QUADRATIC),
)
NEXT_PIXELS = (1024, 2048)
DISPATCH_US, SCRATCH_MB = 15, 64


def compare(rows: list[dict]) -> list[dict]:
    """Every goal with the value measured and whether that reaches it; None for both where there is no such row."""
    device = rows[-1]["environment"]["device_type"] if rows else "cpu"
    found = [ratio(goal, rows) for goal in (CPU if device == "cpu" else GPU)]
    if device == "cpu":
        tiny, kernel = (_value(rows, {"name": n}, "fwd", "median_s") for n in ("tiny", "tiny_kernel"))
        overhead = (tiny - kernel) * 1e6 if tiny and kernel else None
        found.append(_goal("Dispatch of a tiny forward: us beyond its C++ operator", overhead, most=DISPATCH_US))
        peak, result = (_value(rows, PURE | {"pixels": 4096}, "fwd", f) for f in ("peak_bytes", "result_bytes"))
        scratch = None if peak is None else max(0, peak - result) / 1e6
        found.append(_goal("Pure forward at N = 65536: MB beyond inputs and result", scratch, most=SCRATCH_MB))
    return [*found, *following(rows)]


def ratio(goal: Goal, rows: list[dict]) -> dict:
    other = goal.case | {"name": goal.other, **(goal.other_case or {})}
    own, beside = _value(rows, goal.case, goal.which, goal.field), _value(rows, other, goal.which, goal.field)
    beside = beside and beside * goal.factor
    # A rate is better if larger, so it is divided the other way round.
    over = goal.most is not None or goal.field == "flops_per_s"
    value = None if own is None or not beside else own / beside if over else beside / own
    return _goal(goal.what, value, goal.most, goal.least)


def _goal(what: str, value: float | None, most: float | None = None, least: float | None = None) -> dict:
    """``share``: of the target; from 1 on it is reached."""
    target, share = f"<= {most:.3g}" if least is None else f">= {least:.3g}", None
    if value is not None:
        share = most / max(value, 1e-12) if least is None else value / least
    return {"goal": what, "target": target, "value": value, "share": share, "reached": share and share >= 1}


def _value(rows: list[dict], case: dict, which: str, field: str):
    """The value in the row that fits; of a mechanism on several backends, the best; None if it was not measured."""
    others = {f: v for f, v in case.items() if f != "name"}
    fit = [r for r in select(rows, which=which, status="ok", **others) if peers.base(r["name"]) == case["name"]]
    fit = [r for r in fit if r.get(field) and ("way" in case or r["way"] == "eager")]
    if "dtype" not in case:
        fit = usual(fit) or [r for r in fit if r["dtype"] == DTYPE[r["device"]]]
    return (max if field == "flops_per_s" else min)((r[field] for r in fit), default=None)


def following(rows: list[dict]) -> list[dict]:
    """The layer's goals, each with the comparator that came next, where the rows have times for both."""
    found = []
    for pixels, which in product(NEXT_PIXELS, ("fwd", "train")):
        chosen = best(rows, level="layer", pixels=pixels, which=which, status="ok")
        times = {n: over_linear(r, chosen) for n, r in chosen.items()}
        for name, least, among in NEXT:
            rivals = [n for n in chosen if n not in peers.OWN and among(peers.of(n))]
            if times.get(name) and rivals:
                after = min(rivals, key=times.get)
                case = f"{peers.label(name)}, layer, {pixels} x {pixels}, {which}"
                what = f"{case}: times faster than {peers.label(after)}"
                found.append(_goal(what, times[after] / times[name], least=least) | {"name": name, "next": after})
    return found


def line(goal: dict) -> str:
    value = "-" if goal["value"] is None else f"{goal['value']:.3g}"
    outcome = {True: "reached", False: "MISSED", None: "not measured"}[goal["reached"]]
    return f"{goal['goal']:<66} {value:>7}   {goal['target']:<8} {outcome}"

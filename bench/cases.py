"""What is measured: turns in the order of their worth, for the main figures, for everything, and for a GPU's goals."""

from collections.abc import Iterable
from itertools import product

from . import peers
from .engine import passes
from .image import PATCH, D

LEVELS = ("operator", "layer", "model")
DTYPE = {"cpu": "fp32", "cuda": "bf16"}
DEPTHS = (4, 24)

# The operators beside their own equations, softmax and the machine; then the mechanisms of the field, level by level.
KERNELS = ("linear_infsa", "linear_plain", "pure_infsa", "pure_plain", "softmax", "softmax_64")
MACHINE = ("read", "read_qqv", "copy", "clone", "gemm", "gemm_mm", "launch", "tiny", "tiny_kernel")
FIELD = {level: [n for n, (cls, _) in peers.MECHANISMS.items() if level in cls.LEVELS and n not in peers.LIMITS]
         for level in LEVELS} | {"model": [*peers.PAPER, "linear_infsa_per_token"]}  # fmt: skip

# The figures of `make bench`: level, mechanisms, side of the picture, phases.
MAIN = (
    ("operator", (*KERNELS[:5], "mean", *MACHINE), 1024, ("fwd",)),
    (
        "operator",
        ("linear_infsa", "linear_infsa_floor", "linear_plain", "read", "read_qqv", "clone"),
        4096,
        ("fwd", "train"),
    ),
    ("operator", (*KERNELS[:5], "linear_infsa_floor"), 224, ("fwd",)),
    ("operator", KERNELS[:5], 512, ("fwd",)),
    ("operator", KERNELS[:2], 2048, ("fwd",)),
    ("operator", ("linear_infsa", "linear_plain", "pure_infsa", "softmax", "copy", "clone", "gemm"), 1024, ("train",)),
    ("layer", (*peers.PAPER, "mean", "fastformer", "linear_infsa_per_token"), 1024, ("fwd",)),
    ("model", ("linear_infsa", "linear_infsa_per_token", "softmax"), 1024, ("fwd",)),
    ("layer", (*peers.PAPER[:3], "linear_infsa_per_token", "soft", "fastformer", "mean"), 1024, ("train",)),
)

SIZES = {
    "cpu": {"kernels": (224, 512, 1024, 2048, 4096), "operator": (224, 1024, 2048), "layer": (224, 1024, 2048),
            "model": (224, 1024, 2048, 4096, 9216)},
    "cuda": {"kernels": (224, 1024, 2048, 4096, 9216), "operator": (224, 1024, 4096, 9216),
             "layer": (224, 1024, 2048, 4096, 9216), "model": (224, 1024, 2048, 4096, 9216)},
}  # fmt: skip
QUICK_SIZES = (224, 512)

# The most that a run takes, and each level of `--all`; a level's last turn may go on for GRACE seconds.
MINUTES = {
    "cpu": {"main": 3, "operator": 9, "layer": 12, "model": 7},
    "cuda": {"main": 3, "operator": 5, "layer": 4, "model": 3},
}
QUICK_MINUTES, GRACE = 1.5, 5

# Seconds of one mechanism of a turn, with its building, check and compilation; of its calls.
LIMIT = {"operator": 25, "layer": 60, "model": 60}
BUDGET, QUICK_BUDGET = 0.3, 0.05

# Mechanisms in one turn: if one dies, the others of its turn are built again.
TOGETHER = 6
COMPILED_PIXELS = 1024

# Where a GPU's pooled layer is compared.
POOLED_PIXELS = (224, 1024, 4096)

# W in 4 N D (W D + N), the operations of a quadratic mechanism on N tokens: products with weights beside those with scores.
WEIGHTS = {"operator": 0, "layer": 2, "model": 6}


def turns(level: str, names: Iterable[str], sizes: Iterable[int], device: str, phases=("fwd", "train"), ways=("eager",),
          together: bool = False, depths=DEPTHS, **case) -> list[dict]:  # fmt: skip
    """The turns of one level, all names in one or a few at a time; ``case``: dtype, layout, batch, dim if not the usual ones."""
    usual = {"dtype": DTYPE[device], "layout": "bnhd", "batch": 1, "dim": D} | case
    found = []
    for depth, pixels, phase, way in product(depths if level == "model" else (None,), sorted(sizes), phases, ways):
        mine = [n for n in names if way != "compile" or peers.of(n).COMPILES]
        # Mechanisms before their variants: they are worth different things.
        kinds = [[n for n in mine if (n in peers.VARIANTS) == variant] for variant in (False, True)]
        step = 1 if way == "compile" or level == "model" else TOGETHER
        groups = [mine] if together else [kind[i : i + step] for kind in kinds for i in range(0, len(kind), step)]
        for group in filter(None, groups):
            turn = {"level": level, "device": device, "depth": depth, "pixels": pixels, "phase": phase, "way": way}
            found.append(turn | usual | {"names": group, "anchors": anchors(level, phase, group)})
    return found


def anchors(level: str, phase: str, names: list[str]) -> list[str]:
    """What stands beside a turn's mechanisms: Linear-InfSA, and the machine's limits of its operators."""
    if level == "model":
        return []
    found, moves = ["linear_infsa"], ("read",) if phase == "fwd" else ("read", "copy")
    for cls in map(peers.of, names):
        if issubclass(cls, peers.InfSA):
            reads = level == "operator" and cls.OP == "linear"
            found += [move + cls.KEYS for move in moves] if reads else ["gemm"]
    return list(dict.fromkeys(found))


def main(device: str, quick: bool = False) -> list[dict]:
    """The main figures, each as few times as it takes."""
    plan = []
    for level, names, pixels, phases in MAIN:
        if not quick or pixels <= 1024:
            size = min(pixels, 512) if quick else pixels
            plan += turns(level, names, (size,), device, phases, together=True, depths=(4,))
    return unique(plan)


def everything(level: str, device: str, quick: bool = False) -> list[dict]:
    """All of a level, in the order of its worth, for time may end: the last ones are left to the next run."""
    sizes = dict.fromkeys(SIZES[device], QUICK_SIZES) if quick else SIZES[device]
    plan = []
    if level == "operator":
        plan += turns(level, (*KERNELS, *MACHINE), sizes["kernels"], device, together=True)
        plan += _variants(sizes["kernels"], device)
        plan += goals(device) if device == "cuda" and not quick else []
    plan += turns(level, FIELD[level], sizes[level], device)
    if level != "model" and not quick:
        plan += turns(level, FIELD[level], sizes[level], device, ways=("compile",))
    return unique(sorted(plan, key=_worth))


def _variants(sizes: Iterable[int], device: str) -> list[dict]:
    """Other dtypes and layouts, and untied keys: Linear at its longest, Pure where every comparator can follow."""
    other = "bf16" if DTYPE[device] == "fp32" else "fp32"
    plan = []
    for op, pixels in (("linear", max(sizes)), ("pure", max((s for s in sizes if s <= 1024), default=min(sizes)))):
        names = [f"{op}_infsa", f"{op}_plain", "softmax" if op == "pure" else "softmax_64", "gemm_mm", "clone"]
        untied = [f"{op}_infsa_untied", f"{op}_plain_untied", *names[2:4], "clone_qkv"]
        for layout, dtype in (("bhnd", DTYPE[device]), ("bnhd", other), ("bhnd", other)):
            plan += turns("operator", names, (pixels,), device, layout=layout, dtype=dtype, together=True)
        plan += turns("operator", untied, (pixels,), device, together=True)
    return plan


def goals(device: str, dry: bool = False) -> list[dict]:
    """What a GPU's goals need: both operators on each of our backends, in CUDA graphs, beside reads, copies and softmax; the
    pooled layer.
    """
    if dry:
        names = ["linear_infsa@triton", "pure_infsa@triton", "linear_plain", "softmax"]
        names += ["read", "clone", "gemm", "launch"]
        return turns("operator", names, (112,), device, ways=("graph",), together=True, dim=32, dtype="bf16")
    linear = [f"linear_infsa{untied}@{backend}" for untied in ("", "_untied") for backend in ("triton", "cuda")]
    linear += ["linear_plain", "read", "read_qkv", "clone", "clone_qkv", "launch"]
    pure = ["pure_infsa@triton", "pure_infsa_untied@triton", "sdpa_flash", "sdpa_cudnn", "sdpa_efficient", "gemm",
            "flash_attention_3", "flash_attention_4"]  # fmt: skip
    plan = turns("operator", ["read", "copy", "clone", "gemm", "launch"], (4096,), device, ("fwd",), ("graph",))
    for pixels, batch in (*product((224, 512, 1024, 2048), (1, 32)), (4096, 1), (9216, 1)):
        plan += turns("operator", linear, (pixels,), device, ways=("graph",), batch=batch, together=True)
        plan += turns("operator", ["linear_plain"], (pixels,), device, ("fwd",), ("compile",), batch=batch)
    for pixels, batch in ((224, 32), (1024, 1), (1024, 8), (2048, 1), (4096, 1)):
        plan += turns("operator", pure, (pixels,), device, ways=("graph",), batch=batch, together=True)
    plan += turns("operator", pure[:2], (9216,), device, ("fwd",), ("graph",))
    pooled = ["linear_infsa@triton", "linear_infsa@eager", "linear_infsa_per_token"]
    return plan + turns("layer", pooled, POOLED_PIXELS, device, together=True)


def unique(plan: list[dict]) -> list[dict]:
    """The same without what an earlier turn has."""
    known, found = set(), []
    for turn in plan:
        case = tuple(v for k, v in sorted(turn.items()) if k not in ("names", "anchors"))
        names = [n for n in turn["names"] if (case, n) not in known]
        known |= {(case, n) for n in names}
        found += [turn | {"names": names}] if names else []
    return found


def _worth(turn: dict) -> tuple:
    """What sorts turns: mechanisms before their variants, eager before compiled, small before large."""
    if turn["level"] == "model":
        return turn["pixels"] * turn["depth"] * (2 if turn["phase"] == "train" else 1), turn["pixels"], turn["phase"]
    variant = turn["names"][0] in peers.VARIANTS
    if turn["way"] == "compile":
        stage = 1 if turn["pixels"] == COMPILED_PIXELS and not variant else 3
    else:
        stage = 2 if variant or turn["way"] == "graph" else 0
    return stage, turn["pixels"], turn["phase"]


def too_long(turn: dict, name: str, rows: list[dict], limit: float) -> str | None:
    """Why a mechanism is not tried, if a smaller picture's row tells that it would take too long or too much memory."""
    same = ("level", "depth", "way", "dtype", "layout", "batch", "dim")
    smaller = [r for r in rows if r["name"] == name and r["pass"] == passes(turn)[-1] and r["pixels"] < turn["pixels"]
               and all(r.get(f) == turn.get(f) for f in same)]  # fmt: skip
    last = max(smaller, key=lambda r: r["pixels"], default={"status": ""})
    if last["status"] in ("time limit", "out of memory"):
        return f"{last['status']} at {last['pixels']} pixels"
    if last["status"] != "ok":
        return None
    seconds = last["median_s"] * _operations(turn, name) / _operations(last, name)
    # A call to warm up and one that counts.
    return f"a call would take ~{seconds:.0f} s" if 2 * seconds > limit else None


def _operations(case: dict, name: str) -> float:
    """What a mechanism's time grows with."""
    N = (case["pixels"] // PATCH) ** 2
    return N * (WEIGHTS[case["level"]] * D + N) if peers.of(name).QUADRATIC else N

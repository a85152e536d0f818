"""Two results side by side (`--compare A B`), and this working tree beside another revision of it (`--versus REV`).

The noise of a row is the interval of its calls from the 20th to the 80th percentile; of a row that was measured several times,
the interval of the medians. A change counts where the intervals of A and B do not meet. The exit status is 1 if something became
slower or has no time any more.

REV is checked out into a temporary folder, with this tree's bench/ instead of its own, and its extension is built there. Every
turn is then measured by both in turn, several times. A revision too old for this tree's bench/ does not start, and says what it
lacks.
"""

import contextlib
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from .engine import IDENTITY
from .machine import ROOT
from .rows import columns, durations, read
from .worker import Worker

MACHINE = ("device", "threads", "torch", "infsa_kernels", "commit", "isa")
HARDWARE = ("device", "threads", "isa")

# Rows that say nothing of the code.
NO_RESULT = ("not reached", "skipped")

# Fewer calls have no interval.
LEAST_SAMPLES = 3

# What bench/ takes from elsewhere.
GATE = Path("infsa_kernels/testing.py")
VERSUS = {"levels": ("operator", "layer"), "names": ("linear_infsa", "pure_infsa"), "sizes": (224, 1024), "limit": 60}


def show(a: dict[tuple, dict], b: dict[tuple, dict]) -> int:
    """Prints the comparison; returns the exit status."""
    changes = compare(a, b)
    print(text(changes, a, b))
    return int(any(c["change"] in ("slower", "lost") for c in changes))


def load(path: Path) -> dict[tuple, dict]:
    """The rows of a file by measurement; repetitions in one environment are one row, of an older one are left out."""
    return merge(read(path))


def merge(rows: list[dict]) -> dict[tuple, dict]:
    """One row per measurement, with ``low_s`` and ``high_s``, None where the calls were too few to tell."""
    groups = {}
    for row in rows:
        if row["status"] not in NO_RESULT:
            groups.setdefault(tuple(row.get(f) for f in IDENTITY), []).append(row)
    return {key: _one([r for r in group if _machine(r) == _machine(group[-1])]) for key, group in groups.items()}


def compare(a: dict[tuple, dict], b: dict[tuple, dict]) -> list[dict]:
    """What became of every measurement of A that B has too."""
    return [{"what": _name(key), **_change(a[key], b[key])} for key in a if key in b]


def text(changes: list[dict], a: dict[tuple, dict], b: dict[tuple, dict]) -> str:
    lines = [f"{side}: {_describe(rows)}" for side, rows in (("A", a), ("B", b))]
    if {_machine(r, HARDWARE) for r in a.values()} != {_machine(r, HARDWARE) for r in b.values()}:
        lines.append("WARNING: the machines or their settings differ: the ratios are not those of the code")
    table = [["", "A", "B", "B / A", "noise", ""]]
    for c in changes:
        noise = "[{:.2f}, {:.2f}]".format(*c["noise"]) if c.get("noise") else "few calls" if "ratio" in c else ""
        times = [durations(c[side])[0] if isinstance(c[side], float) else c[side] for side in "ab"]
        table.append([c["what"], *times, f"{c['ratio']:.3f}" if "ratio" in c else "", noise, c["change"]])
    counts = Counter(c["change"] for c in changes if c["change"])
    beyond = ", ".join(f"{count} {change}" for change, count in counts.items()) or "none changed beyond its noise"
    only = f"Only in A: {len(a.keys() - b.keys())}, in B: {len(b.keys() - a.keys())}."
    return "\n".join([*lines, "", *columns(table, 1), "", f"{len(changes)} rows in both: {beyond}. {only}"])


def _one(group: list[dict]) -> dict:
    timed = [r for r in group if r["status"] == "ok"]
    if not timed or group[-1]["status"] != "ok":
        return group[-1]
    medians = [r["median_s"] for r in timed]
    row = timed[-1]
    if len(medians) > 1:
        low, high = min(medians), max(medians)
    elif row["samples"] >= LEAST_SAMPLES:
        low, high = row["p20_s"], row["p80_s"]
    else:
        low = high = None
    return {**row, "median_s": statistics.median(medians), "low_s": low, "high_s": high}


def _change(a: dict, b: dict) -> dict:
    if a["status"] != "ok" or b["status"] != "ok":
        sides = {side: r["median_s"] if r["status"] == "ok" else r["status"] for side, r in (("a", a), ("b", b))}
        change = "lost" if a["status"] == "ok" else "new" if b["status"] == "ok" else ""
        return {**sides, "change": change}
    ratio, noise, change = b["median_s"] / a["median_s"], None, ""
    if a["low_s"] and b["low_s"]:
        noise = b["low_s"] / a["high_s"], b["high_s"] / a["low_s"]
        change = "slower" if noise[0] > 1 else "faster" if noise[1] < 1 else ""
    return {"a": a["median_s"], "b": b["median_s"], "ratio": ratio, "noise": noise, "change": change}


def _machine(row: dict, facts: tuple = MACHINE) -> tuple:
    return tuple(row.get("environment", {}).get(f) for f in facts)


def _describe(rows: dict[tuple, dict]) -> str:
    machines = dict.fromkeys(_machine(r) for r in rows.values())
    return "; ".join(", ".join(str(fact) for fact in machine if fact) for machine in machines) or "no rows"


def _name(key: tuple) -> str:
    usual = {"bnhd", "eager", None}
    shown = {f: v for f, v in zip(IDENTITY, key) if v not in usual and (f, v) not in (("batch", 1), ("dim", 1024))}
    return " ".join(str(v) for v in shown.values())


def versus(rev: str, plan: list[dict], device: str, rounds: int, budget: float, out: Path) -> int:
    """Measures the plan on both sides and prints the comparison, REV as A; returns the exit status."""
    with checkout(rev, ROOT) as (root, commit):
        print(f"building {commit[:12]}", file=sys.stderr)
        build(root)
        rows = measure(plan, {"a": root, "b": ROOT}, device, rounds, budget)
    for row in rows["a"]:
        row["environment"] = {**row["environment"], "commit": commit[:12]}
    out.mkdir(parents=True, exist_ok=True)
    for side, found in rows.items():
        (out / f"{side}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return show(*(merge(rows[side]) for side in "ab"))


@contextlib.contextmanager
def checkout(rev: str, repository: Path) -> Iterator[tuple[Path, str]]:
    """A temporary folder with revision ``rev`` under this tree's harness, and its commit."""

    def git(*arguments):
        return _output(["git", *map(str, arguments)], repository)

    commit = git("rev-parse", "--verify", f"{rev}^{{commit}}")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "revision"
        git("worktree", "add", "--quiet", "--detach", root, commit)
        try:
            shutil.rmtree(root / "bench", ignore_errors=True)
            leave = shutil.ignore_patterns("out", "results", "__pycache__")
            shutil.copytree(repository / "bench", root / "bench", ignore=leave)
            shutil.copy(repository / GATE, root / GATE)
            yield root, commit
        finally:
            git("worktree", "remove", "--force", root)


def build(root: Path) -> None:
    """Builds the extension in place, by this Python."""
    _output([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], root)


def _output(command: list[str], folder: Path) -> str:
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(f"failed: {' '.join(command)}\n{run.stdout[-2000:]}{run.stderr[-2000:]}")
    return run.stdout.strip()


def measure(plan: list[dict], roots: dict[str, Path], device: str, rounds: int, budget: float) -> dict[str, list[dict]]:
    """Rows per side, turn and round; what gave no time on a side is not asked again there."""
    rows = {side: [] for side in roots}
    with contextlib.ExitStack() as stack:
        workers = {side: stack.enter_context(Worker(device, budget, root)) for side, root in roots.items()}
        for i, turn in enumerate(plan):
            print(f"{i + 1}/{len(plan)} {turn['level']} {turn['pixels']}² {turn['phase']}", file=sys.stderr)
            failed = {side: set() for side in roots}
            for number in range(rounds):
                for side in sorted(workers, reverse=number % 2 == 1):
                    names = [n for n in turn["names"] if n not in failed[side]]
                    for row in workers[side].measure({**turn, "names": names}, VERSUS["limit"]) if names else ():
                        rows[side].append(row | {"environment": workers[side].environment})
                        if row["status"] != "ok":
                            failed[side].add(row["name"])
    return rows

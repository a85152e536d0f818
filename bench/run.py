"""Runs turns: each in a process that may die, its rows appended to OUT/rows.jsonl with environment and commit.

What has its row is not run again, so an interrupted run goes on. What the minutes do not reach says so.
"""

import contextlib
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from .cases import GRACE, LIMIT, too_long
from .engine import OVER, blank, passes
from .image import PATCH
from .rows import FINAL, key, load
from .worker import Worker


def run(plan: list[dict], out: Path, device: str, minutes: float, budget: float, show: Callable[[int, str | None], None],
        limit: float | None = None, again: bool = False) -> list[dict]:  # fmt: skip
    """Measures what has no row yet and appends it; returns the rows of the plan.

    ``show`` hears the number of the turn, and the mechanism that is built and checked; None: calls take their turns.
    """
    out.mkdir(parents=True, exist_ok=True)
    path, end, found = out / "rows.jsonl", time.monotonic() + 60 * minutes, []
    known = {key(row): row for row in load(path) if row["status"] in FINAL and not again}
    with Worker(device, budget) as worker, path.open("a") as file:
        environment = worker.environment
        for number, turn in enumerate(plan):
            show(number, "")
            fresh, asked, most = [], [], limit or LIMIT[turn["level"]]
            for name in turn["names"]:
                rows = [blank(turn, name, which) | {"environment": environment} for which in passes(turn)]
                old = [known.get(key(row)) for row in rows]
                if all(old):
                    found += old
                elif end - time.monotonic() < 2:
                    fresh += [row | OVER for row in rows]
                elif why := too_long(turn, name, found, most):
                    fresh += [row | {"status": "time limit", "reason": why} for row in rows]
                else:
                    asked.append(name)
            if asked:
                tell = functools.partial(show, number)
                fresh += worker.measure(turn | {"names": asked}, most, tell, end + GRACE)
            for row in fresh:
                row["environment"] = environment | {"other_load": row.pop("other_load", None)}
                file.write(json.dumps(row) + "\n")
            file.flush()
            found += fresh
    return found


@contextlib.contextmanager
def live(plan: list[dict], minutes: float) -> Iterator[Callable[[int, str | None], None]]:
    """A line on stderr: what is measured, how much is done, and the time that is left."""
    from tqdm import tqdm

    weights = [_weight(turn) for turn in plan]
    line = f"{{bar:20}} {{elapsed}} of at most {minutes:g} minutes gone, {{remaining}} left  {{desc}}"
    with tqdm(total=sum(weights), bar_format=line, file=sys.stderr, leave=False, dynamic_ncols=True) as bar:

        def show(number: int, name: str | None) -> None:
            what = "calls in turn" if name is None else name
            bar.n = sum(weights[:number])
            bar.set_description_str(f"{number + 1}/{len(plan)} {describe(plan[number])}{what and ': '}{what}")

        yield show


def describe(turn: dict) -> str:
    depth = f"{turn['depth']} layers " if turn["depth"] else ""
    return f"{turn['level']} {depth}{turn['pixels']}² x{turn['batch']} {turn['phase']} {turn['way']}"


def _weight(turn: dict) -> float:
    """What a turn takes, roughly, beside others: its mechanisms, and their tokens."""
    tokens = (turn["pixels"] // PATCH) ** 2 * (turn["depth"] or {"operator": 0.5, "layer": 1}[turn["level"]])
    return len(turn["names"]) * (1 + tokens / 2000) * (2.5 if turn["phase"] == "train" else 1)

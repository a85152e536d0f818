"""Runs turns: each in a process that may die, its rows appended to OUT/rows.jsonl with environment and commit.

What has its row is not run again, so an interrupted run goes on. What the minutes do not reach says so.
"""

import json
import sys
import time
from pathlib import Path

from .cases import GRACE, LIMIT, too_long
from .engine import OVER, blank, passes
from .image import PATCH
from .machine import OtherLoad
from .rows import FINAL, key, load
from .worker import Worker


def run(plan: list[dict], out: Path, device: str, minutes: float, budget: float, limit: float | None = None,
        again: bool = False) -> list[dict]:  # fmt: skip
    """Measures what has no row yet and appends it; returns the rows of the plan."""
    out.mkdir(parents=True, exist_ok=True)
    path, end, found, load_of_others = out / "rows.jsonl", time.monotonic() + 60 * minutes, [], OtherLoad()
    known = {key(row): row for row in load(path) if row["status"] in FINAL and not again}
    with Worker(device, budget) as worker, path.open("a") as file, Progress(plan, end) as progress:
        environment = worker.environment

        def rows_of(turn, name, **facts):
            return [blank(turn, name, which) | facts | {"environment": environment} for which in passes(turn)]

        for turn in plan:
            progress.begin(turn)
            missing = []
            for name in turn["names"]:
                old = [known.get(key(row)) for row in rows_of(turn, name)]
                found += old if all(old) else []
                missing += [] if all(old) else [name]
            fresh, asked, mine = [], [], limit or LIMIT[turn["level"]]
            for name in missing:
                if end - time.monotonic() < 2:
                    fresh += rows_of(turn, name, **OVER)
                elif why := too_long(turn, name, found, mine):
                    fresh += rows_of(turn, name, status="time limit", reason=why)
                else:
                    asked.append(name)
            if asked:
                fresh += worker.measure(turn | {"names": asked}, mine, progress.at, end + GRACE)
            for row in fresh:
                row["environment"] = environment | {"other_load": load_of_others.share()}
                file.write(json.dumps(row) + "\n")
            file.flush()
            found += fresh
    return found


class Progress:
    """A line on stderr: what is measured, how much is done, and the time that is left."""

    def __init__(self, plan: list[dict], end: float):
        self.weights, self.end, self.done, self.began = [_weight(turn) for turn in plan], end, 0, time.monotonic()
        self.live = sys.stderr.isatty()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        print("\r\033[K" if self.live else "", end="" if self.live else "\n", file=sys.stderr, flush=True)

    def begin(self, turn: dict) -> None:
        depth = f"{turn['depth']} layers " if turn["depth"] else ""
        self.turn = f"{turn['level']} {depth}{turn['pixels']}² {turn['phase']}" + (
            f" {turn['way']}" if turn["way"] != "eager" else ""
        )
        self.done += 1
        self.at("")

    def at(self, name: str | None) -> None:
        """Writes the line: ``name`` is being built and checked; None: calls take their turns."""
        gone, total = time.monotonic() - self.began, sum(self.weights)
        share = sum(self.weights[: self.done - 1]) / total
        left = max(0.0, self.end - time.monotonic())
        left = min(left, gone / share - gone) if share else left
        bar = "█" * int(20 * share)
        text = f"{bar:░<20} {self.done}/{len(self.weights)}  {_clock(gone)} gone, {_clock(left)} left  {self.turn}"
        text += f": {'calls in turn' if name is None else name}" if name != "" else ""
        if self.live:
            print(f"\r\033[K{text[:150]}", end="", file=sys.stderr, flush=True)
        elif name == "":
            print(text, file=sys.stderr, flush=True)


def _weight(turn: dict) -> float:
    """What a turn takes, roughly, beside others: its mechanisms, and their tokens."""
    tokens = (turn["pixels"] // PATCH) ** 2 * (turn["depth"] or {"operator": 0.5, "layer": 1}[turn["level"]])
    return len(turn["names"]) * (1 + tokens / 2000) * (2.5 if turn["phase"] == "train" else 1)


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"

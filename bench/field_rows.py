"""The rows of the field: which of them are one measurement, which count, and the tables that they make."""

import json
from pathlib import Path

from . import peers

# Rows that are results; the rest are tried again by the next run.
FINAL = ("ok", "wrong", "out of memory", "time limit", "unsupported")

# What the layers are to reach: name, how many times as long the next one takes, who the others are, and whether one is.
GOALS = (
    ("linear_infsa", 1.5, "every comparator but mean pooling", lambda cls: cls is not peers.Mean),
    ("pure_infsa", 1.0, "every quadratic comparator", lambda cls: cls.QUADRATIC),
)
GOAL_PIXELS = (1024, 2048)


def key(row: dict) -> tuple:
    """What makes two rows the same measurement."""
    e = row.get("environment", {})
    return (
        *(row.get(f) for f in ("level", "device", "dtype", "name", "depth", "pixels", "phase", "way")),
        *(e.get(f) for f in ("device", "threads", "torch", "commit")),
    )


def load(path: Path) -> list[dict]:
    """The rows of a file, the last of each measurement."""
    if not path.exists():
        return []
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    return list({key(row): row for row in rows}.values())


def latest(rows: list[dict]) -> list[dict]:
    """Rows that may stand in one table: of the machine that measured last, and of each level's last commit there."""

    def machine(row):
        return tuple(row["environment"].get(f) for f in ("device", "threads", "torch"))

    rows = [r for r in rows if machine(r) == machine(rows[-1])]
    commits = {r["level"]: r["environment"].get("commit") for r in rows}
    return [r for r in rows if r["environment"].get("commit") == commits[r["level"]]]


def best(rows: list[dict], **fields) -> dict[str, dict]:
    """The fastest row of every mechanism among those that fit, or its first that tells why there is none."""
    chosen = {}
    for row in rows:
        if any(row.get(f) != value for f, value in fields.items()):
            continue
        known = chosen.get(row["name"])
        if known is None or row.get("median_s", float("inf")) < known.get("median_s", float("inf")):
            chosen[row["name"]] = row
    return chosen


def over_linear(row: dict, chosen: dict[str, dict]) -> float | None:
    """Its time over that of Linear-InfSA: of calls in turn with it, or else of its own row."""
    reference = row.get("baseline_s") or chosen.get("linear_infsa", {}).get("median_s")
    return row["median_s"] / reference if reference and "median_s" in row else None


def goals(rows: list[dict]) -> list[dict]:
    """The layer's goals, each with the comparator that came next, where the rows have times for both."""
    found = []
    for pixels in GOAL_PIXELS:
        for phase in ("fwd", "train"):
            chosen = {
                n: r for n, r in best(rows, level="layer", pixels=pixels, phase=phase).items() if r["status"] == "ok"
            }
            times = {n: over_linear(r, chosen) for n, r in chosen.items()}
            for name, least, others, among in GOALS:
                rivals = [n for n in chosen if n not in peers.OWN and among(peers.MECHANISMS[n][0])]
                if times.get(name) and rivals:
                    following = min(rivals, key=times.get)
                    ratio = times[following] / times[name]
                    found.append({
                        "name": name, "pixels": pixels, "phase": phase, "others": others, "next": following,
                        "ratio": ratio, "least": least, "reached": ratio >= least,
                    })  # fmt: skip
    return found


def sentence(goal: dict) -> str:
    what = f"{peers.label(goal['name'])}, layer, {goal['pixels']} x {goal['pixels']}, {goal['phase']}"
    outcome = "reached" if goal["reached"] else "MISSED"
    following = f"{goal['ratio']:.2f} x faster than {peers.label(goal['next'])}, the next of {goal['others']}"
    return f"{what}: {following} (goal {goal['least']:g}: {outcome})"


def text(rows: list[dict], level: str) -> str:
    """A table per depth, size and phase: the fastest first."""
    lines = []
    cases = dict.fromkeys((r.get("depth"), r["pixels"], r["phase"]) for r in rows if r["level"] == level)
    for depth, pixels, phase in cases:
        chosen = best(rows, level=level, depth=depth, pixels=pixels, phase=phase)
        if not any(r["status"] == "ok" for r in chosen.values()):
            continue
        what = f"{depth} layers, " if depth else ""
        lines.append(f"\n{level}, {what}{pixels} x {pixels}, N = {(pixels // 16) ** 2}, {phase}")
        lines.append(f"{'':<34}{'way':<11}{'time':>11}{'x Linear':>10}{'MB':>9}{'params':>13}{'error':>10}")
        for row in sorted(chosen.values(), key=lambda r: r.get("median_s", float("inf"))):
            if row["status"] != "ok":
                lines.append(f"{row['label']:<34}{row['status']}: {row['reason'][:80]}")
                continue
            over = over_linear(row, chosen)
            ratio = f"{over:.2f}" if over else "-"
            error = f"{row['error']:.0e}" if "error" in row else "-"
            memory = f"{row['peak_bytes'] / 1e6:.0f}" if "peak_bytes" in row else "-"
            lines.append(
                f"{row['label']:<34}{row['way']:<11}{row['median_s'] * 1e3:>8.2f} ms{ratio:>10}{memory:>9}"
                f"{row['parameters']:>13,}{error:>10}"
            )
    if level == "layer":
        lines += ["", *map(sentence, goals(rows))]
    return "\n".join(lines)

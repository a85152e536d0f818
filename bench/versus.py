"""`python -m bench.versus REV`: this working tree beside another revision of it, both measured by this tree's benchmark.

REV is checked out into a temporary folder, with this tree's bench/ instead of its own, and its extension is built there.
Every point is then measured by both in turn, several times; the noise of a row is the interval of its medians. A revision too
old for this tree's bench/ does not start, and says what it lacks.
"""

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from . import compare, field, peers
from .worker import ROOT, Worker

LEVELS = ("operator", "layer")
SIZES = (224, 1024)
NAMES = ("linear_infsa", "pure_infsa")
BUDGET = 0.3

# What bench/ takes from elsewhere.
TOLERANCE = Path("infsa_kernels/testing.py")


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    points = [p for level in args.levels for p in field.plan(level, args.only, args.sizes, args.device, compiled=False)]
    points = [p for p in points if p["way"] == "eager"]
    with checkout(args.rev, ROOT) as (root, commit):
        print(f"building {commit[:12]}", file=sys.stderr)
        build(root)
        rows = measure(points, {"a": root, "b": ROOT}, args)
    for row in rows["a"]:
        row["environment"] = {**row["environment"], "commit": commit[:12]}
    args.out.mkdir(parents=True, exist_ok=True)
    for side, found in rows.items():
        (args.out / f"{side}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return compare.show(*(compare.merge(rows[side]) for side in "ab"))


@contextlib.contextmanager
def checkout(rev: str, repository: Path) -> Iterator[tuple[Path, str]]:
    """A temporary folder with revision ``rev`` under this tree's harness, and its commit."""

    def git(*arguments):
        run = subprocess.run(["git", *map(str, arguments)], cwd=repository, capture_output=True, text=True)
        if run.returncode:
            raise SystemExit(f"git {' '.join(map(str, arguments))}: {run.stderr.strip()}")
        return run.stdout.strip()

    commit = git("rev-parse", "--verify", f"{rev}^{{commit}}")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "revision"
        git("worktree", "add", "--quiet", "--detach", root, commit)
        try:
            shutil.rmtree(root / "bench", ignore_errors=True)
            shutil.copytree(
                repository / "bench", root / "bench", ignore=shutil.ignore_patterns("out", "results", "__pycache__")
            )
            shutil.copy(repository / TOLERANCE, root / TOLERANCE)
            yield root, commit
        finally:
            git("worktree", "remove", "--force", root)


def build(root: Path) -> None:
    """Builds the extension in place, by this Python."""
    run = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=root, capture_output=True, text=True
    )
    if run.returncode:
        raise SystemExit(f"the revision does not build:\n{run.stdout[-2000:]}{run.stderr[-2000:]}")


def measure(points: list[dict], roots: dict[str, Path], args: argparse.Namespace) -> dict[str, list[dict]]:
    """A row per side, point and round; a side that gave no time for a point is not asked again."""
    rows = {side: [] for side in roots}
    with contextlib.ExitStack() as stack:
        workers = {side: stack.enter_context(Worker(args.device, BUDGET, root)) for side, root in roots.items()}
        for point in tqdm(points, unit="point", dynamic_ncols=True):
            failed = set()
            for turn in range(args.rounds):
                for side in sorted(workers, reverse=turn % 2 == 1):
                    if side not in failed:
                        row = workers[side].measure(point, args.limit)
                        row["environment"] = workers[side].environment
                        rows[side].append(row)
                        if row["status"] != "ok":
                            failed.add(side)
    return rows


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.versus", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rev", help="what stands as A in the table: a commit, branch or tag")
    parser.add_argument("--levels", type=lambda s: s.split(","), default=LEVELS, help="of operator,layer,model")
    parser.add_argument(
        "--only", type=field.names_of, default=NAMES, help=f"mechanisms, of {', '.join(peers.MECHANISMS)}"
    )
    parser.add_argument("--sizes", type=field.sizes_of, default=SIZES, help="sides of the picture in pixels")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=5, help="times that each point is measured on each side")
    parser.add_argument("--limit", type=float, default=60, help="seconds that a point may take")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "bench" / "out" / "versus", help="folder of a.jsonl and b.jsonl"
    )
    args = parser.parse_args(arguments)
    if unknown := set(args.levels) - set(field.LEVELS):
        parser.error(f"no level {', '.join(sorted(unknown))}; there are {', '.join(field.LEVELS)}")
    args.device = field.device_of(args.device)
    return args


if __name__ == "__main__":
    sys.exit(main())

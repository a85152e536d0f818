"""`make test`: the tests in three runs of pytest, and at the end what to do about those that failed.

    parallel       a process for each core
    alone          marked `alone`: they measure time, or need every core
    interpreter    marked `interpreter`: Triton's interpreter, which is chosen when Triton is imported

Arguments are pytest's. `make test-all` passes `-m sweep`: complete sweeps, of which `make test` runs a part.
"""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PARTS = ("parallel", "alone", "interpreter")
PASSED, INTERRUPTED, NOTHING_SELECTED = 0, 2, 5
SHOWN = 10


def main(arguments: list[str], command: str) -> int:
    codes, failed = {}, []
    for part in PARTS:
        print(f"== {part} ==", flush=True)
        # A cache for each, so that --lf knows what failed in which.
        cache = ROOT / ".pytest_cache" / part
        run = [sys.executable, "-m", "pytest", f"--part={part}", "-o", f"cache_dir={cache}", "--durations=10"]
        workers = [] if part == "alone" else ["-n", str(cores()), "--dist", "worksteal"]
        environment = {**os.environ, **({"TRITON_INTERPRET": "1"} if part == "interpreter" else {})}
        codes[part] = subprocess.call([*run, *workers, *arguments], cwd=ROOT, env=environment)
        if codes[part] == INTERRUPTED:
            break
        if codes[part] not in (PASSED, NOTHING_SELECTED):
            failed += last_failed(cache)
    wrong = [code for code in codes.values() if code not in (PASSED, NOTHING_SELECTED)]
    if wrong:
        print(advice({part for part, code in codes.items() if code in wrong}, failed, command))
        return wrong[0]
    return NOTHING_SELECTED if set(codes.values()) == {NOTHING_SELECTED} else PASSED


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def last_failed(cache: Path) -> list[str]:
    try:
        return list(json.loads((cache / "v" / "cache" / "lastfailed").read_text()))
    except FileNotFoundError:
        return []


def advice(parts: set[str], failed: list[str], command: str) -> str:
    """The last screen of a run that failed. Without the parameters of a test, whose names a shell would want quoted."""
    lines = ["", f"{command} failed in: {', '.join(sorted(parts))}"]
    lines += [f"  {name}" for name in failed[:SHOWN]]
    if len(failed) > SHOWN:
        lines.append(f"  and {len(failed) - SHOWN} more")
    one = failed[0].split("[")[0] if failed else "tests/ops/test_tables.py"
    lines += [
        "What next:",
        f'  {command} TEST_ARGS="{shlex.quote(one)} -x -vv"    one of them, in full',
        f'  {command} TEST_ARGS="--lf --lfnf=none"    all that failed, again',
        "  rm -r .venv, and again    if packages of .venv are not those of requirements/ (somebody installed others)",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ.get("RUN_BY", "make test")))

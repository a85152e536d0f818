"""A process that measures points: one that hangs, or takes all memory, costs its own row and nothing else.

`python -m bench.worker DEVICE BUDGET` reads a point per line of JSON and answers each with its row.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path

ROOT = Path(__file__).parent.parent
MARK = "@row "
START_SECONDS = 120
MEMORY_SHARE = 0.85


class Worker:
    """Answers points, each within a time; begins anew after one that did not."""

    def __init__(self, device: str, budget: float, root: Path = ROOT):
        self._command = [sys.executable, "-m", "bench.worker", device, str(budget)]
        self._root, self._process = root, None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._end()

    def measure(self, point: dict, limit: float) -> dict:
        """The point's row; a status of "time limit" or "out of memory" where the process gave none."""
        try:
            if self._process is None:
                self._start()
            self._process.stdin.write(json.dumps(point) + "\n")
            self._process.stdin.flush()
            return self._answer(limit)
        except queue.Empty:
            self._end()
            return {**point, "status": "time limit", "reason": f"no result in {limit:.0f} s"}
        except (EOFError, BrokenPipeError):
            code = self._process.wait()
            self._end()
            if code == -signal.SIGKILL:
                return {**point, "status": "out of memory", "reason": "killed by the system"}
            return {**point, "status": "unsupported", "reason": f"its process ended with code {code}"}

    def _start(self):
        environment = {**os.environ, "PYTHONPATH": str(self._root), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        self._process = subprocess.Popen(
            self._command, cwd=self._root, env=environment, text=True, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self._lines = queue.Queue()
        threading.Thread(target=self._read, args=(self._process.stdout, self._lines), daemon=True).start()
        self.environment = self._answer(START_SECONDS)

    @staticmethod
    def _read(stream, lines):
        for line in stream:
            if line.startswith(MARK):
                lines.put(json.loads(line.removeprefix(MARK)))
        lines.put(None)

    def _answer(self, limit: float) -> dict:
        found = self._lines.get(timeout=limit)
        if found is None:
            raise EOFError
        return found

    def _end(self):
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # with what it compiles
            self._process.wait()
            self._process.stdin.close()
            self._process = None


def main() -> None:
    import torch

    from . import machine, point

    warnings.filterwarnings("ignore")
    device, budget = torch.device(sys.argv[1]), float(sys.argv[2])
    if device.type == "cpu":
        limit_memory()
    print(MARK + json.dumps(machine.environment(device)), flush=True)
    for line in sys.stdin:
        row = point.measure(json.loads(line), device, budget)
        print(MARK + json.dumps(row), flush=True)


def limit_memory() -> None:
    """An allocation beyond what is available raises, before the system begins to kill."""
    from .measure import available_memory

    try:
        import resource

        with open("/proc/self/statm") as f:
            mapped = int(f.read().split()[0]) * resource.getpagesize()
    except (ImportError, OSError):
        return
    import torch

    most = mapped + int(MEMORY_SHARE * available_memory(torch.device("cpu")))
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))


if __name__ == "__main__":
    main()

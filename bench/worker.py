"""A process that measures turns: what hangs, or takes all memory, costs its own row and nothing else.

`python -m bench.worker DEVICE BUDGET FILE_DESCRIPTOR` receives turns. It says what it is building, and ends with the rows.
"""

import contextlib
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from multiprocessing.connection import Connection, Pipe
from pathlib import Path

import psutil
import torch

from . import engine, machine
from .engine import OVER, blank, passes
from .machine import ROOT

START_SECONDS = 120
MEMORY_SHARE = 0.85


class Worker:
    """Answers turns, each mechanism within a time; begins anew after one that did not."""

    def __init__(self, device: str, budget: float, root: Path = ROOT):
        self._command = [sys.executable, "-m", "bench.worker", device, str(budget)]
        self._root, self._process = root, None
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115

    def __enter__(self):
        try:
            self._start()
        except (TimeoutError, EOFError):
            self._end()
            self._errors.seek(0)
            said = self._errors.read().decode(errors="replace").strip()[-1000:]
            raise RuntimeError(f"the process that measures did not start in {self._root}:\n{said}") from None
        return self

    def __exit__(self, *_):
        self._end()
        self._errors.close()

    def measure(self, turn: dict, limit: float, tell=lambda name: None, end: float = math.inf) -> list[dict]:
        """The turn's rows; a status of "time limit" or "out of memory" for what gave none, and the rest without it.

        ``tell`` hears what is being built and checked; after ``end`` (of time.monotonic) all that is missing is over.
        """
        names, anchors, rows = list(turn["names"]), list(turn["anchors"]), []
        while names and time.monotonic() < end:
            at = None
            try:
                if self._process is None:
                    self._start()
                self._link.send({**turn, "names": names, "anchors": anchors, "seconds": end - time.monotonic()})
                said = {}
                while "rows" not in said:
                    seconds = limit if at else limit * len(names)
                    said = self._answer(min(seconds, end - time.monotonic()))
                    at = said.get("at")
                    tell(at)
                return rows + said["rows"]
            except TimeoutError:
                fault = {"status": "time limit", "reason": f"no result in {limit:.0f} s"}
            except (EOFError, ConnectionError):
                code = self._process.wait()
                fault = {"status": "unsupported", "reason": f"its process ended with code {code}"}
                if code == -signal.SIGKILL:
                    fault = {"status": "out of memory", "reason": "killed by the system"}
            self._end()
            if time.monotonic() >= end:
                break
            if at in anchors and at not in names:
                anchors.remove(at)
            elif at is None and len(names) > 1:  # while calls took turns: nobody knows whose fault it was
                alone = [self.measure({**turn, "names": [n], "anchors": anchors}, limit, tell, end) for n in names]
                return rows + [row for found in alone for row in found]
            else:
                at = at or names[0]
                rows += [blank(turn, at, which) | fault for which in passes(turn)]
                names.remove(at)
        return rows + [blank(turn, name, which) | OVER for name in names for which in passes(turn)]

    def _start(self):
        environment = {**os.environ, "PYTHONPATH": str(self._root), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        self._link, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [*self._command, str(theirs.fileno())], cwd=self._root, env=environment, start_new_session=True,
                pass_fds=[theirs.fileno()], stdout=subprocess.DEVNULL, stderr=self._errors,
            )  # fmt: skip
        self.environment = self._answer(START_SECONDS)

    def _answer(self, limit: float) -> dict:
        if not self._link.poll(max(0.0, limit)):
            raise TimeoutError
        return self._link.recv()

    def _end(self):
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # with what it compiles
            self._process.wait()
            self._link.close()
            self._process = None


def main() -> None:
    warnings.filterwarnings("ignore")
    device, budget, link = torch.device(sys.argv[1]), float(sys.argv[2]), Connection(int(sys.argv[3]))
    if device.type == "cpu":
        limit_memory()
    link.send(machine.environment(device))
    load_of_others = machine.OtherLoad()
    with contextlib.suppress(EOFError):
        while True:
            rows = engine.measure(link.recv(), device, budget, lambda name: link.send({"at": name}))
            link.send({"rows": [row | {"other_load": load_of_others.share()} for row in rows]})


def limit_memory() -> None:
    """An allocation beyond what is available raises, before the system begins to kill."""
    process = psutil.Process()
    if hasattr(process, "rlimit"):
        most = process.memory_info().vms + int(MEMORY_SHARE * psutil.virtual_memory().available)
        process.rlimit(psutil.RLIMIT_AS, (most, process.rlimit(psutil.RLIMIT_AS)[1]))


if __name__ == "__main__":
    main()

"""The tasks that the CPU operators cut a call into for any number of threads, and a model of equal threads that run them.

The operators are compiled from csrc/cpu with kernels that note what they are asked for and compute nothing (cpu_tasks.cpp).
"""

import ctypes
import functools
import heapq
import itertools
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.cpp_extension import get_cxx_compiler, include_paths, library_paths

from infsa_kernels.ops.register import RAW_OPS

ROOT = Path(__file__).parents[2]
OPERATORS = ("central_query", "library", "linear", "pool", "pure", "score_pool")
NAMESPACE = "infsa_counted"


class Task(NamedTuple):
    """One kernel call: its work, and for Pure what it adds to, of a head."""

    loop: int
    work: int
    head: int
    queries: int
    keys: int


@functools.cache
def _library() -> tuple[ctypes.CDLL, torch.library.Library]:
    with tempfile.TemporaryDirectory() as folder:
        sources = [*(ROOT / f"csrc/cpu/{name}.cpp" for name in OPERATORS), Path(__file__).with_suffix(".cpp")]
        flags = ["-std=c++17", "-O0", "-g0", "-fPIC", "-Wno-psabi", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
        includes = [f"-I{path}" for path in (ROOT / "csrc", *include_paths())]
        compilers = [
            subprocess.Popen([get_cxx_compiler(), *flags, *includes, "-c", str(s), "-o", f"{folder}/{s.stem}.o"])
            for s in sources
        ]
        codes = [compiler.wait() for compiler in compilers]
        assert not any(codes)
        target = f"{folder}/counted.so"
        # Its own torch_parallel_for and torch_get_num_threads, not torch's.
        link = [
            get_cxx_compiler(),
            "-shared",
            "-Wl,-Bsymbolic",
            *(f"{folder}/{s.stem}.o" for s in sources),
            "-o",
            target,
        ]
        subprocess.run(
            [*link, *(f"-L{path}" for path in library_paths()), "-ltorch", "-ltorch_cpu", "-lc10"], check=True
        )
        loaded = ctypes.CDLL(target)
    loaded.counted_tasks.restype = ctypes.POINTER(ctypes.c_int64)
    loaded.task_count.restype = ctypes.c_int64
    library = torch.library.Library(NAMESPACE, "DEF")
    for raw in RAW_OPS:
        for direction in ("fwd", "bwd"):
            schema = str(getattr(torch.ops.infsa, f"{raw.name}_{direction}").default._schema)
            library.define(schema.split("::", 1)[1])
    answer = ctypes.c_char_p()
    assert loaded.infsa_register(NAMESPACE.encode(), ctypes.byref(answer)), answer.value
    return loaded, library


def tasks_of(call: Callable[[object], object], threads: int) -> list[Task]:
    """What `call` makes of its operators, which it takes from the namespace that it is given, in their order."""
    library, _ = _library()
    library.begin_counting(threads)
    call(getattr(torch.ops, NAMESPACE))
    count, numbers = library.task_count(), library.counted_tasks()
    fields = len(Task._fields)
    return [Task(*numbers[i * fields : (i + 1) * fields]) for i in range(count)]


def loops_of(tasks: list[Task]) -> list[list[Task]]:
    return [list(loop) for _, loop in itertools.groupby(tasks, lambda task: task.loop)]


def busy_share(tasks: list[Task], threads: int) -> float:
    """Of the time that equal threads need: the next one that is free takes the next task, and waits for those before it that
    add to the same tokens."""
    span = 0.0
    for loop in loops_of(tasks):
        free, done = [0.0] * threads, {}
        for task in loop:
            needed = {(task.head, tokens) for tokens in (task.queries, task.keys) if task.head != -1 and tokens != -1}
            end = max(heapq.heappop(free), *(done.get(sums, 0.0) for sums in needed), 0.0) + task.work
            heapq.heappush(free, end)
            done |= dict.fromkeys(needed, end)
        span += max(free)
    return sum(task.work for task in tasks) / (threads * span)

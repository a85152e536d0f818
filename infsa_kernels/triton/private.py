"""The private parts of Triton that a launch uses to skip Triton's Python, each behind a test that it is what it was.

Tried with Triton 3.6 to 3.9. Where a later one has other insides, every launch goes through Triton's own `kernel[grid](...)`.
"""

import functools
import inspect
from typing import Any, NamedTuple

from triton import knobs

# What a launcher takes before the kernel's arguments; older ones name the first five.
TAKEN = ["gridX", "gridY", "gridZ", "stream", "function"]
TAKEN_TOO = ["kernel_metadata", "launch_metadata", "launch_enter_hook", "launch_exit_hook"]


class Started(NamedTuple):
    """What `kernel[grid](...)` compiled, loaded and started."""

    start: Any
    function: Any
    metadata: Any


def started(compiled) -> Started | None:
    """From the result of `kernel[grid](...)`; None in the interpreter, and where it cannot be started as this module knows."""
    try:
        found = Started(compiled.run, compiled.function, compiled.packed_metadata)
    except AttributeError:
        return None
    return found if _known(type(found.start)) else None


@functools.cache
def _known(launcher: type) -> bool:
    try:
        _, *names = inspect.signature(launcher.__call__).parameters
    except (AttributeError, TypeError, ValueError):
        return False
    return names in ([*TAKEN, "args"], [*TAKEN, *TAKEN_TOO, "args"])


def hooked(kernel) -> bool:
    """Whether somebody, as a profiler, waits for launches: only Triton's own way calls them."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave) or kernel.pre_run_hooks)

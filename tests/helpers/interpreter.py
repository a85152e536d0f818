"""Whether Triton's interpreter works here: a mark for the tests that start it."""

from importlib import metadata, util

import pytest


def _release(package: str) -> tuple[int, ...]:
    return tuple(int(part) for part in metadata.version(package).split(".")[:2])


def why_not() -> str | None:
    if util.find_spec("triton") is None:
        return "Triton is not installed"
    # It makes a number of an array of one element, in every loop bound.
    if _release("triton") < (3, 8) and _release("numpy") >= (2, 4):
        return f"the interpreter of Triton {metadata.version('triton')} needs numpy below 2.4"
    return None


needs_interpreter = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

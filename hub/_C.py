"""Stands for the extension module in a kernel of the hub, which one build serves for every Python: the library, by ctypes.

hub/layout.py puts it into the package and writes down below how the library was built.
"""

import ctypes

from .ops.extension import LIBRARY

_library = ctypes.CDLL(str(LIBRARY))
_library.infsa_ask.restype = ctypes.c_bool


def _ask(function: str) -> str:
    answer = ctypes.c_char_p()
    returned = _library.infsa_ask(function.encode(), ctypes.byref(answer))
    text = (answer.value or b"").decode()
    if not returned:
        raise ValueError(text)
    return text


def release_memory() -> int:
    return int(_ask("release_memory"))


def kept_memory() -> int:
    return int(_ask("kept_memory"))


def most_kept_memory() -> int:
    return int(_ask("most_kept_memory"))


cpu_isa = _ask("isa_name")

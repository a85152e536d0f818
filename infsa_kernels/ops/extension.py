"""The compiled part: the library of kernels and the module `infsa_kernels._C` beside it, and in words what keeps them out."""

import ctypes
import functools
import platform
import sys
import warnings
from importlib.machinery import EXTENSION_SUFFIXES, PathFinder
from pathlib import Path

import torch

# The folder is resolved, not the file: in the cache of the Hugging Face hub every file is a link to another place.
PACKAGE = Path(__file__).parent.parent.resolve()
LIBRARY = PACKAGE / "libinfsa_kernels.so"

# What this package is imported as. Another name than ours is that of one version on the hub, which has it to itself, and several
# may be in one process: so it is the namespace of their operators (docs/hub.md).
NAME = __name__.removesuffix(".ops.extension")
IS_OURS = NAME.rpartition(".")[2] == "infsa_kernels"
NAMESPACE = "infsa" if IS_OURS else NAME
torch_ops = getattr(torch.ops, NAMESPACE)


def load() -> str | None:
    """Loads the library, which registers the compiled kernels, and `_C`. Returns in a line why they are not there, or None."""
    if not LIBRARY.exists():
        if shadowed_package():
            warnings.warn(f"infsa_kernels runs its slower 'eager' backend: {_why_missing()}", stacklevel=4)
        return _why_missing()
    try:
        torch.ops.load_library(str(LIBRARY))
        _register_kernels()
        from .. import _C  # noqa: F401
    except (AttributeError, ImportError, OSError) as error:
        found = str(error).splitlines()[0] if str(error) else type(error).__name__
        if "cannot import name '_C'" in found:
            files = ", ".join(sorted(file.name for file in PACKAGE.glob("_C.*"))) or "none"
            found = f"of its module for Python {platform.python_version()}, _C{EXTENSION_SUFFIXES[0]}, there is {files}"
        return (
            f"the compiled extension does not load beside torch {torch.__version__} on {platform.system()} "
            f"{platform.machine()} ({found}); install the wheel for this platform, Python and CUDA, or build it again with "
            f"`{build_command()}`"
        )
    return None


def _register_kernels() -> None:
    """The kernels of the library that is loaded as those of our operators, whose schemas register.py defines."""
    wrong = ctypes.c_char_p()
    register = ctypes.CDLL(str(LIBRARY)).infsa_register
    register.restype = ctypes.c_bool
    if not register(NAMESPACE.encode(), ctypes.byref(wrong)):
        raise OSError(wrong.value.decode())


def in_source_folder() -> bool:
    return (PACKAGE.parent / "setup.py").is_file() and (PACKAGE.parent / "csrc").is_dir()


def build_command() -> str:
    """What builds the extension of this package anew."""
    if in_source_folder():
        return f"pip install --no-build-isolation --no-deps -e {PACKAGE.parent}"
    return "pip install --no-build-isolation --force-reinstall --no-deps ."


@functools.cache
def shadowed_package() -> Path | None:
    """The installed package, with its extension, that would be imported if this source folder did not come before it."""
    if not in_source_folder():
        return None
    for entry in sys.path:
        spec = PathFinder.find_spec("infsa_kernels", [entry])
        package = Path(spec.origin).parent.resolve() if spec and spec.origin else PACKAGE
        if package != PACKAGE and (package / LIBRARY.name).exists():
            return package
    return None


def _why_missing() -> str:
    if shadowed := shadowed_package():
        return (
            f"Python imports the source folder {PACKAGE}, in which no extension was built, and not the installed package "
            f"{shadowed}; start Python in another folder, or install in place with `{build_command()}`"
        )
    if in_source_folder():
        return (
            f"the compiled extension was not built in the source folder {PACKAGE.parent}; build it there with "
            f"`{build_command()}`, unless INFSA_NO_EXT=1 was to leave it out"
        )
    if not IS_OURS:
        return f"the variant {PACKAGE.name} of the hub has no compiled kernels"
    return "the compiled extension was not built (INFSA_NO_EXT=1)"

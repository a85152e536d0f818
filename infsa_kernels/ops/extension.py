"""The compiled part: the library of kernels and the module `infsa_kernels._C` beside it, and in words what keeps them out."""

import functools
import platform
import sys
import warnings
from importlib.machinery import EXTENSION_SUFFIXES, PathFinder
from pathlib import Path

import torch

PACKAGE = Path(__file__).resolve().parent.parent
LIBRARY = PACKAGE / "libinfsa_kernels.so"


def load() -> str | None:
    """Loads the library, which registers the compiled kernels, and `_C`. Returns in a line why they are not there, or None."""
    if not LIBRARY.exists():
        if shadowed_package():
            warnings.warn(f"infsa_kernels runs its slower 'eager' backend: {_why_missing()}", stacklevel=4)
        return _why_missing()
    try:
        torch.ops.load_library(str(LIBRARY))
        from .. import _C  # noqa: F401
    except (ImportError, OSError) as error:
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
        package = Path(spec.origin).resolve().parent if spec and spec.origin else PACKAGE
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
    return "the compiled extension was not built (INFSA_NO_EXT=1)"

"""The compiled extension `infsa_kernels._C`: loading it, and in words what keeps it from loading."""

import functools
import sys
import warnings
from importlib.machinery import EXTENSION_SUFFIXES, PathFinder
from pathlib import Path

import torch

PACKAGE = Path(__file__).resolve().parent.parent


def load() -> str | None:
    """Loads `_C`, which registers the compiled kernels. Returns why there is none, or None."""
    try:
        from .. import _C
    except ImportError as error:
        if "cannot import name '_C'" not in str(error):
            return (
                f"the compiled extension does not load beside torch {torch.__version__} ({error}); build it again with "
                f"`{build_command()}`"
            )
        if shadowed_package():
            warnings.warn(f"infsa_kernels runs its slower 'eager' backend: {_why_missing()}", stacklevel=4)
        return _why_missing()
    if _C.torch_version.split("+")[0] != torch.__version__.split("+")[0]:
        warnings.warn(
            f"infsa_kernels was built for torch {_C.torch_version} and runs beside torch {torch.__version__}; if anything "
            f"fails, build it again with `{build_command()}`",
            stacklevel=4,
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
        if package != PACKAGE and any((package / f"_C{suffix}").exists() for suffix in EXTENSION_SUFFIXES):
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

"""Builds `infsa_kernels._C` with torch.utils.cpp_extension; everything else about the package is in pyproject.toml.

INFSA_NO_EXT=1   no extension: a pure-Python install that runs on torch operations
MAX_JOBS=n       parallel compilations; by default as many as cores and free memory allow
"""

import os
import sys
from pathlib import Path

from setuptools import setup

try:
    from torch.utils import cpp_extension
except ImportError:
    sys.exit(
        "infsa_kernels is built against the torch that it will run with, and this Python has none. "
        "Run: pip install torch setuptools ninja && pip install --no-build-isolation ."
    )

# A translation unit of the kernels takes about this much memory to compile.
COMPILER_GIB = 1.5


def extensions() -> list:
    if os.environ.get("INFSA_NO_EXT") == "1":
        return []
    if sys.platform == "win32":
        sys.exit(
            "infsa_kernels: the C++ kernels need GCC or Clang vector extensions; set INFSA_NO_EXT=1 to install without"
        )
    if os.environ.get("FORCE_CUDA") == "1":
        sys.exit("infsa_kernels: FORCE_CUDA=1 asks for CUDA C++ kernels, and this version has none; unset it")
    sources = sorted(str(path) for path in Path("csrc").glob("**/*.cpp"))
    flags = ["-O3", "-g0", "-ffp-contract=fast", "-fvisibility=hidden", "-Wno-psabi"]
    # OpenMP at compile time only: the runtime is the one torch has already loaded, never a second one beside it.
    openmp = ["-fopenmp"] if sys.platform == "linux" else []
    return [
        cpp_extension.CppExtension(
            "infsa_kernels._C",
            sources,
            include_dirs=[str(Path("csrc").resolve())],
            depends=sorted(str(path) for path in Path("csrc").glob("**/*.h")),
            extra_compile_args=flags + openmp,
        )
    ]


def max_jobs() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        free_gib = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    except (ValueError, OSError):
        return cores
    return max(1, min(cores, int(free_gib / COMPILER_GIB)))


os.environ.setdefault("MAX_JOBS", str(max_jobs()))
setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": cpp_extension.BuildExtension.with_options(no_python_abi_suffix=False)},
)

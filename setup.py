"""Builds `infsa_kernels._C` with torch.utils.cpp_extension; everything else about the package is in pyproject.toml.

INFSA_NO_EXT=1             no extension: a pure-Python install that runs on torch operations
FORCE_CUDA=1               CUDA kernels or an error; FORCE_CUDA=0: none. By default: if torch is a CUDA build and nvcc is there
TORCH_CUDA_ARCH_LIST=...   what to compile CUDA kernels for; by default the GPUs of this machine, without one 8.0;9.0a;10.0;12.0
MAX_JOBS=n                 parallel compilations; by default as many as cores and free memory allow
"""

import os
import re
import sys
from pathlib import Path

from setuptools import setup

try:
    import torch
    from torch.utils import cpp_extension
except ImportError:
    sys.exit(
        "infsa_kernels is built against the torch that it will run with, and this Python has none. "
        "Run: pip install torch setuptools ninja && pip install --no-build-isolation ."
    )

# A translation unit of the kernels takes about this much memory to compile.
COMPILER_GIB = 1.5

# Ampere, Hopper (with its clusters and asynchronous copies), Blackwell of data centres and of desktops.
DEFAULT_ARCHITECTURES = "8.0;9.0a;10.0;12.0"


def extensions() -> list:
    if os.environ.get("INFSA_NO_EXT") == "1":
        return []
    if sys.platform == "win32":
        sys.exit(
            "infsa_kernels: the C++ kernels need GCC or Clang vector extensions; set INFSA_NO_EXT=1 to install without"
        )
    cuda = with_cuda()
    folders, patterns = ["csrc/cpu", *(["csrc/cuda"] if cuda else [])], ("*.cpp", "*.cu")
    sources = ["csrc/module.cpp", *(str(p) for f in folders for pattern in patterns for p in Path(f).glob(pattern))]
    flags = ["-O3", "-g0", "-ffp-contract=fast", "-fvisibility=hidden", "-Wno-psabi"]
    # OpenMP at compile time only: the runtime is the one torch has already loaded, never a second one beside it.
    openmp = ["-fopenmp"] if sys.platform == "linux" else []
    options = {"cxx": flags + openmp}
    if cuda:
        architectures = architecture_list()
        options["cxx"].append(f"-DINFSA_CUDA_ARCH_LIST={','.join(architectures)}")
        options["nvcc"] = ["-O3", "-Xcompiler", "-fvisibility=hidden"]
    extension = cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension
    headers = (str(path) for pattern in ("*.h", "*.cuh") for path in Path("csrc").rglob(pattern))
    return [
        extension(
            "infsa_kernels._C",
            sorted(sources),
            include_dirs=[str(Path("csrc").resolve())],
            depends=sorted(headers),
            extra_compile_args=options,
        )
    ]


def with_cuda() -> bool:
    """Whether to compile CUDA kernels. A request that cannot be met ends the build."""
    wanted = os.environ.get("FORCE_CUDA", "")
    if wanted not in ("", "0", "1"):
        sys.exit(f"infsa_kernels: FORCE_CUDA is {wanted!r}, expected 1, 0 or nothing")
    missing = None
    if torch.version.cuda is None:
        missing = (
            f"torch {torch.__version__} is not a CUDA build; install one that is, as by `pip install torch` on Linux"
        )
    elif (home := cuda_toolkit()) is None:
        missing = (
            f"there is no CUDA toolkit at {cpp_extension.CUDA_HOME or '/usr/local/cuda'}; install that of CUDA "
            f"{torch.version.cuda}, and set CUDA_HOME to its folder"
        )
    else:
        cpp_extension.CUDA_HOME = home
    if wanted == "1" and missing:
        sys.exit(
            f"infsa_kernels: FORCE_CUDA=1 asks for CUDA kernels, but {missing}. Or unset FORCE_CUDA: no CUDA kernels"
        )
    return wanted != "0" and missing is None


def cuda_toolkit() -> str | None:
    """CUDA_HOME; or, if that is not set, where torch thinks nvcc lives, unless only a link or a script of that name does."""
    guesses = [cpp_extension.CUDA_HOME, *([] if "CUDA_HOME" in os.environ else ["/usr/local/cuda"])]
    whole = (
        g for g in guesses if g and Path(g, "bin", "nvcc").exists() and Path(g, "include", "cuda_runtime.h").exists()
    )
    return next(whole, None)


def architecture_list() -> list[str]:
    """What nvcc compiles for, as torch's own build rules read it from TORCH_CUDA_ARCH_LIST."""
    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
        capabilities = sorted({torch.cuda.get_device_capability(gpu) for gpu in gpus})
        # Hopper's own instructions need its own target.
        here = [f"{major}.{minor}{'a' * (major == 9)}" for major, minor in capabilities]
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(here) or DEFAULT_ARCHITECTURES
    return re.split(r"[;\s]+", os.environ["TORCH_CUDA_ARCH_LIST"].strip())


def max_jobs() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        free_gib = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    except (ValueError, OSError):
        return cores
    return max(1, min(cores, int(free_gib / COMPILER_GIB)))


def version(compiled: bool) -> str:
    """A compiled package fits one torch and one CUDA only, so its wheel says which: 0.1.0+torch2.13.cpu."""
    public = re.search(r'__version__ = "(.+)"', Path("infsa_kernels/__init__.py").read_text())[1]
    if not compiled:
        return public
    major, minor = torch.__version__.split(".")[:2]
    cuda = f"cu{torch.version.cuda.replace('.', '')}" if with_cuda() else "cpu"
    return f"{public}+torch{major}.{minor}.{cuda}"


os.environ.setdefault("MAX_JOBS", str(max_jobs()))
modules = extensions()
setup(
    version=version(bool(modules)),
    ext_modules=modules,
    cmdclass={"build_ext": cpp_extension.BuildExtension.with_options(no_python_abi_suffix=False)},
)

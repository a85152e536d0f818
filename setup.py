"""Builds the compiled part with torch.utils.cpp_extension; everything else about the package is in pyproject.toml.

It is two files: libinfsa_kernels.so holds the operators on torch's stable C interface, and so fits every torch from 2.10 on;
the extension module `_C` beside it, which has nothing of torch, tells how that was built.

INFSA_NO_EXT=1             nothing compiled: a pure-Python install that runs on torch operations
FORCE_CUDA=1               CUDA kernels or an error; FORCE_CUDA=0: none. By default: if torch is a CUDA build and nvcc is there
TORCH_CUDA_ARCH_LIST=...   what to compile CUDA kernels for; by default the GPUs of this machine, without one 8.0;9.0a;10.0;12.0
MAX_JOBS=n                 parallel compilations; by default as many as cores and free memory allow

The folder build/ is kept between builds, and only what is still true of it is used: see `BuildExtension`.
"""

import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

try:
    import torch
    from torch.utils import cpp_extension
except ImportError:
    sys.exit(
        "infsa_kernels is built with the headers of a torch, and this Python has none. "
        "Run: pip install torch setuptools ninja && pip install --no-build-isolation -e ."
    )

# A translation unit of the kernels takes about this much memory to compile.
COMPILER_GIB = 1.5

# Ampere, Hopper (with its clusters and asynchronous copies), Blackwell of data centres and of desktops.
DEFAULT_ARCHITECTURES = "8.0;9.0a;10.0;12.0"

LIBRARY, MODULE = "infsa_kernels.libinfsa_kernels", "infsa_kernels._C"

# The oldest torch whose stable interface has all that csrc needs. README and pyproject.toml name it too.
TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"


def extensions() -> list:
    """The library, and the module that is linked against it."""
    if os.environ.get("INFSA_NO_EXT") == "1":
        return []
    if sys.platform == "win32":
        sys.exit(
            "infsa_kernels: the C++ kernels need GCC or Clang vector extensions; set INFSA_NO_EXT=1 to install without"
        )
    cuda = with_cuda()
    patterns = ["csrc/module.cpp", "csrc/cpu/*.cpp", *(["csrc/cuda/*.cpp", "csrc/cuda/*.cu"] if cuda else [])]
    module, *sources = (path for pattern in patterns for path in sources_of(pattern))
    flags = ["-O3", "-g0", "-ffp-contract=fast", "-fvisibility=hidden", "-Wno-psabi"]
    include = str(Path("csrc").resolve())
    headers = sorted(str(path) for pattern in ("*.h", "*.cuh") for path in Path("csrc").rglob(pattern))
    options, facts = {"cxx": [*flags, TARGET]}, []
    if cuda:
        # The first opens the part of torch's interface that is about CUDA.
        options = {"cxx": [*flags, TARGET, "-DUSE_CUDA"], "nvcc": ["-O3", "-Xcompiler", "-fvisibility=hidden"]}
        facts = [f"-DINFSA_CUDA_ARCH_LIST={','.join(architecture_list())}"]
    library = (cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension)(
        LIBRARY, sorted(sources), include_dirs=[include], depends=headers, extra_compile_args=options
    )
    library.libraries.remove("torch_python")
    # Without TARGET, beside which torch 2.10's pybind11 does not compile.
    module = Extension(
        MODULE,
        [module],
        include_dirs=[include, *cpp_extension.include_paths()],
        depends=headers,
        libraries=["infsa_kernels"],
        extra_compile_args=[*flags, *facts],
        extra_link_args=["-Wl,-rpath,$ORIGIN"],
        language="c++",
    )
    return [library, module]


def sources_of(pattern) -> list[str]:
    found = [str(path) for path in Path().glob(pattern)]
    if not found:
        sys.exit(
            f"infsa_kernels: there is no {pattern} in {Path.cwd()}, and no extension without it; build from a whole clone "
            "of the repository or from a source distribution that `python -m build --sdist --no-isolation` makes there"
        )
    return found


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


def public_version() -> str:
    return re.search(r'__version__ = "(.+)"', Path("infsa_kernels/__init__.py").read_text())[1]


def version(compiled: bool) -> str:
    """A wheel with CUDA kernels fits one major version of CUDA, so it says which: 0.1.0+cu13.

    What is built from a source distribution keeps that one's version: pip and uv take no other from it.
    """
    if not compiled or Path("PKG-INFO").exists() or not with_cuda():
        return public_version()
    return f"{public_version()}+cu{torch.version.cuda.split('.')[0]}"


# What compilers and linkers read beside their command line.
ENVIRONMENT = (
    "CC", "CXX", "CFLAGS", "CXXFLAGS", "CPPFLAGS", "LDFLAGS", "CPATH", "CPLUS_INCLUDE_PATH", "LIBRARY_PATH", "PYTORCH_NVCC",
    "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "TORCH_CUDA_ARCH_LIST",
)  # fmt: skip


class BuildExtension(cpp_extension.BuildExtension):
    """Compiles again whatever another torch, CUDA, compiler or flag has compiled, or other sources than these.

    Ninja compares command lines and file times: it sees no new torch or compiler in the old place, and no file that is newer
    than the one before it but older than the object, as an unpacked archive has. Without ninja only the times of our sources
    are compared. So build/ keeps a note of what its objects were made from.
    """

    def build_extensions(self):
        if self.extensions:
            self.drop_what_was_made_otherwise()
        super().build_extensions()

    def get_ext_filename(self, name):
        """The library's has no Python in it; name is with its package, or without."""
        is_library = LIBRARY.endswith(name)
        return f"{name.replace('.', os.sep)}.so" if is_library else super().get_ext_filename(name)

    def build_extension(self, extension):
        """In a folder of its own: ninja's notes there are of one extension."""
        folder = self.build_temp
        self.build_temp = os.path.join(folder, extension.name.rpartition(".")[2])
        if extension.name == MODULE:
            extension.library_dirs = [os.path.dirname(os.path.abspath(self.get_ext_fullpath(LIBRARY)))]
        super().build_extension(extension)
        self.build_temp = folder

    def drop_what_was_made_otherwise(self):
        folder = Path(self.build_temp)
        note = folder / "made_from.json"
        made = [Path(self.get_ext_fullpath(extension.name)) for extension in self.extensions]
        sources = {path for extension in self.extensions for path in (*extension.sources, *extension.depends)}
        now = {"facts": self.facts(made), "sources": digests(sources)}
        try:
            then, written = json.loads(note.read_text()), note.stat().st_mtime
            # A source that changed since is a matter for ninja; unless its time says that it did not.
            changed = [path for path, digest in now["sources"].items() if then["sources"].get(path) != digest]
            stale = then["facts"] != now["facts"] or any(Path(path).stat().st_mtime <= written for path in changed)
        except (OSError, ValueError):
            stale, changed = True, []
        if stale:
            for old in (*folder.rglob("*.o"), *made):
                old.unlink(missing_ok=True)
        elif not changed:
            return
        folder.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps(now, indent=1))

    def facts(self, made) -> dict:
        """Whatever decides, beside the sources, what the objects and the two files become."""
        compiler = {name: getattr(self.compiler, name) for name in ("compiler_so", "compiler_so_cxx", "linker_so_cxx")
                    if hasattr(self.compiler, name)}  # fmt: skip
        tools = {cpp_extension.get_cxx_compiler(), *(command[0] for command in compiler.values() if command)}
        options = [extension.extra_compile_args for extension in self.extensions]
        if any(isinstance(of, dict) and "nvcc" in of for of in options):
            tools.add(os.path.join(cpp_extension.CUDA_HOME, "bin", "nvcc"))
        facts = {
            "torch": [torch.__version__, torch.version.git_version, torch.version.cuda, torch.__file__],
            "python": sys.version,
            "compiler": compiler,
            "tools": {tool: tool_version(tool) for tool in sorted(tools)},
            "environment": {name: os.environ.get(name) for name in ENVIRONMENT},
            "extensions": [{n: x for n, x in vars(e).items() if n != "depends"} for e in self.extensions],
            "ninja": self.use_ninja,
            "made": [str(path.resolve()) for path in made],
        }
        return json.loads(json.dumps(facts, default=str))


def digests(paths) -> dict[str, str]:
    return {path: hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in sorted(paths)}


def tool_version(command: str) -> str:
    try:
        return subprocess.run([*shlex.split(command), "--version"], capture_output=True, text=True).stdout
    except OSError:
        return ""


class BuildPython(build_py):
    """Copies every module anew, whatever the file times say, and leaves out those that are no longer there."""

    def run(self):
        self.force = True
        for old in Path(self.build_lib, "infsa_kernels").rglob("*.py"):
            if not old.relative_to(self.build_lib).exists():
                old.unlink()
        super().run()


class SourceDistribution(sdist):
    """It fits every CUDA, so its version names none."""

    def run(self):
        metadata, compiled = self.distribution.metadata, self.distribution.metadata.version
        for version, run in ((public_version(), super().run), (compiled, lambda: None)):
            metadata.version = version
            self.reinitialize_command("egg_info")
            run()


os.environ.setdefault("MAX_JOBS", str(max_jobs()))
modules = extensions()
setup(
    version=version(bool(modules)),
    ext_modules=modules,
    cmdclass={
        "build_ext": BuildExtension.with_options(no_python_abi_suffix=False),
        "build_py": BuildPython,
        "sdist": SourceDistribution,
    },
)

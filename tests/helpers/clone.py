"""A clone of this repository that compiles in a second, and a Python to install it into.

Its library has no kernels, and its module holds build facts, as the real one does, and no memory.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
BUILT = [ROOT / name for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")]

MODULE = """
#include <Python.h>
#include "facts.h"
static PyObject* nothing(PyObject*, PyObject*) { return PyLong_FromLong(0); }
static PyMethodDef functions[] = {{"release_memory", nothing, METH_NOARGS, nullptr},
                                  {"kept_memory", nothing, METH_NOARGS, nullptr},
                                  {"most_kept_memory", nothing, METH_NOARGS, nullptr},
                                  {nullptr, nullptr, 0, nullptr}};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, functions};
PyMODINIT_FUNC PyInit__C() {
  PyObject* m = PyModule_Create(&module);
  PyModule_AddStringConstant(m, "torch_version", TORCH);
  PyModule_AddStringConstant(m, "compiler", COMPILER);
  PyModule_AddStringConstant(m, "cpu_isa", "none");
  PyModule_AddStringConstant(m, "cuda_arch_list", "");
  return m;
}
"""

LIBRARY = """
extern "C" __attribute__((visibility("default"))) bool infsa_register(const char*, const char**) { return true; }
"""


def environment(**more) -> dict[str, str]:
    """This process's, without what would reach into the clone or out of it."""
    reaching = ("PYTHON", "INFSA", "FORCE_CUDA", "CFLAGS", "CXXFLAGS", "CPPFLAGS", "LDFLAGS", "PIP_")
    return {name: value for name, value in os.environ.items() if not name.startswith(reaching)} | more


def run(*command, cwd, check=True, **more) -> subprocess.CompletedProcess:
    outcome = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment(**{"FORCE_CUDA": "0", **more}), capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip
    assert not check or outcome.returncode == 0, outcome.stdout + outcome.stderr
    return outcome


def copy_package(folder: Path, parent: Path = ROOT) -> Path:
    ignored = shutil.ignore_patterns("*.so", "*.pyd", "__pycache__")
    return Path(shutil.copytree(parent / "infsa_kernels", folder / "infsa_kernels", ignore=ignored))


def make(folder: Path) -> Path:
    """The clone: our package and build files, and a small csrc."""
    for file in BUILT:
        shutil.copy(file, folder)
    copy_package(folder)
    (folder / "csrc/cpu").mkdir(parents=True)
    (folder / "csrc/cuda").mkdir()
    (folder / "csrc/module.cpp").write_text(MODULE)
    (folder / "csrc/facts.h").write_text(f'#define TORCH "{torch.__version__}"\n#define COMPILER "that of the tests"\n')
    (folder / "csrc/cpu/nothing.cpp").write_text(LIBRARY)
    (folder / "csrc/cuda/nothing.cu").write_text("int nothing_cuda() { return 0; }\n")
    (folder / "csrc/cuda/nothing_op.cpp").write_text("int nothing_op() { return 0; }\n")
    return folder


def remove_compiled(folder: Path) -> None:
    """What a build in place has left in the package."""
    for file in folder.glob("infsa_kernels/*.so"):
        file.unlink()


def make_python(folder: Path) -> Path:
    """An empty environment that sees, behind its own packages, those of this Python."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin/python"
    own = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).stdout.strip()
    host = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), str(Path(torch.__file__).parent.parent)}
    Path(own, "host.pth").write_text("\n".join(sorted(host)) + "\n")
    return python


def install(python: Path, *arguments, cwd: Path, **more):
    offline = "--no-index", "--no-deps", "--no-build-isolation"
    return run(
        python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *offline, *arguments, cwd=cwd, **more
    )

"""What an installed package does when it is imported, whole, without its extension, and with a broken one."""

import os
import platform
import re
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch

import infsa_kernels
from infsa_kernels.ops.backends import SUFFIXES
from infsa_kernels.ops.extension import LIBRARY

PACKAGE = Path(infsa_kernels.__file__).parent
compiled = pytest.mark.skipif(not LIBRARY.exists(), reason="no extension was built here (INFSA_NO_EXT=1)")


def python(*arguments, path, **options):
    """Runs Python away from the source tree, with the package of one folder.

    Without `site`: the finder of an editable install would bring the extension back.
    """
    return subprocess.run(
        [sys.executable, "-S", *arguments],
        cwd=path,
        env={"PYTHONPATH": os.pathsep.join((str(path), str(Path(torch.__file__).parent.parent))), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        **options,
    )


@pytest.fixture(scope="module")
def without_extension(tmp_path_factory):
    """The folder of a pure-Python install, as INFSA_NO_EXT=1 makes."""
    path = tmp_path_factory.mktemp("pure_python")
    shutil.copytree(PACKAGE, path / PACKAGE.name, ignore=shutil.ignore_patterns("*.so", "*.pyd", "__pycache__"))
    return path


@pytest.mark.alone
def test_import_is_light():
    """It takes less time than torch's own import, loads nothing that it may not need and never initialises CUDA."""
    script = """
import sys, time
start = time.perf_counter()
import torch
middle = time.perf_counter()
import torch.utils.flop_counter  # torch's registry of FLOP formulas, which itself loads Triton where that is installed
before = set(sys.modules)
import infsa_kernels
end = time.perf_counter()
assert end - middle < (middle - start) / 2, (middle - start, end - middle)
import infsa_kernels.nn
new = set(sys.modules) - before
heavy = ("triton", "numpy", "matplotlib", "torch._dynamo", "torch._inductor", "torch.distributed.tensor", "sympy",
         "timm", "torchvision", "transformers")
assert not [m for m in new if m.startswith(heavy)], new
assert not torch.cuda.is_initialized()
"""
    python("-c", script, path=PACKAGE.parent)


EVERYTHING = """
import warnings
import torch
import infsa_kernels
from infsa_kernels import reference

q, k, v = (torch.randn(2, 3, 5, 8, requires_grad=True) for _ in range(3))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        for op in ("linear", "pure"):
            out = getattr(torch.ops.infsa, op)(q, k, v)
            torch.testing.assert_close(out, getattr(reference, op)(q, k, v))
            out.sum().backward()
            infsa_kernels.infsa_attention(q, q, v, f"{op}_infsa").sum().backward()
print(*(w.message for w in caught if "infsa" in str(w.message)), sep="\\n")
"""


def test_without_extension_everything_runs_and_warns_once(without_extension):
    (warning,) = python("-c", EVERYTHING, path=without_extension).stdout.splitlines()
    assert warning.startswith(
        "infsa_kernels runs its slower 'eager' backend: 'cpu' cannot run: the compiled extension was"
    )
    assert "INFSA_NO_EXT=1" in warning


def test_missing_backend_says_why(without_extension):
    script = """
import torch
import infsa_kernels
try:
    with infsa_kernels.backend("cpu"):
        torch.ops.infsa.linear(*torch.randn(3, 1, 1, 2, 4))
except RuntimeError as error:
    print(error)
"""
    message = python("-c", script, path=without_extension).stdout
    assert "backend 'cpu' cannot run this call: the compiled extension was not built" in message


@pytest.mark.sweep
def test_broken_extension_says_how_to_mend_it(without_extension, tmp_path):
    """A file that the loader refuses, as one for another platform is, leaves a working package and one readable line."""
    shutil.copytree(without_extension, tmp_path, dirs_exist_ok=True)
    (tmp_path / PACKAGE.name / LIBRARY.name).write_bytes(b"not a shared library")
    (warning,) = python("-c", EVERYTHING, path=tmp_path).stdout.splitlines()
    assert (
        f"the compiled extension does not load beside torch {torch.__version__} on {platform.system()} {platform.machine()} ("
        in warning
    )
    assert LIBRARY.name in warning and "install the wheel for this platform, Python and CUDA" in warning
    assert "pip install --no-build-isolation --force-reinstall" in warning


@compiled
@pytest.mark.sweep
def test_a_wheel_for_another_python_says_so(without_extension, tmp_path):
    shutil.copytree(without_extension, tmp_path, dirs_exist_ok=True)
    shutil.copy(LIBRARY, tmp_path / PACKAGE.name)
    (tmp_path / PACKAGE.name / "_C.cpython-39-x86_64-linux-gnu.so").touch()
    (warning,) = python("-c", EVERYTHING, path=tmp_path).stdout.splitlines()
    assert (
        f"(of its module for Python {platform.python_version()}, _C{EXTENSION_SUFFIXES[0]}, there is _C.cpython-39"
        in warning
    )


@compiled
def test_the_library_has_nothing_of_torch_but_its_stable_interface():
    """Of the system's libraries, and that of C++, whatever it likes; of torch C functions, and of OpenMP and Python nothing."""
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", LIBRARY], capture_output=True, text=True, check=True
    ).stdout
    needed = {line.split()[-1].partition("@")[0] for line in listed.splitlines()}
    of_torch = {name for name in needed if "torch" in name.lower()}
    assert of_torch and all(re.fullmatch(r"(aoti_)?torch_\w+", name) for name in of_torch), sorted(of_torch)
    foreign = {name for name in needed if re.match(r"_ZNK?(2at|3c10|5caffe2|5torch)|_?Py|GOMP|omp_|__kmpc", name)}
    assert not foreign


@compiled
def test_the_module_has_nothing_of_torch():
    from infsa_kernels import _C

    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", _C.__file__], capture_output=True, text=True, check=True
    ).stdout
    assert "torch" not in listed and "infsa" in listed


@pytest.mark.parametrize("whole", [True, False])
def test_info(whole, without_extension):
    report = python("-m", "infsa_kernels.info", path=PACKAGE.parent if whole else without_extension).stdout
    for word in (infsa_kernels.__version__, "torch", "triton", "python", "extension", "cpu", *SUFFIXES):
        assert word in report
    for line in report.splitlines():
        if "does not run" in line:
            assert len(line.split("does not run: ")[1]) > 10
    assert ("for every torch from 2.10 on" in report) == (whole and LIBRARY.exists())


def test_extension_holds_build_facts_and_the_memory_that_it_keeps_and_no_operator():
    _C = pytest.importorskip("infsa_kernels._C", reason="no extension was built here (INFSA_NO_EXT=1)")
    others = {name for name, x in vars(_C).items() if not name.startswith("__") and not isinstance(x, str)}
    assert others == {"release_memory", "kept_memory", "most_kept_memory"}


def imported_twice(path, *lines) -> str:
    """What a second import says, after these lines."""
    script = "import torch, sys, importlib, infsa_kernels\n" + "\n".join(lines)
    return python(
        "-c", f"{script}\ntry:\n    import infsa_kernels\nexcept RuntimeError as error:\n    print(error)", path=path
    ).stdout


FORGET = "for name in [n for n in sys.modules if n.startswith('infsa_kernels')]: del sys.modules[name]"


@pytest.mark.sweep
def test_a_second_copy_is_refused_with_both_places(without_extension):
    message = imported_twice(without_extension, FORGET, f"sys.path.insert(0, {str(PACKAGE.parent)!r})")
    assert message.startswith(
        f"infsa_kernels was imported from {without_extension / PACKAGE.name} before in this process, and now there is a second "
        f"copy at {PACKAGE}; "
    )
    assert "uninstall one copy or take its folder from sys.path, and start Python anew" in message


def test_a_second_import_of_the_same_copy_is_refused_in_plain_words(without_extension):
    message = imported_twice(without_extension, FORGET)
    assert message.startswith(
        f"infsa_kernels was imported from {without_extension / PACKAGE.name} before in this process"
    )
    assert "start Python anew" in message and "TORCH_LIBRARY" not in message


USED = """
import importlib
import torch
import infsa_kernels
import infsa_kernels.nn

importlib.reload(infsa_kernels)
importlib.reload(infsa_kernels.nn)
q = torch.randn(2, 3, 5, 8, requires_grad=True)
reasons = infsa_kernels.explain_backend("linear", q.device, q.dtype, q.shape)
with infsa_kernels.backend(next(name for name, reason in reasons.items() if reason is None)):
    for op in ("linear", "pure"):
        infsa_kernels.infsa_attention(q, q, q, f"{op}_infsa").sum().backward()
        getattr(torch.ops.infsa, op)(q, q, q)
    layers = torch.nn.TransformerEncoderLayer(8, 2, batch_first=True)
    model = infsa_kernels.nn.convert(layers, variant="linear_infsa").model
    model(torch.randn(2, 5, 8)).sum().backward()
    try:
        infsa_kernels.linear_infsa(q, q, q, eps=0.0)
    except ValueError as error:
        print(error)
"""


@pytest.mark.parametrize("flags", [("-W", "error"), pytest.param(("-OO",), marks=pytest.mark.sweep)], ids=" ".join)
def test_interpreter_flags(flags):
    """No warning on the way, nothing that needs docstrings or assertions, and names that survive a reload."""
    assert "eps is 0, expected" in python(*flags, "-c", USED, path=PACKAGE.parent).stdout

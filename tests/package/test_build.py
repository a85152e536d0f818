"""Builds: what setup.py decides before it compiles, when it compiles again, and what a source distribution holds."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from helpers import clone

import infsa_kernels

ROOT = Path(__file__).parents[2]
without_cuda = pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is a CUDA build")
beside_cuda = pytest.mark.skipif(torch.version.cuda is None, reason="this torch is not a CUDA build")


def setup(*arguments, **environment):
    clean = {k: v for k, v in os.environ.items() if k not in ("FORCE_CUDA", "INFSA_NO_EXT", "CUDA_HOME", "PYTHONPATH")}
    return subprocess.run(
        [sys.executable, "setup.py", *arguments], cwd=ROOT, env=clean | environment, capture_output=True, text=True, timeout=120
    )  # fmt: skip


def test_pure_python_wheels_carry_the_plain_version():
    assert setup("--version", INFSA_NO_EXT="1").stdout.split()[-1] == infsa_kernels.__version__


def test_compiled_wheels_do_too_as_they_fit_every_torch():
    assert setup("--version", FORCE_CUDA="0").stdout.split()[-1] == infsa_kernels.__version__


@without_cuda
def test_cuda_is_never_left_out_silently():
    outcome = setup("--version", FORCE_CUDA="1")
    assert outcome.returncode == 1
    (line,) = [line for line in outcome.stderr.splitlines() if "infsa_kernels" in line]
    assert "FORCE_CUDA=1 asks for CUDA kernels" in line and "is not a CUDA build" in line


@beside_cuda
def test_cuda_wheels_name_their_cuda():
    version = setup("--version", FORCE_CUDA="1").stdout.split()[-1]
    assert version == f"{infsa_kernels.__version__}+cu{torch.version.cuda.split('.')[0]}"


@beside_cuda
def test_no_toolkit_where_cuda_home_points(tmp_path):
    outcome = setup("--version", FORCE_CUDA="1", CUDA_HOME=str(tmp_path))
    assert outcome.returncode == 1
    (line,) = [line for line in outcome.stderr.splitlines() if "infsa_kernels" in line]
    assert f"there is no CUDA toolkit at {tmp_path}; install that of CUDA {torch.version.cuda}" in line
    # Nobody asked for CUDA kernels: a build without them.
    assert setup("--version", CUDA_HOME=str(tmp_path)).stdout.split()[-1] == infsa_kernels.__version__


def test_unknown_value():
    outcome = setup("--version", FORCE_CUDA="yes")
    assert outcome.returncode == 1
    assert "FORCE_CUDA is 'yes', expected 1, 0 or nothing" in outcome.stderr


# A build whose folder build/ is there already. Every change is one that file times do not show.


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return clone.make(tmp_path_factory.mktemp("built"))


@pytest.fixture
def folder(made):
    """As a build without options leaves it, whatever the test before did there."""
    compiled(made)
    return made


def compiled(folder, *command, **environment) -> set[str]:
    """Builds, and says which objects were compiled."""
    started = newest(folder)
    clone.run(sys.executable, "setup.py", "-q", *(command or ("build_ext",)), cwd=folder, **environment)
    return {path.stem for path in folder.glob("build/temp*/**/*.o") if path.stat().st_mtime_ns > started}


def newest(folder) -> int:
    return max((path.stat().st_mtime_ns for path in folder.glob("build/**/*.o")), default=0)


def rewrite(path, old, new):
    """Another content, and a file time of long ago: as from an archive, or from the cache of a package manager."""
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    os.utime(path, (0, 0))


EVERYTHING = {"module", "nothing"}


@pytest.mark.sweep
def test_nothing_is_compiled_twice(folder):
    assert compiled(folder) == set()
    (folder / "csrc/cpu/nothing.cpp").touch()
    assert compiled(folder) == {"nothing"}


@pytest.mark.sweep
def test_another_torch_or_compiler_compiles_everything(folder):
    """They are where the old ones were: the command lines are the same, and a package manager's files may be older than ours."""
    (note,) = folder.glob("build/temp*/made_from.json")
    made_from = json.loads(note.read_text())
    assert torch.__version__ in made_from["facts"]["torch"] and all(made_from["facts"]["tools"].values())
    made_from["facts"]["torch"][0] = "2.10.0"
    note.write_text(json.dumps(made_from))
    assert compiled(folder) == EVERYTHING


@pytest.mark.sweep
def test_other_flags_compile_everything(folder):
    assert compiled(folder, CFLAGS="-DANOTHER") == EVERYTHING
    assert compiled(folder, CFLAGS="-DANOTHER", CPATH=str(folder)) == EVERYTHING


@pytest.mark.sweep
def test_sources_that_changed_without_a_new_time_are_compiled(folder):
    rewrite(folder / "csrc/facts.h", "\n", "\n\n")
    assert compiled(folder) == EVERYTHING


@pytest.mark.sweep
def test_builds_without_ninja_forget_too(folder, tmp_path):
    """Then setuptools compares the times of our sources and the library, and nothing else."""
    for tool in ("cc", "gcc", "c++", "g++", "clang", "clang++", "as", "ld"):
        if path := shutil.which(tool):
            (tmp_path / tool).symlink_to(path)
    assert compiled(folder, PATH=str(tmp_path)) == EVERYTHING
    assert compiled(folder, PATH=str(tmp_path)) == set()
    assert compiled(folder, PATH=str(tmp_path), CFLAGS="-DANOTHER") == EVERYTHING


def test_wheels_and_builds_in_place_have_the_sources_of_now(folder, tmp_path):
    """build/ has those of before: setuptools takes the newer file for the right one, and keeps modules that are gone."""
    gone, kept = folder / "infsa_kernels/gone.py", folder / "infsa_kernels/kept.py"
    gone.touch()
    kept.write_text("was = 1\n")
    clone.run(sys.executable, "setup.py", "-q", "build", cwd=folder)
    gone.unlink()
    rewrite(kept, "was", "is_now")
    rewrite(folder / "csrc/facts.h", "that of the tests", "another for the wheel")
    clone.run(sys.executable, "-m", "build", "-n", "-w", "-o", tmp_path, ".", cwd=folder)
    wheel = zipfile.ZipFile(next(tmp_path.glob("*.whl")))
    assert "infsa_kernels/gone.py" not in wheel.namelist()
    assert one_of(wheel, "kept.py") == b"is_now = 1\n"
    assert b"another for the wheel" in one_of(wheel, "_C")

    rewrite(folder / "csrc/facts.h", "another for the wheel", "a third one in place")
    clone.run(sys.executable, "setup.py", "-q", "build_ext", "--inplace", cwd=folder)
    (module,) = folder.glob("infsa_kernels/_C*")
    assert b"a third one in place" in module.read_bytes()
    clone.remove_compiled(folder)


def one_of(archive, word) -> bytes:
    (name,) = (name for name in archive.namelist() if word in name)
    return archive.read(name)


def test_missing_sources_are_an_error(tmp_path):
    folder = clone.make(tmp_path)
    (folder / "csrc/cpu/nothing.cpp").unlink()
    outcome = clone.run(sys.executable, "setup.py", "--version", cwd=folder, check=False)
    assert outcome.returncode == 1
    assert f"there is no csrc/cpu/*.cpp in {folder}" in outcome.stderr


BESIDE_CUDA = """
import sys, runpy, torch
from pathlib import Path
from torch.utils import cpp_extension
Path("cuda/bin").mkdir(parents=True), Path("cuda/include").mkdir()
Path("cuda/bin/nvcc").touch(), Path("cuda/include/cuda_runtime.h").touch()
torch.version.cuda, cpp_extension.CUDA_HOME = "13.0", str(Path("cuda").resolve())
sys.argv = ["setup.py", "--version"]
runpy.run_path("setup.py", run_name="__main__")
"""


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.sweep
def test_cuda_without_its_sources_is_an_error(tmp_path, whole):
    """As from a source distribution made beside a CPU build of torch, when that still had no .cu."""
    folder = clone.make(tmp_path)
    if not whole:
        (folder / "csrc/cuda/nothing.cu").unlink()
    outcome = clone.run(sys.executable, "-c", BESIDE_CUDA, cwd=folder, FORCE_CUDA="1", check=False)
    assert outcome.returncode == (0 if whole else 1)
    if whole:
        assert outcome.stdout.strip().endswith("+cu13")
    else:
        assert f"there is no csrc/cuda/*.cu in {folder}" in outcome.stderr


# Source distributions.


def sdist(folder, target) -> Path:
    clone.run(sys.executable, "-m", "build", "--no-isolation", "--sdist", "-o", target, ".", cwd=folder)
    (made,) = target.glob("*.tar.gz")
    assert made.name == f"infsa_kernels-{infsa_kernels.__version__}.tar.gz"
    return made


@pytest.mark.sweep
def test_a_source_distribution_has_every_source_and_no_cuda_in_its_version(tmp_path):
    """Of this repository, beside whatever torch is here."""
    folder = tmp_path / "repository"
    ours = {"csrc", "tests", "bench", "docs"}
    for name in ours:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "results", "out"))
    for file in (*clone.BUILT, ROOT / "Makefile", ROOT / "CONTRIBUTING.md"):
        shutil.copy(file, folder)
    clone.copy_package(folder)
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    with tarfile.open(sdist(folder, tmp_path)) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        version = re.search(
            r"^Version: (.*)", archive.extractfile(one_name(archive, "/PKG-INFO")).read().decode(), re.MULTILINE
        )
    assert there <= names
    assert {"csrc/cuda/linear.cu", "csrc/cuda/linear_kernels.cuh", "infsa_kernels/py.typed"} <= names
    assert version[1] == infsa_kernels.__version__


def one_name(archive, end) -> str:
    (name,) = (name for name in archive.getnames() if name.endswith(end) and name.count("/") == 1)
    return name


@pytest.mark.sweep
def test_what_is_built_from_a_source_distribution_has_its_version(folder, tmp_path):
    """By name, as from an index, pip takes nothing else; and it is a package with its extension."""
    made = sdist(folder, tmp_path)
    python = clone.make_python(tmp_path / "python")
    clone.install(python, "--force-reinstall", "--find-links", made.parent, "infsa-kernels", cwd=tmp_path)
    report = clone.run(python, "-m", "infsa_kernels.info", cwd=tmp_path).stdout
    assert "for every torch from 2.10 on" in report and str(tmp_path / "python") in report

"""README's steps in a clone, done with pip: in place, and not."""

import re
import sys

import pytest
from helpers import clone

COMMANDS = re.search(r"## Install\n.*?```sh\n(.*?)```", (clone.ROOT / "README.md").read_text(), re.DOTALL)[1]
COMPILED = "for every torch from 2.10 on"  # what info says of a compiled package
INSTALL = "pip install --no-build-isolation -e ."

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the extension is not built there")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return clone.make(tmp_path_factory.mktemp("clone"))


@pytest.fixture
def python(tmp_path):
    return clone.make_python(tmp_path / "python")


def info(python, cwd):
    return clone.run(python, "-m", "infsa_kernels.info", cwd=cwd)


def test_readme_installs_in_place():
    assert INSTALL in COMMANDS and "infsa_kernels.info" in COMMANDS


@pytest.mark.sweep
def test_in_place_the_extension_is_found_everywhere(folder, python, tmp_path):
    clone.install(python, "-e", ".", cwd=folder)
    for cwd in (folder, tmp_path):
        report = info(python, cwd)
        assert COMPILED in report.stdout and str(folder / "infsa_kernels") in report.stdout
        assert report.stderr == ""
    # Type checkers read sys.path and run no import hooks.
    assert str(folder) in clone.run(python, "-c", "import sys; print(sys.path)", cwd=tmp_path).stdout
    clone.remove_compiled(folder)


@pytest.mark.sweep
def test_a_source_folder_names_the_package_that_it_hides(folder, python, tmp_path):
    clone.install(python, ".", cwd=folder)
    elsewhere = info(python, tmp_path)
    assert COMPILED in elsewhere.stdout and elsewhere.stderr == ""
    package = re.search(r" in (.*)", elsewhere.stdout)[1]
    assert package != str(folder / "infsa_kernels") and list(clone.Path(package).glob("*.so"))

    here = info(python, folder)
    assert COMPILED not in here.stdout
    words = (
        f"Python imports the source folder {folder / 'infsa_kernels'}, in which no extension was built, and not the installed "
        f"package {package}; start Python in another folder, or install in place with `pip install --no-build-isolation "
        f"--no-deps -e {folder}`"
    )
    assert words in here.stdout
    assert here.stderr.count(words) == 1
    call = "import torch, infsa_kernels; torch.ops.infsa.linear(*torch.randn(3, 1, 1, 2, 4))"
    assert clone.run(python, "-c", call, cwd=folder).stderr.count("UserWarning") == 1, "importing said it already"


def test_a_source_folder_that_was_never_installed_says_so(folder, python):
    report = info(python, folder)
    assert f"the compiled extension was not built in the source folder {folder}; build it there with" in report.stdout
    assert report.stderr == ""


@pytest.mark.sweep
def test_a_pure_python_install_says_so_and_has_types(folder, python, tmp_path):
    clone.install(python, ".", cwd=folder, INFSA_NO_EXT="1")
    report = info(python, tmp_path).stdout
    assert "the compiled extension was not built (INFSA_NO_EXT=1)" in report
    assert clone.Path(re.search(r" in (.*)", report)[1], "py.typed").exists()

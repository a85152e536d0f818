"""The files beside the code say one version, and hooks run the linters that `make lint` runs."""

import re
from pathlib import Path

import pytest
import yaml

import infsa_kernels

ROOT = Path(__file__).parents[2]
HOOKS = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]


def test_one_version():
    assert re.search(r"^## (\S+) - ", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == infsa_kernels.__version__
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == infsa_kernels.__version__
    install = (ROOT / "docs" / "install.md").read_text()
    assert set(re.findall(r"infsa_kernels-([\d.]+\d)[+.]", install)) == {infsa_kernels.__version__}


def test_the_citation_has_the_paper():
    paper = yaml.safe_load((ROOT / "CITATION.cff").read_text())["preferred-citation"]
    assert paper["url"] in (ROOT / "README.md").read_text()
    assert all(author["family-names"] and author["given-names"] for author in paper["authors"])


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook["id"])
def test_a_hook_is_what_make_lint_runs(hook):
    lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    assert hook["entry"] in lint.replace("$(bin)/", "")
    (pin,) = hook["additional_dependencies"]
    for lock in (ROOT / "requirements").glob("torch-*.txt"):
        assert pin in lock.read_text().splitlines(), lock.name


def test_hooks_see_the_files_that_make_lint_sees():
    (hook,) = (hook for hook in HOOKS if hook["id"] == "clang-format")
    files = [
        str(p.relative_to(ROOT)) for folder in ("csrc", "tests") for p in (ROOT / folder).rglob("*") if p.is_file()
    ]
    seen = {file for file in files if re.search(hook["files"], file)}
    endings = (".cpp", ".h", ".cu", ".cuh")
    assert seen == {file for file in files if file.endswith(endings)}

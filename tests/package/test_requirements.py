"""The locks hold pins and nothing else, for all that pyproject.toml asks for; docs name the versions that were tested."""

import re
from pathlib import Path

import pytest
import run
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
LOCKS = sorted((ROOT / "requirements").glob("torch-*.txt"))
HOSTS = ("accelerate", "captum", "grad-cam", "peft", "quantus", "timm", "torchao", "transformers")


def pins(lock: Path) -> dict[str, list[Requirement]]:
    found = {}
    for line in lock.read_text().splitlines()[1:]:
        requirement = Requirement(line)
        found.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    return found


def ranges() -> list[Requirement]:
    text = (ROOT / "pyproject.toml").read_text()  # tomllib came with Python 3.11
    extras = text[text.index("[project.optional-dependencies]") : text.index("[tool.setuptools]")]
    return [Requirement(quoted) for quoted in re.findall(r'"([a-z][^"]*)"', extras.replace("\n    # ", "\n#"))]


def version(requirement: Requirement) -> str:
    (specifier,) = requirement.specifier
    assert specifier.operator == "=="
    return specifier.version


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.stem)
def test_a_lock_pins_everything_and_names_no_place(lock):
    found = pins(lock)
    for requirements in found.values():
        for requirement in requirements:
            assert requirement.url is None and "+" not in version(requirement)
    for wanted in [*ranges(), Requirement("ninja"), Requirement("setuptools>=77")]:
        for requirement in found[canonicalize_name(wanted.name)]:
            assert version(requirement) in wanted.specifier, f"{requirement}: run `make lock`"
    assert f"torch-{'.'.join(version(found['torch'][0]).split('.')[:2])}" == lock.stem
    # A CUDA build of torch brings its own; beside a CPU build they would be gigabytes that nobody asked for.
    assert not [name for name in found if name.startswith(("nvidia-", "cuda-")) and name != "nvidia-ml-py"]


def test_docs_name_the_oldest_and_the_newest_version():
    text = " ".join((ROOT / "docs" / "install.md").read_text().split())
    oldest, newest = re.search(
        r"adapters and models also from (.*?) on, up to (.*?) \(`make test-newest`", text
    ).groups()
    floors = {wanted.name: str(wanted.specifier).removeprefix(">=") for wanted in ranges() if wanted.name in HOSTS}
    locked = {name: version(pins(ROOT / "requirements" / "torch-2.13.txt")[name][-1]) for name in HOSTS}
    for name in HOSTS:
        assert re.search(rf"\b{name} {re.escape(floors[name])}\b", oldest)
        assert locked[name].startswith(re.search(rf"\b{name} (\S+?)(,|$| and)", newest)[1]), name


def test_advice_after_a_failure_names_the_commands():
    text = run.advice(
        {"parallel"}, ["tests/ops/test_masks.py::test_a[{'x': 1}]", *["tests/test_b.py::test"] * 20], "make test"
    )
    assert 'make test TEST_ARGS="tests/ops/test_masks.py::test_a -x -vv"' in text
    assert 'make test TEST_ARGS="--lf --lfnf=none"' in text
    assert "and 11 more" in text


def test_every_part_runs_and_a_failure_ends_with_the_advice(tmp_path, monkeypatch, capsys):
    started = []

    def call(command, cwd, env):
        started.append((command, env))
        return {"alone": 1, "interpreter": run.NOTHING_SELECTED}.get(run.PARTS[len(started) - 1], 0)

    monkeypatch.setattr(run.subprocess, "call", call)
    monkeypatch.setattr(run, "last_failed", lambda cache: ["tests/test_b.py::test"] if cache.name == "alone" else [])
    assert run.main(["-x"], "make test-all") == 1
    assert [command[-1] for command, _ in started] == ["-x"] * 3
    assert ["-n" in command for command, _ in started] == [True, False, True]
    assert started[-1][1]["TRITON_INTERPRET"] == "1"
    assert 'make test-all TEST_ARGS="tests/test_b.py::test -x -vv"' in capsys.readouterr().out

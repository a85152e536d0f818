"""Two results side by side, and two revisions measured in turn."""

import json
import subprocess

import pytest
from helpers.bench_rows import row, turn

from bench import __main__ as bench
from bench import compare, engine

HERE = {"device": "a processor", "threads": 1, "isa": "avx2", "commit": "abc"}


def field(name="mlla", median=1.0, spread=0.1, samples=9, status="ok", **environment):
    times = {"median_s": median, "p20_s": median * (1 - spread), "p80_s": median * (1 + spread), "samples": samples}
    return row(name, 224, status=status) | {"environment": HERE | environment} | (times if status == "ok" else {})


def change(a, b):
    (found,) = compare.compare(compare.merge(a), compare.merge(b))
    return found


def test_a_change_counts_where_the_intervals_do_not_meet():
    found = change([field(median=1.0)], [field(median=1.15)])
    assert found["ratio"] == pytest.approx(1.15)
    assert found["noise"] == (pytest.approx(1.15 * 0.9 / 1.1), pytest.approx(1.15 * 1.1 / 0.9))
    assert found["change"] == ""
    assert change([field(median=1.0)], [field(median=1.3)])["change"] == "slower"
    assert change([field(median=1.3)], [field(median=1.0)])["change"] == "faster"
    # One call has no interval, and so no change that could be told from noise.
    assert change([field(median=1.0, samples=1)], [field(median=9.0, samples=1)])["change"] == ""


def test_repetitions_are_one_row_with_the_interval_of_their_medians():
    found = compare.merge([field(median=m) for m in (3.0, 1.0, 2.0)] + [field(status="not reached")])
    (row,) = found.values()
    assert (row["low_s"], row["median_s"], row["high_s"]) == (1.0, 2.0, 3.0)
    # Rows of an older commit are no repetitions.
    (row,) = compare.merge([field(median=9.0, commit="old"), field(median=1.0)]).values()
    assert row["median_s"] == 1.0


def test_a_time_that_is_lost_or_new_is_a_change():
    assert change([field()], [field(status="wrong")]) | {"what": ""} == {
        "what": "",
        "a": 1.0,
        "b": "wrong",
        "change": "lost",
    }
    assert change([field(status="time limit")], [field()])["change"] == "new"
    assert change([field(status="unsupported")], [field(status="unsupported")])["change"] == ""


def results(path, factor, **environment):
    found = [field(name, factor, 0.01, 5, **environment) for name in ("mlla", "mean")]
    found += [field("soft", status="time limit", **environment), field("soft", status="not reached", **environment)]
    found += [
        row(
            level="model",
            depth=4,
            median_s=factor,
            p20_s=0.99 * factor,
            p80_s=1.01 * factor,
            environment=HERE | environment,
        )
    ]
    path.write_text("\n".join(map(json.dumps, found)))
    return path


def test_the_comparison_and_the_exit_status(tmp_path, capsys):
    a, b = results(tmp_path / "a.jsonl", 1.0), results(tmp_path / "b.jsonl", 1.1, threads=2)

    def show(*paths):
        return bench.main(["--compare", *map(str, paths)])

    assert show(a, a) == 0
    text = capsys.readouterr().out
    assert "4 rows in both: none changed beyond its noise. Only in A: 0, in B: 0." in text
    assert "WARNING" not in text
    assert show(a, b) == 1
    text = capsys.readouterr().out
    assert "4 rows in both: 3 slower." in text
    assert "WARNING: the machines or their settings differ" in text
    assert "model cpu fp32 4 1024 fwd linear_infsa" in text
    assert "1.100  [1.08, 1.12]" in text
    assert show(b, a) == 0
    lines = tmp_path / "rows.jsonl"
    lines.write_text(
        "\n".join(json.dumps(r) for r in (field("luna"), field("rala"), field("rala", status="not reached")))
    )
    assert show(lines, lines) == 0
    assert "2 rows in both" in capsys.readouterr().out
    assert show(lines, a) == 0
    assert "0 rows in both" in capsys.readouterr().out


@pytest.fixture
def repository(tmp_path):
    """A repository of two commits, whose tree has changed since, and whose setup.py writes a file."""
    root = tmp_path / "repository"

    def git(*arguments):
        command = ["git", "-c", "user.name=n", "-c", "user.email=e@x", *arguments]
        return subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout.strip()

    for folder in ("bench", "infsa_kernels"):
        (root / folder).mkdir(parents=True)
    (root / "setup.py").write_text("open('built', 'w').write('by ' + open('kernel').read())")
    (root / "infsa_kernels" / "testing.py").write_text("old")
    (root / "bench" / "gone.py").write_text("old")
    git("init", "-q")
    for kernel in ("first", "second"):
        (root / "kernel").write_text(kernel)
        git("add", "-A")
        git("commit", "-q", "-m", kernel)
    (root / "infsa_kernels" / "testing.py").write_text("new")
    (root / "bench" / "gone.py").unlink()
    (root / "bench" / "timer.py").write_text("new")
    return root, git


def test_a_revision_is_checked_out_under_this_trees_harness_and_leaves_nothing(repository):
    root, git = repository
    with compare.checkout("HEAD~1", root) as (there, commit):
        assert commit == git("rev-parse", "HEAD~1")
        compare.build(there)
        assert (there / "built").read_text() == "by first"
        assert (
            (there / "infsa_kernels" / "testing.py").read_text() == (there / "bench" / "timer.py").read_text() == "new"
        )
        assert not (there / "bench" / "gone.py").exists()
    assert not there.exists()
    assert len(git("worktree", "list").splitlines()) == 1
    (root / "setup.py").write_text("raise SystemExit('no compiler')")
    with pytest.raises(SystemExit, match="no compiler"):
        compare.build(root)
    with pytest.raises(SystemExit, match="lunch"), compare.checkout("lunch", root):
        pass


def test_both_sides_are_measured_in_turn(monkeypatch):
    calls = []

    class FakeWorker:
        environment = HERE

        def __init__(self, device, budget, root):
            self.side = root

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def measure(self, turn, limit):
            calls.append(self.side + "".join(name[0] for name in turn["names"]))
            ok = {name: self.side == "b" or name != "mean" for name in turn["names"]}
            return [
                engine.blank(turn, n, "fwd") | ({"status": "ok"} if right else {"status": "unsupported"})
                for n, right in ok.items()
            ]

    monkeypatch.setattr(compare, "Worker", FakeWorker)
    plan = [turn("linear_infsa"), turn("mean"), turn("softmax", "mean")]
    rows = compare.measure(plan, {"a": "a", "b": "b"}, "cpu", rounds=3, budget=0.1)
    assert calls == ["al", "bl", "bl", "al", "al", "bl", "am", "bm", "bm", "bm", "asm", "bsm", "bsm", "as", "as", "bsm"]
    assert [len(rows[side]) for side in "ab"] == [3 + 1 + 4, 3 + 3 + 6]
    assert {r["environment"]["commit"] for r in rows["a"]} == {"abc"}


def test_versus_measures_the_operators_and_layers():
    args = bench.parse(["--versus", "HEAD", "--device", "cpu"])
    plan = bench.versus_plan(args)
    assert {(t["level"], t["pixels"], n) for t in plan for n in t["names"]} == {
        (level, pixels, name)
        for level in ("operator", "layer")
        for pixels in (224, 1024)
        for name in ("linear_infsa", "pure_infsa")
    }
    words = "--versus HEAD --device cpu --dtype bf16 --phase fwd --level layer"
    chosen = bench.versus_plan(bench.parse(words.split()))
    assert {(t["level"], t["dtype"], t["phase"]) for t in chosen} == {("layer", "bf16", "fwd")}

"""What is read from the rows: the fastest, the goals, tables, plots and the page."""

import json
import re

import pytest
from helpers.bench_rows import ENVIRONMENT, row

from bench import __main__ as bench
from bench import cases, goals, plots, report, rows


def test_the_fastest_way_counts():
    found = [row("mlla", median_s=3.0), row("mlla", way="compile", median_s=2.0), row("mlla", which="train", median_s=1.0),
             row("soft", status="time limit"), row("soft", way="compile", status="unsupported")]  # fmt: skip
    found = rows.best(found, which="fwd")
    assert (found["mlla"]["way"], found["soft"]["status"]) == ("compile", "time limit")


def test_rows_of_other_machines_and_commits_stand_apart():
    old, other = ({**ENVIRONMENT, **change} for change in ({"commit": "old"}, {"device": "another"}))
    found = [row(environment=other), row(environment=old), row(level="operator", environment=old), row("mean")]
    assert rows.latest(found) == found[2:]  # the operator level's last commit is the old one


def test_goals_of_the_layer_beside_the_field():
    beside = {"beside": {"linear_infsa": 1.0}}
    found = [row("linear_infsa", median_s=1.0), row("mean", median_s=0.1),
             row("fastformer", median_s=9.0, beside={"linear_infsa": 6.0}), row("linear_infsa_untied", median_s=1.1),
             row("pure_infsa", median_s=4.0, **beside), row("softmax", median_s=3.0, **beside),
             row("relu", status="time limit")]  # fmt: skip
    by_name = {g["name"]: g for g in goals.following(found)}
    assert (by_name["linear_infsa"]["next"], by_name["linear_infsa"]["reached"]) == ("fastformer", True)
    assert by_name["linear_infsa"]["value"] == pytest.approx(
        1.5
    )  # beside Linear's calls in turn, not beside its own row
    assert (by_name["pure_infsa"]["next"], by_name["pure_infsa"]["reached"]) == ("softmax", False)
    text = report.text(found)
    assert "time limit: because" in text
    assert "times faster than Softmax (SDPA)    0.75" in " ".join(text.split("\n")[-5:])
    assert "MISSED" in text


def test_goals_are_reached_missed_or_not_measured():
    def linear(name, seconds, **fields):
        return row(name, 4096, level="operator", median_s=seconds, **fields)

    found = [linear("linear_infsa", 2.0), linear("linear_plain", 50.0), linear("read_qqv", 1.0),
             linear("linear_infsa", 0.5, dtype="bf16"), linear("linear_infsa", 9.0, layout="bhnd"),
             row(median_s=1.0), row("linear_infsa_per_token", median_s=3.0),
             row("tiny", level="operator", median_s=20e-6), row("tiny_kernel", level="operator", median_s=10e-6)]  # fmt: skip
    by_name = {g["goal"]: (g["value"], g["reached"]) for g in goals.compare(found)}
    assert by_name["Linear forward: time over its own read of Q, Q, V"] == (2.0, False)
    assert by_name["Linear forward: times faster than plain torch"] == (25.0, True)
    assert by_name["Linear forward: times faster in bfloat16 than in float32"] == (4.0, True)
    assert by_name["Pure forward: times faster than SDPA"] == (None, None)
    assert by_name["Pooled layer forward: times faster than per token"] == (3.0, True)
    assert by_name["Pooled layer forward + backward: times faster than per token"] == (None, None)
    assert by_name["Dispatch of a tiny forward: us beyond its C++ operator"] == (pytest.approx(10), True)


def all_kinds():
    found = [
        row(
            name,
            pixels,
            which,
            level=level,
            median_s=1e-4 * pixels * (1 + i),
            **({"depth": 4} if level == "model" else {}),
        )
        for level in cases.LEVELS
        for which in ("fwd", "train")
        for pixels in (224, 1024, 2048)
        for i, name in enumerate(("linear_infsa", "pure_infsa", "softmax", "mean"))
    ]
    found += [row(n, 2048, share_of_limit=0.9, joules=0.5) for n in ("linear_infsa", "pure_infsa")]
    found += [row("soft", 224, status="out of memory"), row("mlla", 224, status="time limit"), row("luna", 224, status="wrong"),
              row("agent", 224, status="unsupported"), row("rala", 224, status="not reached")]  # fmt: skip
    found += [row("soft", 4096, level="model", depth=24, status="out of memory")]
    return [*found, row("softmax", 4096, level="model", depth=4, status="time limit", reason="<b> & more")]


def test_the_page_shows_rows_of_every_status_and_needs_no_other_file(monkeypatch, tmp_path, capsys):
    elsewhere = row(environment=ENVIRONMENT | {"device": "another processor"})
    monkeypatch.setitem(plots.SETTINGS, "savefig.dpi", 20)
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(r) for r in [elsewhere, *all_kinds()]))
    assert bench.main(["--report", "--out", str(tmp_path)]) == 0
    assert "1 rows of other machines" in capsys.readouterr().err
    text = (tmp_path / "report.html").read_text()
    assert "another processor" not in text
    for status in ("out of memory", "time limit", "wrong", "unsupported", "not reached"):
        assert f"<td>{status}</td>" in text
    assert "<b> &" not in text
    assert "2048² (then: time limit)" in text
    assert "the paper's Table 1" in text.replace("&#39;", "'")
    assert text.count("<img") == len(list(tmp_path.glob("*.png"))) >= 12
    assert 'src="data:image/png' in text
    assert "http" not in re.sub(r"base64,[^\"]*|http-equiv", "", text)


def test_a_report_without_results_says_what_to_run(tmp_path, capsys):
    assert bench.main(["--report", "--out", str(tmp_path)]) == 1
    assert "make bench" in capsys.readouterr().err


def test_the_committed_results_can_be_read():
    from bench import compare, machine

    for path in (machine.ROOT / "bench" / "results").glob("*/rows.jsonl"):
        found = compare.load(path)
        assert found
        assert all(c["change"] == "" for c in compare.compare(found, found))

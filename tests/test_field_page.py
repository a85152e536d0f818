"""What is read from the rows of the field: the fastest, the goals, tables, plots and the page."""

import json

import pytest
from field_rows_made import ENVIRONMENT, row

from bench import field, field_rows, page


def test_the_fastest_way_counts():
    rows = [row("mlla", median_s=3.0), row("mlla", way="compile", median_s=2.0), row("mlla", phase="train", median_s=1.0),
            row("soft", status="time limit"), row("soft", way="compile", status="unsupported")]  # fmt: skip
    found = field_rows.best(rows, phase="fwd")
    assert (found["mlla"]["way"], found["soft"]["status"]) == ("compile", "time limit")


def test_rows_of_other_machines_and_commits_stand_apart():
    old, other = ({**ENVIRONMENT, **change} for change in ({"commit": "old"}, {"device": "another"}))
    rows = [row(environment=other), row(environment=old), row(level="operator", environment=old), row("mean")]
    assert field_rows.latest(rows) == rows[2:]  # the operator level's last commit is the old one


def test_goals_of_the_layer():
    rows = [row("linear_infsa", median_s=1.0), row("mean", median_s=0.1), row("fastformer", median_s=9.0, baseline_s=6.0),
            row("linear_infsa_untied", median_s=1.1), row("pure_infsa", median_s=4.0, baseline_s=1.0),
            row("softmax", median_s=3.0, baseline_s=1.0), row("relu", status="time limit")]  # fmt: skip
    found = {g["name"]: g for g in field_rows.goals(rows)}
    assert (found["linear_infsa"]["next"], found["linear_infsa"]["reached"]) == ("fastformer", True)
    assert found["linear_infsa"]["ratio"] == pytest.approx(1.5)  # beside Linear's calls in turn, not beside its own row
    assert (found["pure_infsa"]["next"], found["pure_infsa"]["reached"]) == ("softmax", False)
    text = field_rows.text(rows, "layer")
    assert "time limit: because" in text
    assert "0.75 x faster than Softmax (SDPA)" in text
    assert "MISSED" in text


def all_kinds():
    sizes = (224, 1024, 2048)
    rows = [
        row(
            name,
            pixels,
            phase,
            level=level,
            median_s=1e-4 * pixels * (1 + i),
            **({"depth": 4} if level == "model" else {}),
        )
        for level in field.LEVELS
        for phase in ("fwd", "train")
        for pixels in sizes
        for i, name in enumerate(("linear_infsa", "pure_infsa", "softmax", "mean"))
    ]
    rows += [row(n, 2048, share_of_limit=0.9, joules=0.5) for n in ("linear_infsa", "pure_infsa")]
    rows += [row("soft", 224, status="out of memory"), row("mlla", 224, status="time limit"), row("luna", 224, status="wrong"),
             row("agent", 224, status="unsupported"), row("rala", 224, status="not reached")]  # fmt: skip
    rows += [row("soft", 4096, level="model", depth=24, status="out of memory")]
    return [*rows, row("softmax", 4096, level="model", depth=4, status="time limit", reason="<b> & more")]


def test_the_page_shows_rows_of_every_status_and_needs_no_other_file(tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(r) for r in all_kinds()))
    assert page.main(["--results", str(tmp_path), "--out", str(tmp_path / "page")]) == 0
    text = (tmp_path / "page" / "report.html").read_text()
    for status in ("out of memory", "time limit", "wrong", "unsupported", "not reached"):
        assert f"<td>{status}</td>" in text
    assert "<b> &" not in text
    assert "2048² (then: time limit)" in text
    assert "the paper's Table 1" in text
    assert text.count("<img") == len(list((tmp_path / "page").glob("field_*.png"))) >= 12
    assert 'src="data:image/png' in text
    assert "http" not in text.replace("http-equiv", "")


def test_the_page_without_results_says_what_to_run(tmp_path, capsys):
    assert page.main(["--results", str(tmp_path)]) == 1
    assert "make bench" in capsys.readouterr().err

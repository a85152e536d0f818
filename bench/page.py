"""`python -m bench.page`: everything under a folder of results as PNGs and one HTML page that needs no other file.

It draws the operators' own run (results.json) and the field's rows (rows.jsonl), whichever are there.
"""

import argparse
import base64
import json
import sys
from pathlib import Path

import pandas as pd
from jinja2 import Environment, PackageLoader

from . import field, field_plots, peers, plots, report
from .machine import ROOT

# What the paper prints for its models. Its column stands beside as far as its abstract gives it.
PUBLISHED = {
    ("linear_infsa", 4): {"parameters": 53.5e6, "images_per_s": 231.0, "joules": 0.87, "largest": 9216},
    ("linear_infsa", 24): {"parameters": 305.4e6},
    ("softmax", 4): {"parameters": 57.7e6},
    ("softmax", 24): {"parameters": 330.6e6},
}
# What does not hold of it.
CAVEATS = (
    "Paper (arXiv:2603.00175, abstract and text): one A100 40 GB, batch 1. Its other cells are not repeated here.",
    "Its energy is latency times a constant (200 or 300 W), not measured. Here energy is the board's counter, or absent.",
    "Its 57.7M / 53.5M and 330.6M / 305.4M parameters fit a ViT with pooler, class token and one extra D x D projection per "
    "layer; a vanilla ViT of 4 and 24 layers has 52.40M and 304.33M. Ours: no class token, mean over the tokens.",
    'Its "59 GFLOPs at 224" is not the forward of the 4-layer model, which takes 20 GFLOP.',
    "Linear-InfSA has 64 heads of 16 in the 4-layer model and 16 of 64 in the 24-layer one, as in the paper; all others 16 of 64.",
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.page", description=__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "out", help="folder of results.json and rows.jsonl")
    parser.add_argument("--out", type=Path, help="folder for the page and its plots (default: that of the results)")
    args = parser.parse_args(arguments)
    out = args.out or args.results
    out.mkdir(parents=True, exist_ok=True)
    rows = field.load(args.results / "rows.jsonl")
    operators = args.results / "results.json"
    results = json.loads(operators.read_text()) if operators.exists() else None
    if not rows and results is None:
        print(f"Neither results.json nor rows.jsonl is in {args.results}: run `make bench` first", file=sys.stderr)
        return 1
    path = out / "report.html"
    path.write_text(page(rows, results, out))
    print(path)
    return 0


def page(rows: list[dict], results: dict | None, out: Path) -> str:
    images = field_plots.draw_all(rows, out) if rows else []
    sections = [
        {
            "title": f"Level: {field_plots.TITLES[level]}",
            "images": [_embed(path) for path in images if path.name.startswith(f"field_{level}")],
            "tables": _tables(rows, level),
        }
        for level in field.LEVELS
        if any(r["level"] == level for r in rows)
    ]
    if results is not None:
        drawn = plots.draw_all(results, out)
        sections.append({
            "title": "The two operators beside their own equations and the machine",
            "images": [_embed(path) for path in drawn],
            "text": report.text(results),
        })  # fmt: skip
    environments = {json.dumps(r["environment"], sort_keys=True): r["environment"] for r in rows}
    if results is not None:
        environments["operators"] = results["environment"]
    template = Environment(loader=PackageLoader("bench", "."), autoescape=True).get_template("page.html.j2")
    return template.render(
        sections=sections, environments=list(environments.values()), models=_models(rows), caveats=CAVEATS
    )  # fmt: skip


def _tables(rows, level) -> list[dict]:
    """The fastest way of every mechanism, a table per depth, size and phase."""
    tables = []
    mine = [r for r in rows if r["level"] == level]
    for depth, pixels, phase in dict.fromkeys((r.get("depth"), r["pixels"], r["phase"]) for r in mine):
        chosen = field.best(mine, depth=depth, pixels=pixels, phase=phase)
        own = chosen.get("linear_infsa", {}).get("median_s")
        lines = []
        for r in sorted(chosen.values(), key=lambda r: r.get("median_s", float("inf"))):
            ok = r["status"] == "ok"
            reference = r.get("baseline_s") or own
            lines.append({
                "mechanism": r["label"],
                "result": report.durations(*(r[f"{q}_s"] for q in ("median", "p20", "p80")))[0] if ok else r["status"],
                "80% within": report.durations(*(r[f"{q}_s"] for q in ("median", "p20", "p80")))[1] if ok else r["reason"],
                "over Linear-InfSA": f"{r['median_s'] / reference:.2f}" if ok and reference else "",
                "way": r["way"],
                "peak MB": f"{r['peak_bytes'] / 1e6:.1f}" if "peak_bytes" in r else "",
                "parameters": f"{r['parameters']:,}" if "parameters" in r else "",
                "error": f"{r['error']:.1e}" if "error" in r else "",
                "time": r.get("time", "") if isinstance(r.get("time"), str) else "",
                "state": r.get("state", ""),
                "note": r.get("note", ""),
            })  # fmt: skip
        what = f"{depth} layers, " if depth else ""
        title = f"{what}{pixels} × {pixels}, N = {(pixels // 16) ** 2:,}, {field_plots.PHASES[phase]}"
        tables.append({"title": title, "html": pd.DataFrame(lines).to_html(index=False, border=0)})
    return tables


def _models(rows) -> str | None:
    """The paper's Table 1: parameters, latencies, pictures per second, memory and energy at the headline, largest picture."""
    rows = [r for r in rows if r["level"] == "model"]
    lines = []
    for depth in sorted({r["depth"] for r in rows}):
        mine = [r for r in rows if r["depth"] == depth]
        N = field_plots.headline(mine)
        for name in peers.PAPER:
            done = [r for r in mine if r["name"] == name and r["phase"] == "fwd" and r["status"] == "ok"]
            if not done:
                continue
            fwd, train = (field.best(mine, N=N, phase=phase).get(name, {}) for phase in ("fwd", "train"))
            paper = PUBLISHED.get((name, depth), {})
            largest = max(done, key=lambda r: r["pixels"])
            beyond = [r for r in mine if r["name"] == name and r["phase"] == "fwd" and r["pixels"] > largest["pixels"]]
            why = min(beyond, key=lambda r: r["pixels"])["status"] if beyond else ""
            lines.append({
                "model": f"{peers.label(name)}, {depth} layers",
                "parameters": f"{done[0]['parameters'] / 1e6:.2f}M",
                "paper's": f"{paper['parameters'] / 1e6:.1f}M" if "parameters" in paper else "",
                "measured at": f"{next(r['pixels'] for r in mine if r['N'] == N)}²",
                "inference": report.durations(*[fwd["median_s"]] * 3)[0] if "median_s" in fwd else fwd.get("status", ""),
                "training step": report.durations(*[train["median_s"]] * 3)[0] if "median_s" in train else train.get("status", ""),
                "pictures/s": f"{1 / fwd['median_s']:.3g}" if "median_s" in fwd else "",
                "paper's A100": f"{paper['images_per_s']:g}" if "images_per_s" in paper else "",
                "peak MB": f"{fwd['peak_bytes'] / 1e6:.0f}" if "peak_bytes" in fwd else "",
                **({"J/picture": f"{fwd['joules']:.3g}"} if fwd.get("joules") else {}),
                "largest completed": f"{largest['pixels']}²" + (f" (then: {why})" if why else ""),
                "paper's largest": f"{paper['largest']}²" if "largest" in paper else "",
            })  # fmt: skip
    return pd.DataFrame(lines).fillna("").to_html(index=False, border=0) if lines else None


def _embed(path: Path) -> dict:
    return {"name": path.stem, "data": base64.b64encode(path.read_bytes()).decode()}


if __name__ == "__main__":
    sys.exit(main())

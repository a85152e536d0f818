"""What the rows say: one screen for `make bench`, all tables as text, and one HTML page that needs no other file."""

import base64
import json
from itertools import product
from pathlib import Path

from . import cases, goals, machine, peers, plots
from .rows import best, durations, latest, load, over_linear, select, slope, usual

PASSES = {"fwd": "forward", "bwd": "backward", "train": "forward + backward"}
TITLES = {"operator": "operator: q, k, v given", "layer": "attention sub-layer, D = 1024", "model": "model"}

# Part of the processor that others may take before the report warns.
BUSY = 0.05

# What the paper prints for its models. Its column stands beside as far as its abstract gives it.
PUBLISHED = {
    ("linear_infsa", 4): {"parameters": 53.5e6, "images_per_s": 231.0, "largest": 9216},
    ("linear_infsa", 24): {"parameters": 305.4e6},
    ("softmax", 4): {"parameters": 57.7e6},
    ("softmax", 24): {"parameters": 330.6e6},
}
# What does not hold of it.
CAVEATS = (
    "Paper (arXiv:2603.00175, abstract and text): one A100 40 GB, batch 1. Its other cells are not repeated here.",
    "Its abstract gives 231 pictures/s and 0.87 J per picture without the size of the picture.",
    "Its energy is latency times a constant (200 or 300 W), not measured. Here energy is the board's counter, or absent.",
    "Its 57.7M / 53.5M and 330.6M / 305.4M parameters fit a ViT with pooler, class token and one extra D x D projection per "
    "layer; a vanilla ViT of 4 and 24 layers has 52.40M and 304.33M. Ours: no class token, mean over the tokens.",
    'Its "59 GFLOPs at 224" is not the forward of the 4-layer model, which takes 20 GFLOP.',
    "Linear-InfSA has 64 heads of 16 with 4 layers and 16 of 64 with 24, as in the paper; all others have 16 of 64.",
)


def screen(rows: list[dict], drawn: list[Path]) -> str:
    """The main figures, what limits them, and where the pictures are: at most 50 lines."""
    lines = [*_environment(rows), ""]
    lines.append(f"{'':<38}{'forward':>11}{'backward':>11}{'of limit':>10}{'x plain':>9}{'x SDPA':>8}{'error':>9}")
    for name, plain, other in (("linear_infsa", "linear_plain", "softmax"), ("pure_infsa", "pure_plain", "softmax")):
        mine = usual(select(rows, level="operator", name=name))
        for pixels in sorted({r["pixels"] for r in mine}):
            fwd, bwd = (best(usual(rows), level="operator", pixels=pixels, which=which) for which in ("fwd", "bwd"))
            beside = [_times(fwd.get(n), fwd.get(name)) for n in (plain, other)]
            own, back = fwd.get(name, {}), bwd.get(name, {})
            share = f"{own['share_of_limit']:.0%}" if "share_of_limit" in own else ""
            what = f"{peers.label(name)}, {'one call' if pixels < 1024 else 'operator'}, N = {own.get('N', 0):,}"
            cells = f"{_time(own):>11}{_time(back):>11}{share:>10}{beside[0]:>9}{beside[1]:>8}{_error(own):>9}"
            lines.append(f"{what:<38}{cells}")
    columns = f"{'forward':>11}{'x':>7}{'training':>11}{'x':>7}"
    lines += _side_by_side(rows, "layer", f"\n{'Attention sub-layer, 1024 x 1024 pixels, D = 1024':<50}{columns}", 9)
    lines += _side_by_side(
        rows, "model", f"\n{'Vision Transformer, 4 layers, 1024 x 1024 pixels':<50}{columns[:18]}", 3
    )
    lines += ["", "x: times as long as Linear-InfSA, called in turn with it. What limits what:", *_limits(rows)]
    found = [g for g in goals.compare(rows) if g["value"] is not None]
    missed = [g for g in found if not g["reached"]]
    lines.append(f"Goals measured: {len(found)}, missed: {len(missed)}")
    lines += ["  " + goals.line(g) for g in missed[:6]]
    lines += [f"Not reached in time: {n}" for n in [sum(r["status"] == "not reached" for r in rows)] if n]
    return "\n".join([*lines, *(f"Picture: {path}" for path in drawn)])


def _side_by_side(rows, level, header, count) -> list[str]:
    rows = select(rows, level=level, pixels=1024)
    rows = [r for r in rows if r["depth"] in (None, 4)]
    fwd, train = (best(rows, which=which) for which in ("fwd", "train"))
    timed = sorted((n for n in fwd if fwd[n]["status"] == "ok"), key=lambda n: fwd[n]["median_s"])
    lines = []
    for name in timed[:count]:
        cells = [f"  {peers.label(name):<48}"]
        for chosen in (fwd, train):
            if name in chosen and chosen[name]["status"] == "ok":
                over = over_linear(chosen[name], chosen)
                cells.append(f"{_time(chosen[name]):>11}{f'{over:.2f}' if over else '':>7}")
        lines.append("".join(cells))
    rest = [peers.label(n) for n in timed[count:]]
    return [header, *lines, *([f"  slower: {', '.join(rest)}"] if rest else [])] if lines else []


def _limits(rows: list[dict]) -> list[str]:
    """What each of ours is bound by, and how near it comes to that."""
    speeds, lines = _speeds(rows), []
    for level, name in product(("operator", "layer"), ("linear_infsa", "pure_infsa")):
        mine = usual(select(rows, level=level, name=name, which="fwd", status="ok"))
        row = max((r for r in mine if "share_of_limit" in r), key=lambda r: r["N"], default=None)
        if row:
            reads = row["limit"] == "read"
            rate = row["bytes" if reads else "flops"] / row["median_s"] / 1e9
            unit, what = (
                ("GB/s", "memory: a read of its inputs")
                if reads
                else ("GFLOP/s", "arithmetic: torch's fastest matrix product")
            )
            share = f"{rate:.{int(reads)}f} {unit}, {row['share_of_limit']:.0%} of {what}"
            lines.append(f"  {peers.label(name)}, {level}, N = {row['N']:,}: {share}")
    for row in select(rows, level="model", name="linear_infsa", which="fwd", status="ok")[-1:]:
        parts = row.get("parts_s") or {}
        total = sum(parts.values())
        if total:
            each = ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in parts.items())
            lines.append(f"  Model of {row['depth']} layers, {row['pixels']} x {row['pixels']}: {each}")
    return [*lines, *([f"  This machine: {speeds}"] if speeds else [])]


def _speeds(rows: list[dict]) -> str:
    """Bandwidths and matrix products, of the longest calls."""
    found = []
    moving = {"read": ("reads", 1), "copy": ("copies into place", 2), "clone": ("copies into fresh memory", 2)}
    for name, (what, units) in moving.items():
        mine = sorted(usual(select(rows, name=name, status="ok")), key=lambda r: r["N"])
        if mine:
            moved = units * 2 * mine[-1]["N"] * mine[-1]["dim"] * (4 if mine[-1]["dtype"] == "fp32" else 2)
            found.append(f"{what} {moved / mine[-1]['median_s'] / 1e9:.1f} GB/s")
    for name, what in (("gemm", "multiplies matrices at"), ("gemm_mm", "by torch.mm")):
        mine = [r for r in usual(select(rows, name=name, status="ok")) if "flops_per_s" in r]
        found += [f"{what} {max(r['flops_per_s'] for r in mine) / 1e9:.0f} GFLOP/s"] if mine else []
    return ", ".join(found)


def text(rows: list[dict]) -> str:
    """Every table: per level, depth, size and pass, the fastest first; then growth and goals."""
    lines, widths = _environment(rows), (38, 8, 9, 14, 8, 6, 8, 8, 8, 11, 8, 8)
    header = [
        "",
        "way",
        "time",
        "[p20 p80]",
        "x Linear",
        "GB/s",
        "GFLOP/s",
        "of limit",
        "MB",
        "params",
        "error",
        "allowed",
    ]

    def line(cells):
        return " ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths))).rstrip()

    for title, chosen, _ in tables(rows):
        lines += [f"\n{title}", line(header)]
        for row in _sorted(chosen):
            cells = list(_cells(row, chosen).values())
            if row["status"] != "ok":
                cells[2:] = [f"{'WRONG' if row['status'] == 'wrong' else row['status']}: {row['reason'][:90]}"]
            lines.append(line(cells))
    lines += ["", "Time grows as N to the power of:", *_growth(rows)] if _growth(rows) else []
    return "\n".join([*lines, "", *(goals.line(goal) for goal in goals.compare(rows) if goal["value"] is not None)])


def tables(rows: list[dict]):
    """(title, the fastest row of every mechanism, level) per case that has a time or a reason."""
    kinds = ("level", "depth", "pixels", "batch", "pass", "dtype", "layout", "dim")
    found = dict.fromkeys((r["way"] == "graph", *(r[f] for f in kinds)) for r in rows)
    for graph, *values in sorted(found, key=lambda c: (cases.LEVELS.index(c[1]), c[2] or 0, c[3], c[0], str(c))):
        case = dict(zip(kinds, values))
        chosen = best([r for r in rows if (r["way"] == "graph") == graph], **case)
        if chosen:
            depth = f"{case['depth']} layers, " if case["depth"] else ""
            title = f"{case['level']}, {depth}{case['pixels']} x {case['pixels']}, N = {(case['pixels'] // 16) ** 2}"
            more = {
                "[B,H,N,d]": case["layout"] == "bhnd",
                f"batch {case['batch']}": case["batch"] > 1,
                "CUDA graph": graph,
            }
            yield (
                ", ".join([title, case["pass"], case["dtype"], *(m for m, there in more.items() if there)]),
                chosen,
                case["level"],
            )


def _sorted(chosen: dict[str, dict]) -> list[dict]:
    return sorted(chosen.values(), key=lambda r: r.get("median_s", float("inf")))


def _cells(row: dict, chosen: dict[str, dict]) -> dict[str, str]:
    ok = row["status"] == "ok"
    over = over_linear(row, chosen)
    result = durations(row["median_s"], row.get("p20_s"), row.get("p80_s")) if ok else (row["status"], row["reason"])

    def shown(field, form, scale=1.0):
        return form.format(row[field] / scale) if row.get(field) is not None else ""

    return {
        "mechanism": row["label"], "way": row["way"], "result": result[0], "[p20, p80]": result[1],
        "over Linear-InfSA": f"{over:.2f}" if over else "", "GB/s": shown("bytes_per_s", "{:.1f}", 1e9),
        "GFLOP/s": shown("flops_per_s", "{:.0f}", 1e9), "of limit": shown("share_of_limit", "{:.0%}"),
        "peak MB": shown("peak_bytes", "{:.1f}", 1e6), "parameters": shown("parameters", "{:,.0f}"),
        "error": shown("error", "{:.0e}"), "allowed": shown("bound", "{:.0e}"), "cold": _seconds(row.get("cold_s")),
        "warm": _seconds(row.get("warm_s")), "time": row.get("time", ""), "state": row.get("state", ""),
        "note": row.get("note", ""),
    }  # fmt: skip


def _growth(rows: list[dict]) -> list[str]:
    lines = []
    for name in ("linear_infsa", "pure_infsa"):
        each = []
        for which in PASSES:
            points = [
                (r["N"], r["median_s"])
                for r in usual(select(rows, level="operator", name=name, which=which, status="ok"))
            ]
            if slope(points):
                each.append(f"{PASSES[which]} {slope(points):.2f}")
        lines += [f"  {peers.label(name)}: {', '.join(each)}"] if each else []
    return lines


def _environment(rows: list[dict]) -> list[str]:
    last = rows[-1]["environment"]
    lines = [machine.describe(last)]
    if (last.get("other_load") or 0) > BUSY:
        lines.append(
            f"WARNING: others took {last['other_load']:.0%} of the processor in this run: its times are not reliable"
        )
    return lines


def _time(row: dict) -> str:
    """The median, or why there is none."""
    return _seconds(row["median_s"]) if "median_s" in row else row.get("status", "")


def _seconds(value: float | None) -> str:
    return durations(value)[0] if value else ""


def _times(row: dict | None, own: dict | None) -> str:
    return f"{row['median_s'] / own['median_s']:.2f}" if row and own and "median_s" in row and "median_s" in own else ""


def _error(row: dict) -> str:
    return f"{row['error']:.0e}" if row.get("error") is not None else ""


def write(out: Path) -> tuple[list[dict], list[Path], int]:
    """Draws and writes everything of a folder's rows.jsonl: rows that count, files written, and how many rows do not."""
    every = load(out / "rows.jsonl")
    rows = latest(every)
    if not rows:
        return [], [], 0
    drawn = plots.draw_all(rows, out)
    (out / "table.txt").write_text(text(rows) + "\n")
    (out / "report.html").write_text(page(rows, drawn))
    return rows, [*drawn, out / "table.txt", out / "report.html"], len(every) - len(rows)


def page(rows: list[dict], drawn: list[Path]) -> str:
    from jinja2 import Environment, PackageLoader

    sections = [
        {
            "title": "Operators beside their equations",
            "images": [_embed(p) for p in drawn if p.stem == "overview"],
            "tables": [],
        }
    ]
    for level in cases.LEVELS:
        found = [
            (title, [_cells(r, chosen) for r in _sorted(chosen)]) for title, chosen, of in tables(rows) if of == level
        ]
        images = [_embed(path) for path in drawn if path.stem.startswith(level)]
        sections += [{"title": f"Level: {TITLES[level]}", "images": images, "tables": found}] if found else []
    environments = {json.dumps({**r["environment"], "date": "", "other_load": 0}): r["environment"] for r in rows}
    template = Environment(loader=PackageLoader("bench", "."), autoescape=True).get_template("page.html.j2")
    return template.render(
        sections=sections, environments=[machine.describe(e) for e in environments.values()],
        goals=[goals.line(goal) for goal in goals.compare(rows) if goal["value"] is not None],
        models=models(rows), caveats=CAVEATS,
    )  # fmt: skip


def models(rows: list[dict]) -> list[dict]:
    """The paper's Table 1: parameters, latencies, pictures per second, memory and energy at the headline, largest picture."""
    rows, lines = usual(select(rows, level="model")), []
    for depth in sorted({r["depth"] for r in rows}):
        mine = [r for r in rows if r["depth"] == depth]
        N = plots.headline(mine)
        for name in peers.PAPER:
            done = select(mine, name=name, which="fwd", status="ok")
            if not done:
                continue
            fwd, train = (best(mine, N=N, which=which).get(name, {}) for which in ("fwd", "train"))
            paper, largest = PUBLISHED.get((name, depth), {}), max(done, key=lambda r: r["pixels"])
            beyond = [r for r in select(mine, name=name, which="fwd") if r["pixels"] > largest["pixels"]]
            why = f" (then: {min(beyond, key=lambda r: r['pixels'])['status']})" if beyond else ""
            lines.append({
                "model": f"{peers.label(name)}, {depth} layers",
                "parameters": f"{done[0]['parameters'] / 1e6:.2f}M",
                "paper's": f"{paper['parameters'] / 1e6:.1f}M" if "parameters" in paper else "",
                "measured at": f"{next(r['pixels'] for r in mine if r['N'] == N)}²",
                "inference": _time(fwd),
                "training step": _time(train),
                "pictures/s": f"{1 / fwd['median_s']:.3g}" if "median_s" in fwd else "",
                "paper's A100, size not given": f"{paper['images_per_s']:g}" if "images_per_s" in paper else "",
                "peak MB": f"{fwd['peak_bytes'] / 1e6:.0f}" if "peak_bytes" in fwd else "",
                "J/picture": f"{fwd['joules']:.3g}" if fwd.get("joules") else "",
                "largest completed": f"{largest['pixels']}²{why}",
                "paper's largest": f"{paper['largest']}²" if "largest" in paper else "",
            })  # fmt: skip
    return lines


def _embed(path: Path) -> dict:
    return {"name": path.stem, "data": base64.b64encode(path.read_bytes()).decode()}

"""What the rows say: one screen for `make bench`, all tables as text, and one HTML page that needs no other file."""

import base64
import json
from itertools import product
from pathlib import Path

from . import cases, goals, machine, peers, plots
from .image import PATCH
from .rows import PASSES, TITLES, best, columns, durations, latest, load, over_linear, select, slope, usual

# Part of the processor that others may take before the report warns.
BUSY = 0.05

# What the paper prints for its models. Its column stands beside as far as its abstract gives it.
PUBLISHED = {
    ("linear_infsa", 4): {"parameters": 53.5e6, "images_per_s": 231.0, "largest": 9216},
    ("linear_infsa", 24): {"parameters": 305.4e6},
    ("softmax", 4): {"parameters": 57.7e6},
    ("softmax", 24): {"parameters": 330.6e6},
}


def screen(rows: list[dict], drawn: list[Path]) -> str:
    """The main figures, what limits them, and where the pictures are: at most 50 lines."""
    operators = [["", "forward", "backward", "of limit", "x plain", "x SDPA", "error"]]
    for name, plain in (("linear_infsa", "linear_plain"), ("pure_infsa", "pure_plain")):
        for pixels in sorted({r["pixels"] for r in usual(select(rows, level="operator", name=name))}):
            fwd, bwd = (best(usual(rows), level="operator", pixels=pixels, which=which) for which in ("fwd", "bwd"))
            own = fwd.get(name, {})
            over = [_over(fwd.get(other), own) for other in (plain, "softmax")]
            what = f"{peers.label(name)}, operator, N = {(pixels // PATCH) ** 2:,}"
            limit = _shown(own, "share_of_limit", "{:.0%}")
            operators.append([what, _time(own), _time(bwd.get(name, {})), limit, *over, _shown(own, "error", "{:.0e}")])
    found = [g for g in goals.compare(rows) if g["value"] is not None]
    missed = [g for g in found if not g["reached"]]
    lost = sum(r["status"] == "not reached" for r in rows)
    return "\n".join([
        *_environment(rows), "", *columns(operators, 1),
        *_side_by_side(rows, "layer", "Attention sub-layer, 1024 x 1024 pixels, D = 1024", 9),
        *_side_by_side(rows, "model", "Vision Transformer, 4 layers, 1024 x 1024 pixels", 3),
        "", "x: times as long as Linear-InfSA, called in turn with it. What limits what:", *_limits(rows),
        f"Goals measured: {len(found)}, missed: {len(missed)}", *("  " + goals.line(goal) for goal in missed[:6]),
        *([f"Not reached in time: {lost} rows; the next run goes on there"] if lost else []),
        *(f"Picture: {path}" for path in drawn),
    ])  # fmt: skip


def _side_by_side(rows: list[dict], level: str, title: str, count: int) -> list[str]:
    rows = [r for r in select(rows, level=level, pixels=1024) if r["depth"] in (None, 4)]
    fwd, train = (best(rows, which=which, status="ok") for which in ("fwd", "train"))
    if not fwd:
        return []
    lines = [[title, "forward", "x", "training", "x"]]
    for name in list(fwd)[:count]:
        pairs = [(_time(p.get(name, {})), _ratio(over_linear(p.get(name, {}), p))) for p in (fwd, train)]
        lines.append([f"  {peers.label(name)}", *pairs[0], *pairs[1]])
    rest = ", ".join(peers.label(n) for n in list(fwd)[count:])
    return ["", *columns(lines, 1), *([f"  slower: {rest}"] if rest else [])]


def _limits(rows: list[dict]) -> list[str]:
    """What each of ours is bound by, and how near it comes to that."""
    lines = []
    for level, name in product(("operator", "layer"), ("linear_infsa", "pure_infsa")):
        mine = usual(select(rows, level=level, name=name, which="fwd", status="ok"))
        row = max((r for r in mine if "share_of_limit" in r), key=lambda r: r["N"], default=None)
        if row:
            memory = row["limit"] == "read"
            bound = "memory: a read of its inputs" if memory else "arithmetic: torch's fastest matrix product"
            what = f"{peers.label(name)}, {level}, N = {row['N']:,}"
            lines.append(f"  {what}: {_rate(row, memory)}, {row['share_of_limit']:.0%} of {bound}")
    for row in select(rows, level="model", name="linear_infsa", which="fwd", status="ok")[-1:]:
        parts = row.get("parts_s") or {}
        each = ", ".join(f"{name} {seconds / sum(parts.values()):.0%}" for name, seconds in parts.items())
        lines += [f"  Model of {row['depth']} layers, {row['pixels']} x {row['pixels']}: {each}"] if each else []
    return lines + _speeds(rows)


def _speeds(rows: list[dict]) -> list[str]:
    """Bandwidths and matrix products, of the longest calls."""
    limits = {"read": "reads", "copy": "copies into place", "clone": "copies into fresh memory",
              "gemm": "multiplies matrices at", "gemm_mm": "by torch.mm"}  # fmt: skip
    found = []
    for name, what in limits.items():
        timed = [r for r in usual(select(rows, name=name, status="ok")) if _rate(r)]
        if row := max(timed, key=lambda r: (r["N"], -r["median_s"]), default=None):
            found.append(f"{what} {_rate(row)}")
    return [f"  This machine: {', '.join(found)}"] if found else []


def text(rows: list[dict]) -> str:
    """Every table: per level, depth, size and pass, the fastest first; then growth and goals."""
    lines = _environment(rows)
    for title, _, table in tables(rows):
        cells = [list(table[0])[:12]]
        for row in table:
            mechanism, way, result, *others = list(row.values())[:12]
            why = f"{result.replace('wrong', 'WRONG')}: {row['why not'][:90]}"
            cells.append([mechanism, way, why] if row["why not"] else [mechanism, way, result, *others])
        lines += ["", title, *columns(cells, 2)]
    growth = _growth(rows)
    lines += ["", "Time grows as N to the power of:", *growth] if growth else []
    return "\n".join([*lines, "", *(goals.line(goal) for goal in goals.compare(rows) if goal["value"] is not None)])


def tables(rows: list[dict]):
    """(title, level, cells of the fastest row of every mechanism, fastest first) per case."""
    kinds = ("level", "depth", "pixels", "batch", "pass", "dtype", "layout", "dim")
    found = dict.fromkeys((r["way"] == "graph", *(r[f] for f in kinds)) for r in rows)
    for graph, *values in sorted(found, key=lambda c: (cases.LEVELS.index(c[1]), c[2] or 0, c[3], c[0], str(c))):
        case = dict(zip(kinds, values))
        chosen = best([r for r in rows if (r["way"] == "graph") == graph], **case)
        depth = f", {case['depth']} layers" if case["depth"] else ""
        size = f"{case['pixels']} x {case['pixels']}, N = {(case['pixels'] // PATCH) ** 2}"
        unusual = ["[B,H,N,d]"] * (case["layout"] == "bhnd") + [f"batch {case['batch']}"] * (case["batch"] > 1)
        title = ", ".join([case["level"] + depth, size, case["pass"], case["dtype"], *unusual, *["CUDA graph"] * graph])
        yield title, case["level"], [_cells(row, chosen) for row in chosen.values()]


def _cells(row: dict, chosen: dict[str, dict]) -> dict[str, str]:
    ok = row["status"] == "ok"
    result = durations(row["median_s"], row.get("p20_s"), row.get("p80_s")) if ok else (row["status"], "")
    return {
        "mechanism": row["label"], "way": row["way"], "result": result[0], "[p20, p80]": result[1],
        "x Linear": _ratio(over_linear(row, chosen)), "GB/s": _shown(row, "bytes_per_s", "{:.1f}", 1e9),
        "GFLOP/s": _shown(row, "flops_per_s", "{:.0f}", 1e9), "of limit": _shown(row, "share_of_limit", "{:.0%}"),
        "peak MB": _shown(row, "peak_bytes", "{:.1f}", 1e6), "parameters": _shown(row, "parameters", "{:,.0f}"),
        "error": _shown(row, "error", "{:.0e}"), "allowed": _shown(row, "bound", "{:.0e}"),
        "cold": _shown(row, "cold_s", "{:.3g} ms", 1e-3), "warm": _shown(row, "warm_s", "{:.3g} ms", 1e-3),
        "time": row.get("time", ""), "state": row.get("state", ""), "note": row.get("note", ""),
        "why not": "" if ok else row["reason"],
    }  # fmt: skip


def _growth(rows: list[dict]) -> list[str]:
    lines = []
    for name in ("linear_infsa", "pure_infsa"):
        mine = usual(select(rows, level="operator", name=name, status="ok"))
        slopes = {p: slope([(r["N"], r["median_s"]) for r in select(mine, which=p)]) for p in PASSES}
        each = [f"{PASSES[p]} {power:.2f}" for p, power in slopes.items() if power]
        lines += [f"  {peers.label(name)}: {', '.join(each)}"] if each else []
    return lines


def _environment(rows: list[dict]) -> list[str]:
    last, load = rows[-1]["environment"], max(r["environment"].get("other_load") or 0 for r in rows)
    busy = f"WARNING: others took {load:.0%} of the processor in this run: its times are not reliable"
    return [machine.describe(last), *([busy] if load > BUSY else [])]


def _time(row: dict) -> str:
    """The median, or why there is none."""
    return durations(row["median_s"])[0] if "median_s" in row else row.get("status", "")


def _over(row: dict | None, own: dict) -> str:
    return _ratio(row["median_s"] / own["median_s"]) if row and "median_s" in row and "median_s" in own else ""


def _ratio(value: float | None) -> str:
    return f"{value:.2f}" if value else ""


def _rate(row: dict, memory: bool = True) -> str:
    moved = _shown(row, "bytes_per_s", "{:.1f} GB/s", 1e9)
    return moved if memory and moved else _shown(row, "flops_per_s", "{:.0f} GFLOP/s", 1e9)


def _shown(row: dict, field: str, form: str, scale: float = 1.0) -> str:
    return form.format(row[field] / scale) if row.get(field) is not None else ""


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

    every = list(tables(rows))
    sections = [{"title": "Operators beside their equations", "images": _embedded(drawn, "overview"), "tables": []}]
    for level in cases.LEVELS:
        if found := [(title, lines) for title, of, lines in every if of == level]:
            sections.append({"title": f"Level: {TITLES[level]}", "images": _embedded(drawn, level), "tables": found})
    environments = {json.dumps({**r["environment"], "date": "", "other_load": 0}): r["environment"] for r in rows}
    template = Environment(loader=PackageLoader("bench", "."), autoescape=True).get_template("page.html.j2")
    return template.render(
        sections=sections, environments=[machine.describe(e) for e in environments.values()],
        goals=[goals.line(goal) for goal in goals.compare(rows) if goal["value"] is not None],
        models=models(rows),
    )  # fmt: skip


def _embedded(drawn: list[Path], start: str) -> list[dict]:
    found = [path for path in drawn if path.stem.startswith(start)]
    return [{"name": path.stem, "data": base64.b64encode(path.read_bytes()).decode()} for path in found]


def models(rows: list[dict]) -> list[dict]:
    """The paper's Table 1: parameters, latencies, pictures per second, memory and energy at the headline, largest picture."""
    rows, lines = usual(select(rows, level="model")), []
    for depth, name in product(sorted({r["depth"] for r in rows}), peers.PAPER):
        mine = [r for r in rows if r["depth"] == depth]
        N, done = plots.headline(mine), select(mine, name=name, which="fwd", status="ok")
        if not done:
            continue
        fwd, train = (best(mine, N=N, which=which).get(name, {}) for which in ("fwd", "train"))
        paper, largest = PUBLISHED.get((name, depth), {}), max(done, key=lambda r: r["pixels"])
        beyond = [r for r in select(mine, name=name, which="fwd") if r["pixels"] > largest["pixels"]]
        why = f" (then: {min(beyond, key=lambda r: r['pixels'])['status']})" if beyond else ""
        lines.append({
            "model": f"{peers.label(name)}, {depth} layers",
            "parameters": f"{done[0]['parameters'] / 1e6:.2f}M",
            "paper's": _shown(paper, "parameters", "{:.1f}M", 1e6),
            "measured at": f"{next(r['pixels'] for r in mine if r['N'] == N)}²",
            "inference": _time(fwd),
            "training step": _time(train),
            "pictures/s": f"{1 / fwd['median_s']:.3g}" if "median_s" in fwd else "",
            "paper's A100, size not given": _shown(paper, "images_per_s", "{:g}"),
            "peak MB": _shown(fwd, "peak_bytes", "{:.0f}", 1e6),
            "J/picture": _shown(fwd, "joules", "{:.3g}"),
            "largest completed": f"{largest['pixels']}²{why}",
            "paper's largest": _shown(paper, "largest", "{}²"),
        })  # fmt: skip
    return lines

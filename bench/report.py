"""The results as text: environment, what was left out, goals, slopes, and the table last."""

from .cases import DIRECTIONS, HEADS
from .ways import WAYS

# Position of the column of times.
TIME = 3

# Part of the processor that others may take before the report warns.
BUSY = 0.05

NAMES = {"linear": "Linear-InfSA", "pure": "Pure InfSA"}

HEADERS = (
    "N", "pixels", "pass", "time", "[p20, p80]", "GB/s", "GFLOP/s", "of limit",
    "x eager", "x compile", "x SDPA", "extra MB", "error", "allowed",
)  # fmt: skip


def text(results: dict) -> str:
    parts = [_environment(results), _left_out(results["rows"]), _slopes(results["slopes"]), _goals(results["goals"])]
    parts += [_operator(results["rows"], op) for op in HEADS if any(r["op"] == op for r in results["rows"])]
    parts.append(_layer(results["layer"]))
    return "\n\n".join(part for part in parts if part)


def _environment(results: dict) -> str:
    e, c = results["environment"], results["ceilings"]
    GB = 1e9
    lines = [
        f"{e['device']}, {e['threads']} threads on {e['cores']} cores, {e['isa'] or 'no extension'}; "
        f"torch {e['torch']}; infsa_kernels {e['infsa_kernels']} ({e['commit']}), backend {e['backend']!r}; "
        f"{e['date']}; {e['timer']}",
        f"Limits of this machine in this run: reads {c['read'] / GB:.1f} GB/s ({c['read_way']}), copies into place "
        f"{c['copy'] / GB:.1f} GB/s, into fresh memory {c['clone'] / GB:.1f} GB/s,",
        f"multiplies {c['gemm_size']}^3 matrices at {c['gemm'] / GB:.0f} GFLOP/s ({c['gemm_way']}; torch.mm: "
        f"{c['torch_mm'] / GB:.0f})",
    ]
    if (load := e["other_load"] or 0) > BUSY:
        lines.append(
            f"WARNING: other processes took {load:.0%} of the processor in this run: its times are not reliable"
        )
    return "\n".join(lines)


def _left_out(rows: list[dict]) -> str:
    """What the table's cells have no room to explain."""
    lines = []
    for r in rows:
        if r["direction"] == "bwd" or r["status"] == "ok" or (r["candidate"] != "infsa" and "would" in r["reason"]):
            continue
        status = "WRONG" if r["status"] == "wrong" else r["status"]
        what = f"{NAMES[r['op']]} N = {r['N']}, {r['variant']}, {r['direction']}, {WAYS[r['candidate']].LABEL}"
        lines.append(f"  {what}: {status}: {r['reason']}")
    return "\n".join(["Not timed:", *lines]) if lines else ""


def _slopes(found: list[dict]) -> str:
    lines = []
    for op in HEADS:
        mine = [s for s in found if s["op"] == op and s["candidate"] == "infsa"]
        if mine:
            each = ", ".join(f"{DIRECTIONS[s['direction']]} {s['exponent']:.2f}" for s in mine)
            lines.append(f"  {NAMES[op]}: {each}  (N = {mine[0]['from_N']} .. {max(s['to_N'] for s in mine)})")
    return "\n".join(["Time grows as N to the power of:", *lines]) if lines else ""


def _goals(goals: list[dict]) -> str:
    if not goals:
        return ""
    outcome = {True: "reached", False: "MISSED", None: "not measured"}
    lines = ["Goals (Linear: N = 65536, Pure: N = 4096; float32, tied, [B,N,H,d] where nothing else is said):"]
    for g in goals:
        value = "-" if g["value"] is None else f"{g['value']:.2f}"
        lines.append(f"  {g['goal']:<58} {value:>7}   {g['target']:<8} {outcome[g['reached']]}")
    return "\n".join(lines)


def _operator(rows: list[dict], op: str) -> str:
    rows = [r for r in rows if r["op"] == op]
    H, d = rows[0]["H"], rows[0]["d"]
    limit = "a read of the inputs (bwd: a copy of them into place)" if op == "linear" else "torch's matrix product"
    lines = [
        f"{NAMES[op]}: {H} heads of {d}, batch 1",
        f"of limit: beside {limit}, same bytes or FLOPs. x: times faster than; ~s, ~GB: not run, would take that much.",
        "extra MB: peak beyond the inputs, results included. error: largest against float64, over the largest entry.",
    ]
    own = [r for r in rows if r["candidate"] == "infsa"]
    cells = {id(r): _cells(r, rows) for r in own}
    widths = [max(map(len, column)) for column in zip(HEADERS, *(cells[id(r)] for r in own if r["status"] == "ok"))]
    header = _line(HEADERS, widths)
    lines += ["", header, "-" * len(header)]
    for variant in dict.fromkeys(r["variant"] for r in sorted(own, key=lambda r: not r["sweep"])):
        lines.append(variant)
        lines += [_line(cells[id(r)], widths) for r in own if r["variant"] == variant]
    return "\n".join(lines)


def _layer(rows: list[dict]) -> str:
    if not rows:
        return ""
    heads = ("N", "pass", "pooled", "plain", "x plain", "extra MB", "plain", "error", "allowed")
    widths = (6, 7, 9, 9, 7, 8, 7, 8, 8)
    lines = [
        "Pooled layer: D = 1024, 64 heads, K = Q, LayerNorm and biases, batch 1",
        "plain: LayerNorm, nn.Linear, the fused operator, nn.Linear",
        _line(heads, widths),
    ]
    for r in (r for r in rows if r["candidate"] == "pooled"):
        same = ("N", "direction")
        p = next(p for p in rows if p["candidate"] == "plain" and all(p[f] == r[f] for f in same))
        times = [durations(row["median_s"], row["p20_s"], row["p80_s"])[0] for row in (r, p)]
        peaks = [f"{row['peak_bytes'] / 1e6:.1f}" if "peak_bytes" in row else "-" for row in (r, p)]
        wrong = f"  WRONG: {r['worst']}" if r["status"] == "wrong" else ""
        speed_up = f"{p['median_s'] / r['median_s']:.2f}"
        cells = (str(r["N"]), r["direction"], *times, speed_up, *peaks, f"{r['error']:.1e}", f"{r['bound']:.1e}")
        lines.append(_line(cells, widths) + wrong)
    return "\n".join(lines)


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    if cells[TIME] and not cells[TIME + 1]:  # no time but a reason: it may fill the empty columns that follow
        end = next(i for i in range(TIME + 1, len(cells)) if cells[i])
        reason = cells[TIME].ljust(sum(widths[TIME:end]) + 2 * (end - TIME - 1))
        cells, widths = (*cells[:TIME], reason, *cells[end:]), [*widths[:TIME], 0, *widths[end:]]
    return "  ".join(cell.rjust(width) for cell, width in zip(cells, widths))


def _cells(r: dict, rows: list[dict]) -> tuple[str, ...]:
    head = (str(r["N"]), str(r["pixels"]), r["direction"])
    peers = [_speed_up(r, rows, name) for name in ("eager", "compile", "sdpa")]
    error, allowed = (f"{r[f]:.1e}" if r.get(f) is not None else "-" for f in ("error", "bound"))
    if r["status"] != "ok":
        outcome = "WRONG" if r["status"] == "wrong" else f"{r['status']}: {r['reason']}"
        return (*head, outcome, "", "", "", "", *peers, "", error, allowed)
    return (
        *head,
        *durations(r["median_s"], r["p20_s"], r["p80_s"]),
        f"{r['bytes_per_s'] / 1e9:.1f}",
        f"{r['flops_per_s'] / 1e9:.1f}",
        f"{r['share_of_limit']:.0%}",
        *peers,
        f"{r['peak_bytes'] / 1e6:.1f}" if "peak_bytes" in r else "-",
        error,
        allowed,
    )


def _speed_up(r: dict, rows: list[dict], name: str) -> str:
    same = ("N", "direction", "variant")
    peer = next((p for p in rows if p["candidate"] == name and all(p[f] == r[f] for f in same)), None)
    if peer is None:
        return "-"
    if peer["status"] != "ok":
        reason = peer["reason"].removeprefix("would take ").removeprefix("would need ")
        return reason if reason.startswith("~") else peer["status"]
    return f"{peer['median_s'] / r['median_s']:.2f}" if r["status"] == "ok" else "-"


def durations(median: float, low: float, high: float) -> tuple[str, str]:
    """The median with its unit, and the interval in the same unit."""
    unit, factor = next((u for u in (("s", 1), ("ms", 1e3)) if median * u[1] >= 1), ("us", 1e6))
    median, low, high = (
        f"{t * factor:.{2 if t * factor < 10 else 1 if t * factor < 100 else 0}f}" for t in (median, low, high)
    )
    return f"{median} {unit}", f"[{low}, {high}]"

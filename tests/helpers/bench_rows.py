"""Rows of the benchmark as a run would have written them."""

from bench import peers

ENVIRONMENT = {
    "device": "a processor", "device_type": "cpu", "threads": 1, "cores": 1, "torch": "2", "commit": "abc", "date": "2026-11-21",
    "isa": "avx2", "infsa_kernels": "0", "backend": "cpu", "timer": "wall clock",
}  # fmt: skip


def row(name="linear_infsa", pixels=1024, which="fwd", way="eager", level="layer", status="ok", **fields):
    made = {
        "level": level,
        "device": "cpu",
        "dtype": "fp32",
        "layout": "bnhd",
        "batch": 1,
        "depth": None,
        "dim": 1024,
        "way": way,
    }
    made |= {"name": name, "pixels": pixels, "pass": which, "label": peers.label(name), "N": (pixels // 16) ** 2}
    made |= {"status": status, "environment": ENVIRONMENT}
    if status == "ok":
        time = fields.pop("median_s", 1e-3)
        made |= {
            "median_s": time,
            "p20_s": 0.9 * time,
            "p80_s": 1.1 * time,
            "samples": 5,
            "peak_bytes": 10**8,
            "parameters": 1000,
        }
        made |= {"error": 1e-6, "bound": 1e-3, "time": "N D", "state": "d", "note": ""}
    else:
        made |= {"reason": fields.pop("reason", "because")}
    return made | fields


def turn(*names, level="operator", pixels=112, phase="fwd", way="eager", anchors=("linear_infsa",), **fields):
    """A turn of tiny mechanisms, as cases.turns makes them."""
    made = {"level": level, "device": "cpu", "dtype": "fp32", "layout": "bnhd", "batch": 1, "dim": 64, "pixels": pixels}
    made |= {"depth": 4 if level == "model" else None, "phase": phase, "way": way, "names": list(names)}
    return made | {"anchors": list(anchors) if level != "model" else []} | fields

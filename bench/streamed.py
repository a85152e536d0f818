"""A model on a picture in a file, which memory need not hold: `python -m bench --file picture.npy --pixels 46080 --dim 256`.

Not a turn of the engine: one run may take hours, and goes on where it was interrupted. Its row, a line of OUT/streamed.jsonl,
says how much of its time the disk alone would take: bytes read and written over the rates that were measured just before.
"""

import json
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch

from infsa_kernels.nn import InfViT
from infsa_kernels.streaming import predict_file
from infsa_kernels.streaming.plan import measured_disk

from . import machine
from .image import PERIOD, photograph


def main(file: Path, pixels: int | None, dim: int, depth: int, dtype: torch.dtype, device: str, out: Path) -> dict:
    """Measures, prints and keeps the row. A file that is not there is made: the photograph, repeated to pixels x pixels."""
    if not file.exists():
        if pixels is None or file.suffix != ".npy":
            raise SystemExit(f"{file} is not there; one that ends in .npy is made with --pixels")
        write_picture(file, pixels)
    torch.manual_seed(0)
    model = InfViT(224, embed_dim=dim, depth=depth, device=device, dtype=dtype).eval()
    torch.nn.init.normal_(model.head.weight, std=0.02)
    load_of_others = machine.OtherLoad()
    read, write = measured_disk(file.parent)
    processor = time.process_time()
    found = predict_file(model, file, work_dir=file.with_suffix(".work"), progress=sys.stderr.isatty())
    on_disk = found.bytes_read / read + found.bytes_written / write
    row = {
        "name": "linear_infsa", "file": file.name, "tokens": found.tokens, "dim": dim, "depth": depth,
        "dtype": str(dtype).removeprefix("torch."), "seconds": found.seconds, "tokens_per_s": found.tokens / found.seconds,
        "processor_seconds": time.process_time() - processor,
        "bytes_read": found.bytes_read, "bytes_written": found.bytes_written, "disk_read_rate": read, "disk_write_rate": write,
        "disk_share": on_disk / found.seconds, "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10,
        "other_load": load_of_others.share(), "environment": machine.environment(torch.device(device)),
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "streamed.jsonl", "a") as rows:
        rows.write(json.dumps(row) + "\n")
    print(described(row))
    return row


def described(row: dict) -> str:
    return (
        f"{row['file']}: {row['tokens']:,} tokens, D = {row['dim']}, {row['depth']} layers: {row['seconds']:,.1f} s "
        f"({row['processor_seconds']:,.1f} s of processors), {row['tokens_per_s']:,.0f} tokens/s, "
        f"{row['peak_bytes'] / 1e9:.2f} GB of memory at most\n"
        f"  {row['bytes_read'] / 1e9:,.1f} GB read, {row['bytes_written'] / 1e9:,.1f} GB written; at the disk's "
        f"{row['disk_read_rate'] / 1e9:.2f} and {row['disk_write_rate'] / 1e9:.2f} GB/s: {row['disk_share']:.0%} of the time"
    )


def write_picture(file: Path, pixels: int) -> None:
    """The photograph and its mirror image, repeated, as uint8; a band of rows at a time."""
    period = (photograph(PERIOD) * 255).astype(np.uint8)
    band = np.ascontiguousarray(np.tile(period, (1, -(-pixels // PERIOD), 1))[:, :pixels])
    with open(file, "wb") as out:
        header = {"descr": band.dtype.str, "fortran_order": False, "shape": (pixels, pixels, 3)}
        np.lib.format.write_array_header_1_0(out, header)
        for row in range(0, pixels, PERIOD):
            band[: pixels - row].tofile(out)

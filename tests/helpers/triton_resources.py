"""What every shipped Triton configuration compiles to, with no GPU.

`PYTHONPATH=tests python -m helpers.triton_resources` writes the table.

The launchers run on meta tensors with Triton's driver replaced by one that names an architecture, and each launch compiles, by
Triton's own specialisation of the arguments, instead of starting.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.runtime.jit import compute_cache_key

from helpers.triton_sass import CODE, RESOURCES, measure
from helpers.triton_target import compiled, launching
from infsa_kernels.ops import central_query as central_query_op
from infsa_kernels.ops import linear as linear_op
from infsa_kernels.ops import linear_floor as linear_floor_op
from infsa_kernels.ops import pure as pure_op
from infsa_kernels.ops import score_pool as score_pool_op
from infsa_kernels.ops import score_pool_floor as score_pool_floor_op
from infsa_kernels.ops import varlen
from infsa_kernels.triton import (
    central_query,
    linear,
    linear_floor,
    linear_varlen,
    linear_varlen_floor,
    pure,
    pure_backward,
    pure_varlen,
    score_pool,
    score_pool_floor,
)

TABLE = Path(__file__).parents[1] / "gpu" / "triton_resources.txt"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
COLUMNS = ["arch", "kernel", "case", "tile", *RESOURCES, *CODE]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}


@dataclass(frozen=True)
class Case:
    """One call of an operator, forward and backward, as the launchers see it; tf32 is float32 at "high" precision."""

    op: str
    dtype: str
    d: int
    N: int
    tied: bool = False
    masked: bool = False
    normalised: bool = False  # tokens of the pooled layer

    def __str__(self) -> str:
        form = "/packed" * (self.op in PACKED) + "/pooled" * (self.op in POOLED) + "/floor" * self.op.endswith("floor")
        return (
            f"{self.dtype}/d{self.d}/N{self.N}"
            + form
            + ("/tied" if self.tied else "")
            + ("/masked" if self.masked else "")
            + ("/normalised" if self.normalised else "")
        )

    @property
    def common(self) -> bool:
        """Heads of at most 64 of linear and pure, and of the pooled layer those of 64 in bfloat16."""
        if self.op == "pooled":
            return (self.dtype, self.d) == ("bf16", 64)
        return self.d <= 64 and self.op in ("linear", "pure")

    def run(self) -> None:
        if self.op in POOLED:
            _pooled_forward_and_backward(self)
            return

        def token_major():
            t = torch.empty(1, self.N, 1024 // self.d, self.d, dtype=DTYPES[self.dtype], device="meta")
            return t.transpose(1, 2)

        q, v = token_major(), token_major()
        k = None if self.tied else token_major()
        if self.op in PACKED:
            _packed_forward_and_backward(self.op, q, k, v)
            return
        rho = torch.empty(q.shape[:2], device="meta")
        mask = torch.empty(1, self.N, dtype=torch.bool, device="meta") if self.masked else None
        _forward_and_backward(self.op, q, k, v, rho, mask)


def _forward_and_backward(op, q, k, v, rho, mask) -> None:
    raw, forward, backward = {
        "linear": (linear_op.raw, linear.forward, linear.backward),
        "linear_floor": (linear_floor_op.raw, linear_floor.forward, linear_floor.backward),
        "pure": (pure_op.raw, pure.forward, pure_backward.backward),
    }[op]
    numbers = (1e-6, 0.1, 1.0) if op == "linear_floor" else (1e-6, 1.0)
    out, *saved = forward(q, k, v, *numbers, rho, mask, mask)
    saved = [out, *saved] if op == "pure" else saved
    arguments = torch.empty_like(out), q, k, v, *saved, *numbers, rho, mask, mask
    backward(*arguments, raw.gradients((*arguments, [True] * 4)))


# Packed operators: raw, forward and backward.
PACKED = {
    "linear_varlen": (varlen.raw_linear, linear_varlen.forward, linear_varlen.backward),
    "linear_varlen_floor": (varlen.raw_linear_floor, linear_varlen_floor.forward, linear_varlen_floor.backward),
    "pure_varlen": (varlen.raw_pure, pure_varlen.forward, pure_varlen.backward),
}


def _packed_forward_and_backward(op, q, k, v) -> None:
    """Three sequences of which one has all the tokens, as far as their bounds tell."""
    raw, forward, backward = PACKED[op]
    q, k, v = (None if t is None else t[0].transpose(0, 1) for t in (q, k, v))
    cu_seqlens = torch.empty(4, dtype=torch.int32, device="meta")
    N, rho = q.shape[0], torch.empty(3, q.shape[1], device="meta")
    numbers = (1e-6, 0.1, 1.0) if op.endswith("floor") else (1e-6, 1.0)
    rest = cu_seqlens, None if k is None else cu_seqlens, N, N, *numbers, rho
    out, *saved = forward(q, k, v, *rest)
    saved = [out, *saved] if op == "pure_varlen" else saved
    arguments = torch.empty_like(out), q, k, v, *saved, *rest
    backward(*arguments, raw.gradients((*arguments, [True] * 4)))


# What the pooled layer is made of: raw operators and their modules, without a floor and with one.
POOLED = {
    "pooled": ((central_query_op.raw, central_query), (score_pool_op.raw, score_pool)),
    "pooled_floor": ((score_pool_floor_op.raw, score_pool_floor),),
}


@dataclass(frozen=True)
class Pooled:
    """The pooled layer of tokens of another width, heads of 16."""

    dtype: str
    D: int
    normalised: bool
    op: str = "pooled"
    d: int = 16
    N: int = 4096
    masked: bool = False

    def __str__(self) -> str:
        return f"{self.dtype}/D{self.D}" + "/normalised" * self.normalised

    def run(self) -> None:
        _pooled_forward_and_backward(self)


def _pooled_forward_and_backward(call: "Case | Call | Pooled") -> None:
    """Tokens of 1024 channels where the call does not say, as many as all heads have together; with biases."""
    B, N, d, D = getattr(call, "B", 1), call.N, call.d, getattr(call, "D", 1024)
    H = getattr(call, "H", D // d)

    def new(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    x = new(B, N, D, dtype=DTYPES[call.dtype])
    mask = new(B, N, dtype=torch.bool) if call.masked else None
    for raw, module in POOLED[call.op]:
        of_heads = (new(H, d, D, dtype=x.dtype), new(H, d)) if module is central_query else (new(B, H, D), new(B, H))
        floor = [0.1] if raw.name.endswith("floor") else []
        numbers = 1e-6 if call.normalised else None, 1e-6, *floor
        results = dict(zip(raw.forward.results, module.forward(x, *of_heads, *numbers, mask)))
        saved = [results[name] for name in raw.backward.arguments if name in results]
        cotangents = [torch.empty_like(results[name[1:]]) for name in raw.backward.arguments if name[1:] in results]
        arguments = *cotangents, x, *of_heads, *saved, *numbers, mask
        module.backward(*arguments, raw.gradients((*arguments, [True] * 3)))


def cases() -> list[Case]:
    """Every configuration, in the variant of it that needs the most registers before the others."""
    found = [Case("linear", "bf16", 16, N, tied) for N in (197, 4096) for tied in (False, True)]
    found += [Case("linear", dtype, 64, 4096, masked=True) for dtype in ("fp16", "fp32")]
    found += [Case("linear", "bf16", 256, 65536)]  # few heads, whose partial sums a launch of their own adds up
    # strides that are multiples of 8 and not of 16
    found += [Case("linear", "bf16", 40, 197, True), *(Case("linear", dtype, 72, 4096) for dtype in ("bf16", "fp32"))]
    found += [Case("linear_floor", "bf16", 16, N, tied) for N in (197, 4096) for tied in (False, True)]
    found += [Case("linear_floor", dtype, 64, 4096, masked=True) for dtype in ("fp16", "fp32")]
    found += [Case("linear_varlen", "bf16", 16, N, tied) for N in (197, 4096) for tied in (False, True)]
    found += [Case("linear_varlen", dtype, 64, 4096) for dtype in ("fp16", "fp32")]
    found += [Case("linear_varlen_floor", "bf16", 16, N, tied) for N in (197, 4096) for tied in (False, True)]
    found += [Case("linear_varlen_floor", dtype, 64, 4096) for dtype in ("fp16", "fp32")]
    for d in (64, 128, 256):
        for tied in (False, True):
            found += [Case("pure", "fp16", d, 4000, tied, masked) for masked in (False, True)]
            found += [Case("pure", "bf16", d, 4096, tied)]
        found += [Case("pure", dtype, d, 4000) for dtype in ("fp32", "tf32")]
        found += [Case("pure", dtype, d, 32) for dtype in ("fp16", "fp32")]  # few scores: another preparation
        found += [Case("pure_varlen", "fp16", d, 4000, tied) for tied in (False, True)]
        found += [Case("pure_varlen", "bf16", d, 4096, tied) for tied in (False, True)]
        found += [Case("pure_varlen", dtype, d, 4000) for dtype in ("fp32", "tf32")]
    found += [Case("pooled", "bf16", d, 4096, normalised=True) for d in (64, 16, 256)]
    found += [Case("pooled", dtype, 64, 4096, masked=True, normalised=True) for dtype in ("fp16", "fp32", "tf32")]
    found += [Case("pooled", "bf16", 64, 4096), Case("pooled", "fp32", 256, 4096)]
    # few tokens and many, whose tiles of central_query are not the same on every architecture
    found += [Case("pooled", "bf16", d, N, normalised=True) for N in (197, 16384) for d in (64, 16)]
    found += [Case("pooled", "fp16", d, N, masked=True, normalised=True) for d, N in ((64, 208), (16, 16384))]
    found += [Case("pooled_floor", dtype, 16, 4096, masked=True, normalised=True) for dtype in ("bf16", "fp16", "fp32")]
    found += [Case("pure", "bf16", 40, 577, True), *(Case("pure", dtype, 72, 577) for dtype in ("bf16", "fp32"))]
    return found


@dataclass(frozen=True)
class Call:
    """A tied call in bfloat16, forward and backward, of which only the compilations count."""

    op: str
    B: int
    N: int
    H: int
    d: int
    dtype, masked, normalised = "bf16", False, True  # of the pooled layer

    def run(self) -> None:
        if self.op in POOLED:
            _pooled_forward_and_backward(self)
            return
        q, v = (
            torch.empty(self.B, self.N, self.H, self.d, dtype=torch.bfloat16, device="meta").transpose(1, 2)
            for _ in "qv"
        )
        _forward_and_backward(self.op, q, None, v, None, None)


def rows(arch: str, once: bool = False) -> list[dict[str, str]]:
    """One row per kernel and case; what compiles alike is not repeated.

    ``once``: of common cases one row per kernel, tile, head dimension and width of the dtype, and only the kernels with a
    budget for their code disassembled.
    """
    table, seen, case = {}, set(), None

    def record(kernel, programs, args, options):
        row = {"arch": arch, "kernel": kernel.fn.__name__.removesuffix("_kernel"), "case": str(case)}
        row["tile"] = _tile(options)
        key = row["kernel"], row["tile"], case.d, DTYPES[case.dtype].itemsize == 4 and case.dtype, case.op in PACKED
        if once and (key in seen or not case.common):
            return
        seen.add(key)
        made = compiled(kernel, programs, args, options)
        if made.hash not in table:
            disassemble = not once or row["kernel"].startswith(("linear", "pure_fwd"))
            table[made.hash] = row | measure(arch, made, disassemble)

    precision = torch.get_float32_matmul_precision()
    try:
        with launching(arch, record):
            for case in cases():
                torch.set_float32_matmul_precision("high" if case.dtype == "tf32" else "highest")
                case.run()
    finally:
        torch.set_float32_matmul_precision(precision)
    return list(table.values())


def compilations(calls: list[Call], arch: str = "sm_90") -> set:
    """What Triton would compile for all of these calls together; nothing is compiled."""
    found = set()

    def record(kernel, programs, args, options):
        _, by_specialisation, _, _, binder = kernel.device_caches[0]
        _, specialisation, chosen = binder(*args, **options)
        found.add((kernel.fn.__name__, compute_cache_key(by_specialisation, specialisation, chosen)))

    with launching(arch, record):
        for call in calls:
            call.run()
    return found


def _tile(options: dict) -> str:
    names = [n for n in ("G", "BT", "BM", "BK", "BLOCK_M", "BLOCK_N", "ROWS") if n in options]
    described = "+tma" if options.get("DESCRIPTORS") else ""
    return "x".join(str(options[n]) for n in names) + f"/w{options['num_warps']}" + described


def text(found: list[dict[str, str]]) -> str:
    widths = [max(len(c), *(len(row.get(c, "?")) for row in found)) for c in COLUMNS]
    lines = [
        "  ".join(value.ljust(w) for value, w in zip(row, widths)).rstrip()
        for row in (COLUMNS, *([r.get(c, "?") for c in COLUMNS] for r in found))
    ]
    return f"# Triton {triton.__version__}; the columns are explained in triton_sass.py\n" + "\n".join(lines) + "\n"


def read() -> tuple[str, list[dict[str, str]]]:
    """The Triton version and the rows of the committed table."""
    head, _, *lines = TABLE.read_text().splitlines()
    return head.split()[2].rstrip(";"), [dict(zip(COLUMNS, line.split())) for line in lines]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", action="append", choices=ARCHITECTURES, help="print this one's rows, write nothing")
    parser.add_argument("--once", action="store_true", help="with --arch: each kernel and tile once")
    args = parser.parse_args()
    fresh = [row for arch in args.arch or ARCHITECTURES for row in rows(arch, args.once)]
    if args.arch:
        print(text(fresh), end="")
    else:
        TABLE.parent.mkdir(exist_ok=True)
        TABLE.write_text(text(fresh))

"""What every shipped Triton configuration compiles to, with no GPU: `python tests/triton_resources.py` rewrites the table.

The launchers run on meta tensors with Triton's driver replaced by one that names an architecture, and each launch compiles, by
Triton's own specialisation of the arguments, instead of starting.
"""

import argparse
import contextlib
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from infsa_kernels.triton import configs, linear, pure, pure_backward

TABLE = Path(__file__).parent / "data" / "triton_resources.txt"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")

# Per multiprocessor: bytes of shared memory and threads.
LIMITS = {
    "sm_80": (164 << 10, 2048),
    "sm_90": (228 << 10, 2048),
    "sm_100": (228 << 10, 2048),
    "sm_120": (100 << 10, 1536),
}
COLUMNS = [
    "arch",
    "kernel",
    "case",
    "tile",
    "regs",
    "spill",
    "shared",
    "per_SM",
    "matrix",
    "async",
    "load",
    "loop",
    "barriers",
]


@dataclass(frozen=True)
class Case:
    """One call of an operator, forward and backward, as the launchers see it."""

    op: str
    N: int
    d: int
    dtype: torch.dtype
    tied: bool
    masked: bool = False

    def __str__(self) -> str:
        dtype = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[self.dtype]
        return f"{dtype}/d{self.d}/N{self.N}" + ("/tied" if self.tied else "") + ("/masked" if self.masked else "")

    def run(self) -> None:
        def token_major(dtype=self.dtype):
            return torch.empty(1, self.N, 1024 // self.d, self.d, dtype=dtype, device="meta").transpose(1, 2)

        q, v = token_major(), token_major()
        k = None if self.tied else token_major()
        rho = torch.empty(q.shape[:2], device="meta")
        mask = torch.empty(1, self.N, dtype=torch.bool, device="meta") if self.masked else None
        forward, backward = {
            "linear": (linear.forward, linear.backward),
            "pure": (pure.forward, pure_backward.backward),
        }[self.op]
        out, *saved = forward(q, k, v, 1e-6, 1.0, rho, mask, mask)
        saved = [out, *saved] if self.op == "pure" else saved
        backward(torch.empty_like(out), q, k, v, *saved, 1e-6, 1.0, rho, mask, mask, [True] * 4)


def cases() -> list[Case]:
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    found = [Case("linear", N, 16, bf16, tied) for N in (197, 4096) for tied in (True, False)]
    found += [Case("linear", 4096, 64, dtype, False, masked=True) for dtype in (fp16, fp32)]
    for d in (64, 128, 256):
        for tied in (True, False):
            found += [Case("pure", 4096, d, bf16, tied), Case("pure", 4000, d, fp16, tied, masked=True)]
            found += [Case("pure", 4000, d, fp32, tied)]
    return [*found, Case("pure", 197, 64, fp16, True), Case("pure", 197, 64, fp16, False)]


def rows(arch: str, chosen: list[Case]) -> list[dict]:
    """One row per kernel and case; a kernel that a case shares with the one before is not repeated."""
    compiled = []

    def record(kernel, programs, device, *args, **options):
        # What compiles alike runs alike: the interpreter and a GPU pass the very same arguments.
        compiled.append((kernel, kernel.warmup(*args, grid=(programs,), enable_fp_fusion=True, **options), options))

    modules = linear, pure, pure_backward
    saved = configs.arch_of, linear.launch
    kernels = {f for m in modules for f in vars(m).values() if hasattr(f, "device_caches")}
    driver.set_active(_Driver(arch))
    configs.arch_of = lambda device: arch
    try:
        for m in modules:
            m.launch = record
        for kernel in kernels:
            kernel.device_caches.clear()
        table = {}
        for case in chosen:
            compiled.clear()
            case.run()
            for kernel, result, options in compiled:
                row = {
                    "arch": arch,
                    "kernel": kernel.fn.__name__.removesuffix("_kernel"),
                    "case": str(case),
                    "tile": _tile(options),
                }
                table.setdefault((row["kernel"], result.hash), row | _measure(arch, result))
        return list(table.values())
    finally:
        configs.arch_of = saved[0]
        for m in modules:
            m.launch = saved[1]
        for kernel in kernels:
            kernel.device_caches.clear()
        with contextlib.suppress(RuntimeError):  # without a GPU there is no driver to go back to
            driver.reset_active()


class _Driver:
    def __init__(self, arch: str):
        nvidia = arch.startswith("sm_")
        self.target = GPUTarget("cuda", int(arch[3:]), 32) if nvidia else GPUTarget("hip", arch, 64)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def _tile(options: dict) -> str:
    names = [n for n in ("G", "BT", "BLOCK_M", "BLOCK_N", "ROWS") if n in options]
    described = "+tma" if options.get("DESCRIPTORS") else ""
    return "x".join(str(options[n]) for n in names) + f"/w{options['num_warps']}" + described


def _measure(arch: str, result) -> dict:
    shared, warps = result.metadata.shared, result.metadata.num_warps
    if "amdgcn" in result.asm:
        text = result.asm["amdgcn"]
        regs, spill = (int(re.search(rf"\.{name}:\s+(\d+)", text)[1]) for name in ("vgpr_count", "vgpr_spill_count"))
        matrix = len(re.findall(r"v_mfma_", text))
        widest = "128" if "dwordx4" in text else "narrow"
        per_SM = min(4 * min(8, 512 // (-(-regs // 8) * 8)) // warps, (64 << 10) // max(1, shared))
        return _row(regs, spill, shared, per_SM, f"MFMA:{matrix}" if matrix else "-", "-", widest, "-", "-")

    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(result.asm["cubin"])
        cubin.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", cubin.name)
        code = _instructions(_tool("nvdisasm", "-c", cubin.name))
    regs, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    names = Counter(op.split(".")[0] for op, _, _ in code)
    kinds = [n for n in ("HGMMA", "UTCHMMA", "HMMA") if names[n]]
    matrix = ",".join(f"{n}:{names[n]}" for n in kinds) or "-"
    hopper = [line for op, line, _ in code if op.startswith("HGMMA")]
    # A group of asynchronous products ends in one that signals; ptxas in distress makes every product its own group.
    asynchronous = "-" if not hopper else f"{sum('gsb0' in line for line in hopper)}/{len(hopper)}"
    loads = [op for op, _, _ in code if op.startswith(("LDG", "UTMALDG"))]
    widths = Counter(
        "tma" if op.startswith("UTMA") else (re.search(r"\.(64|128)\b", op) or ["", "32"])[1] for op in loads
    )
    widest = "tma" if widths["tma"] else max(widths, key=lambda w: int(w), default="-")
    loop = _main_loop(code)
    limit, threads = LIMITS[arch]
    per_SM = min(65536 // (-(-regs // 8) * 8 * 32 * warps), limit // (shared + 1024), threads // (32 * warps))
    barriers = sum(op.startswith("BAR") for op, _, _ in loop)
    return _row(regs, stack, shared, per_SM, matrix, asynchronous, widest, len(loop) or "-", barriers if loop else "-")


def _row(*values) -> dict:
    return dict(zip(COLUMNS[4:], map(str, values)))


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def _instructions(sass: str) -> list[tuple[str, str, str | None]]:
    """(operation, line, label before it)."""
    found, label = [], None
    for line in sass.splitlines():
        if at := re.match(r"(\.L_x_\d+):", line):
            label = at[1]
        elif at := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", line):
            found.append((at[1], line, label))
            label = None
    return found


def _main_loop(code: list) -> list:
    """The shortest loop with the most matrix instructions, or with the most global loads where there are none."""
    # Behind the final EXIT lie the retries of waits, whose jumps back enclose no loop of ours.
    end = next((i for i, (op, line, _) in enumerate(code) if op == "EXIT" and "@" not in line), len(code))
    code = code[:end]
    starts = {label: i for i, (_, _, label) in enumerate(code) if label}
    loops = []
    for i, (op, line, _) in enumerate(code):
        to = re.search(r"\.L_x_\d+", line) if op.startswith("BRA") else None
        if to and starts.get(to[0], i) < i:
            loops.append(code[starts[to[0]] : i + 1])

    def weight(loop):
        products = sum("MMA" in op and not op.startswith("HFMA") for op, _, _ in loop)
        arithmetic = sum(op.startswith(("FFMA", "FMUL")) for op, _, _ in loop)
        return products, 0 if products else arithmetic, -len(loop)

    loops = [loop for loop in loops if any(op.startswith(("LDG", "UTMALDG")) or "MMA" in op for op, _, _ in loop)]
    return max(loops, key=weight, default=[])


def text(found: list[dict]) -> str:
    widths = [max(len(c), *(len(row[c]) for row in found)) for c in COLUMNS]
    lines = [
        "  ".join(value.ljust(w) for value, w in zip(row, widths)).rstrip()
        for row in ([*COLUMNS], *([r[c] for c in COLUMNS] for r in found))
    ]
    return (
        f"# triton {triton.__version__}; async: groups of Hopper products / products; loop: instructions of the main loop\n"
        + "\n".join(lines)
        + "\n"
    )


def read() -> tuple[str, list[dict]]:
    """The Triton version and the rows of the committed table."""
    head, _, *lines = TABLE.read_text().splitlines()
    return head.split()[2].rstrip(";"), [dict(zip(COLUMNS, line.split())) for line in lines]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", action="append", choices=ARCHITECTURES)
    args = parser.parse_args()
    fresh = [row for arch in args.arch or ARCHITECTURES for row in rows(arch, cases())]
    if args.arch:
        print(text(fresh), end="")
    else:
        TABLE.parent.mkdir(exist_ok=True)
        TABLE.write_text(text(fresh))

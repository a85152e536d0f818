"""What a compiled Triton kernel takes and does, read from its machine code with the tools that Triton brings."""

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

# Per multiprocessor: bytes of shared memory and threads.
LIMITS = {
    "sm_80": (164 << 10, 2048),
    "sm_90": (228 << 10, 2048),
    "sm_100": (228 << 10, 2048),
    "sm_120": (100 << 10, 1536),
}

# The matrix instruction of a product in Triton's assembly, and its name in the machine code.
MATRIX = {"wgmma.mma_async": "HGMMA", "tcgen05.mma": "UTCHMMA", "mma.sync": "HMMA", "v_mfma_": "MFMA"}

# Registers; spilled ones (bytes of stack on NVIDIA); bytes of shared memory; programs that share a multiprocessor; matrix
# instruction.
RESOURCES = ["regs", "spill", "shared", "per_SM", "matrix"]

# Groups of Hopper's asynchronous products / products; of the main loop its instructions, its barriers and its loads from global
# memory, bits:count. NVIDIA only.
CODE = ["async", "loop", "barriers", "loads"]


def measure(arch: str, compiled, disassemble: bool = True) -> dict[str, str]:
    """The figures named in RESOURCES of a triton.compiler.CompiledKernel and, unless that takes too long, those in CODE."""
    assembly = compiled.asm["amdgcn" if "amdgcn" in compiled.asm else "ptx"]
    matrix = next((name for instruction, name in MATRIX.items() if instruction in assembly), "-")
    if "amdgcn" in compiled.asm:
        found = dict(zip(RESOURCES, [*_amd(compiled), matrix])) | dict.fromkeys(CODE, "-")
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(compiled.asm["cubin"])
            cubin.flush()
            found = dict(zip(RESOURCES, [*_nvidia(arch, compiled, cubin.name), matrix]))
            if disassemble:
                found |= dict(zip(CODE, _code(cubin.name)))
    return {name: str(value) for name, value in found.items()}


def _amd(compiled) -> tuple:
    text, warps, shared = compiled.asm["amdgcn"], compiled.metadata.num_warps, compiled.metadata.shared
    regs, spill = (int(re.search(rf"\.{name}:\s+(\d+)", text)[1]) for name in ("vgpr_count", "vgpr_spill_count"))
    waves = 4 * min(8, 512 // (-(-regs // 8) * 8))
    return regs, spill, shared, min(waves // warps, (64 << 10) // max(1, shared))


def _nvidia(arch: str, compiled, cubin: str) -> tuple:
    shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
    usage = _tool("cuobjdump", "--dump-resource-usage", cubin)
    regs, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    limit, threads = LIMITS[arch]
    per_SM = min(65536 // (-(-regs // 8) * 8 * 32 * warps), limit // (shared + 1024), threads // (32 * warps))
    return regs, stack, shared, per_SM


def _code(cubin: str) -> tuple:
    code = _instructions(_tool("nvdisasm", "-c", cubin))
    hopper = [line for op, line, _ in code if op.startswith("HGMMA")]
    # A group of asynchronous products ends in one that signals; ptxas in distress makes every product its own group.
    asynchronous = f"{sum('gsb0' in line for line in hopper)}/{len(hopper)}" if hopper else "-"
    loop = [op for op, _, _ in _main_loop(code)]
    if not loop:
        return asynchronous, "-", "-", "-"
    widths = Counter(map(_width, (op for op in loop if op.startswith(("LDG", "UTMALDG")))))
    loads = ",".join(f"{w}:{n}" for w, n in sorted(widths.items())) or "-"
    return asynchronous, len(loop), sum(op.startswith("BAR") for op in loop), loads


def _width(load: str) -> str:
    if load.startswith("UTMA"):
        return "tma"
    found = re.search(r"\.[US]?(8|16|64|128)(?:\.|$)", load)
    return found[1] if found else "32"


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
    """The shortest loop with the most matrix instructions, or with the most arithmetic where there are none."""
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

"""What the CUDA kernels of the installed extension take and do.

`PYTHONPATH=tests python -m helpers.cuda_resources` writes the table.

Read from the machine code in libinfsa_kernels.so by the cuobjdump that comes with Triton or the CUDA toolkit. No GPU is needed.
"""

import re
import shutil
import subprocess
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path

from helpers.cuda_paths import instructions_of_rows

TABLE = Path(__file__).parents[1] / "gpu" / "cuda_resources.txt"

# Registers of a thread; bytes of its stack and of spilled registers in local memory; static shared memory of a block.
RESOURCES = ["regs", "stack", "local", "shared"]

# Loads and stores of 16 bytes of global memory; cluster barriers; the grid barriers' atomic additions; accesses of local memory.
CODE = ["loads", "stores", "cluster", "atomics", "spills"]

# Instructions that a row of the first pass takes, and of the second (cuda_paths.py).
PATHS = ["first", "second"]

COLUMNS = ["arch", "kernel", "dtype", "rows", "way", "floor", *RESOURCES, *CODE, *PATHS]

KERNEL = re.compile(r"linear_(cluster|grid)_kernelI(f|13__nv_bfloat16|6__half)Lb([01])ELb([01])ELb([01])E")
DTYPES = {"f": "fp32", "13__nv_bfloat16": "bf16", "6__half": "fp16"}
COUNTED = {
    "loads": re.compile(r"LDG\.\S*128"),
    "stores": re.compile(r"STG\.\S*128"),
    "cluster": re.compile(r"UCGABAR_WAIT"),
    "atomics": re.compile(r"ATOM|RED\."),
    "spills": re.compile(r"LDL|STL"),
}


def measured(library: Path | None = None) -> list[dict[str, str]]:
    """A row of COLUMNS for every kernel and architecture of the extension."""
    if library is None:
        from infsa_kernels.ops.extension import LIBRARY

        library = LIBRARY
    usage, code = _resources(_cuobjdump("--dump-resource-usage", library)), _code(_cuobjdump("-sass", library))
    rows = []
    for (arch, name), resources in usage.items():
        kernel, element, aligned, backward, floor = KERNEL.search(name).groups()
        if kernel == "cluster" and generation(arch) < 90:
            continue  # empty: no such GPU has clusters
        paths = instructions_of_rows(code[arch, name], DTYPES[element], bool(int(backward)), bool(int(floor)))
        rows.append(
            {"arch": arch, "kernel": kernel, "dtype": DTYPES[element], "rows": "aligned" if int(aligned) else "any",
             "way": "bwd" if int(backward) else "fwd", "floor": "yes" if int(floor) else "no", **resources,
             **_counted(code[arch, name]), **dict(zip(PATHS, map(str, (*paths, "-", "-"))))}
        )  # fmt: skip
    return sorted(rows, key=lambda row: (generation(row["arch"]), *(row[c] for c in COLUMNS[1:6])))


def generation(arch: str) -> int:
    """90 of "sm_90a"."""
    return int(re.search(r"\d+", arch)[0])


def committed() -> list[dict[str, str]]:
    _, _, *lines = TABLE.read_text().splitlines()
    return [dict(zip(COLUMNS, line.split())) for line in lines]


def compiler_of_table() -> str:
    """The release of nvcc that made the committed table; another one allocates other registers."""
    return re.search(r"nvcc ([\d.]+)", TABLE.read_text())[1]


def compiler() -> str:
    """The release of the nvcc that builds here."""
    from torch.utils.cpp_extension import CUDA_HOME

    nvcc = shutil.which("nvcc", path=f"{CUDA_HOME}/bin:/usr/local/cuda/bin")
    if nvcc is None:
        raise FileNotFoundError("no nvcc: set CUDA_HOME to the folder of the CUDA toolkit")
    return re.search(r"release (\S+),", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)[1]


def text(rows: list[dict[str, str]]) -> str:
    widths = [max(len(c), *(len(row[c]) for row in rows)) for c in COLUMNS]
    lines = [
        "  ".join(v.ljust(w) for v, w in zip(row.values(), widths)).rstrip() for row in ({c: c for c in COLUMNS}, *rows)
    ]
    return f"# nvcc {compiler()}; the columns are explained in cuda_resources.py\n" + "\n".join(lines) + "\n"


def _cuobjdump(*arguments) -> str:
    triton = find_spec("triton")
    guesses = [Path(triton.origin).parent / "backends" / "nvidia" / "bin"] if triton else []
    tool = shutil.which("cuobjdump", path=":".join(map(str, guesses))) or shutil.which("cuobjdump")
    if tool is None:
        raise FileNotFoundError(
            "no cuobjdump: it comes with the CUDA toolkit (put its bin on PATH) and with `pip install triton`"
        )
    return subprocess.run([tool, *map(str, arguments)], capture_output=True, text=True, check=True).stdout


def _resources(dump: str) -> dict[tuple[str, str], dict[str, str]]:
    found, arch, name = {}, None, None
    for line in dump.splitlines():
        if at := re.match(r"arch = (\S+)", line):
            arch = at[1]
        elif at := re.search(r"Function (\S+):", line):
            name = at[1]
        elif name and (values := dict(re.findall(r"([A-Z]+):(\d+)", line))) and KERNEL.search(name):
            found[arch, name] = {column: values[column.upper().replace("REGS", "REG")] for column in RESOURCES}
            name = None
    return found


def _code(sass: str) -> dict[tuple[str, str], list[tuple[int, str]]]:
    """Every function's instructions by address."""
    code, arch, at = defaultdict(list), None, None
    for line in sass.splitlines():
        if found := re.search(r"code for (sm_\w+)", line):
            arch = found[1]
        elif found := re.search(r"Function : (\S+)", line):
            at = arch, found[1]
        elif found := re.search(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", line):
            code[at].append((int(found[1], 16), found[2]))
    return code


def _counted(code: list[tuple[int, str]]) -> dict[str, str]:
    names = [re.sub(r"^@!?U?P\w+\s+", "", text) for _, text in code]
    return {column: str(sum(bool(COUNTED[column].match(name)) for name in names)) for column in CODE}


if __name__ == "__main__":
    TABLE.write_text(text(measured()))

"""Hopper's asynchronous products (wgmma) in every kernel that has them: nothing touches their registers too early, and ptxas
does not make each wait for the one before, which it says in its log (C75xx) and nowhere else.

Only whether there is a tail and a mask makes kernels of other lengths: 4096 and 4097 stand for all, 197 and 577 among them.
"""

import contextlib
import functools
import io
import itertools
import re
import subprocess
import tempfile
from dataclasses import dataclass

import pytest
import torch
from helpers.sweep import some

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter does not compile", allow_module_level=True)

from helpers.triton_resources import Case, Pooled  # noqa: E402
from helpers.triton_sass import TOOLS  # noqa: E402
from helpers.triton_target import compiled, launching  # noqa: E402
from helpers.wgmma import hazards, parse, unfenced  # noqa: E402


@dataclass
class Compiled:
    name: str
    sass: str
    log: str  # of ptxas


@functools.cache
def kernels(case: Case | Pooled) -> list[Compiled]:
    """Those of a call, forward and backward, that have asynchronous products."""
    found = []

    def record(*launch):
        log = io.StringIO()
        with contextlib.redirect_stdout(log):
            made = compiled(*launch)
        if "wgmma.mma_async" not in made.asm["ptx"]:
            return
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(made.asm["cubin"])
            cubin.flush()
            sass = subprocess.run(
                [TOOLS / "nvdisasm", "-c", cubin.name], capture_output=True, text=True, check=True
            ).stdout
        found.append(Compiled(made.metadata.name, sass, log.getvalue()))

    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if case.dtype == "tf32" else "highest")
    try:
        # What comes from the cache has no log.
        with triton.knobs.compilation.scope(), triton.knobs.nvidia.scope(), launching("sm_90", record):
            triton.knobs.compilation.always_compile = True
            triton.knobs.nvidia.dump_ptxas_log = True
            case.run()
    finally:
        torch.set_float32_matmul_precision(precision)
    return found


CASES = [
    Case("pure", dtype, d, N, tied, masked)
    for dtype, dims in (("bf16", (40, 64, 72, 128)), ("fp16", (40, 64, 72, 128)), ("tf32", (64, 128)))
    for d, tied, (N, masked) in itertools.product(dims, (False, True), ((4096, False), (4097, False), (4097, True)))
]
IN_MAKE_TEST = Case("pure", "bf16", 64, 4096)

# (kernel, dtype, d) -> why ptxas makes its products wait for one another.
SERIAL = {
    (
        "pure_fwd_kernel",
        "tf32",
        64,
    ): "C7515: with 244 registers in use it moves accumulators between a stage's products",
    ("pure_fwd_kernel", "tf32", 128): "C7515: the same where there is a tail",
}


@pytest.mark.parametrize("case", some(CASES, IN_MAKE_TEST), ids=str)
def test_products_are_asynchronous_and_waited_for(case):
    found = kernels(case)
    # Tied, one kernel makes all gradients, but for float32; at d = 128 float32's keys have tiles of 32 rows, and wgmma takes 64.
    assert len(found) >= (2 if (case.tied and case.dtype != "tf32") or (case.dtype == "tf32" and case.d == 128) else 3)
    for kernel in found:
        assert "Used" in kernel.log, f"{kernel.name}: ptxas wrote no log"
        serial = re.findall(r"C75\d\d.*", kernel.log)
        assert not serial or (kernel.name, case.dtype, case.d) in SERIAL, f"{kernel.name}: {serial}"
        assert any(line.op.startswith("HGMMA") for line in parse(kernel.sass)[0])
        assert not hazards(kernel.sass), "\n".join([kernel.name, *hazards(kernel.sass)])
        # Without its waits every kernel has some.
        assert hazards(re.sub(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x\w+", "NOP", kernel.sass)), kernel.name


def test_each_wait_of_the_forward_kernel_is_missed():
    (sass,) = (k.sass for k in kernels(IN_MAKE_TEST) if k.name == "pure_fwd_kernel")
    waits = list(re.finditer(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x\w+", sass))
    assert len(waits) >= 2
    for wait in waits:
        assert hazards(sass[: wait.start()] + "NOP" + sass[wait.end() :])


# Tokens so narrow that LLVM unrolls the steps over their channels and makes constants or the bias where the first product sums.
NARROW = [
    Pooled(dtype, width, normalised)
    for dtype in ("bf16", "fp16")
    for width in (48, 64, 80, 128)
    for normalised in (False, True)
]


@pytest.mark.parametrize("case", some(NARROW), ids=str)
def test_what_the_pooled_layers_products_begin_with_is_there_before(case):
    found = kernels(case)
    assert len(found) >= 4
    for kernel in found:
        assert "Used" in kernel.log and not re.findall(r"C75\d\d.*", kernel.log), kernel.log
        assert not hazards(kernel.sass), "\n".join([kernel.name, *hazards(kernel.sass)])
        assert not unfenced(kernel.sass), "\n".join([kernel.name, *unfenced(kernel.sass)])
        sums = re.search(r"HGMMA\S* (R\d+)", kernel.sass)[1]
        late = kernel.sass.replace("WARPGROUP.ARRIVE ;", f"WARPGROUP.ARRIVE ;\n /*0000*/ MOV {sums}, RZ ;")
        assert unfenced(late), kernel.name

"""Each barrier, wait and ordering of an atomic in the compiled kernels, taken away in turn: found out, or known to be spare.

Two barriers of `bar.sync` that follow each other, say, hide each other. What survives has to stand in SPARE, by the instructions
beside it that touch memory or decide where lanes go on.
"""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from helpers.calls import output_gradient
from helpers.sweep import some

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter does not compile", allow_module_level=True)

from infsa_kernels.triton import configs  # noqa: E402

from .launches import Launch, executing  # noqa: E402
from .machine import Machine  # noqa: E402
from .memory import Fault  # noqa: E402
from .test_executed import make, splits  # noqa: E402, F401

POINT = re.compile(
    r"bar\.sync[^;]*;|bar\.warp\.sync[^;]*;|cp\.async\.wait_group[^;]*;|membar[^;]*;|acq_rel|"
    r"wgmma\.(?:fence|commit_group|wait_group)[^;]*;|(?<!\.)fence[^;]*;|"
    r"mbarrier\.try_wait[^;]*;\s*@!complete[^;]*;|@%\w+ mbarrier\.arrive[^;]*;"
)
NEIGHBOUR = re.compile(
    r"\b(?:bra|ret|bar\.sync|cp\.async\.\w+|(?:ld|st)\.shared|(?:ld|st)matrix|atom|wgmma\.\w+|mbarrier\.\w+|fence\.proxy)\b|"
    r"^\$L__BB\w+:",
    re.M,
)

TICKET = "of tl.debug_barrier and the barrier that Triton puts before an atomic either will do"
LOOP_ENDS_WITH_ONE = (
    "each turn of the loop before ends with a barrier, after the last read of the tiles, and what is written behind this one "
    "is read behind another"
)
TAIL = (
    "the tail of a few keys is one tile: what is still on its way then are zeros for tiles past the end, into buffers that "
    "nothing else uses any more"
)
# (what was removed, what stands before, what after) -> why nothing needs it. Elsewhere the same may be needed, and is found.
SPARE = {
    ("bar.sync", "ldmatrix", "bar.sync"): TICKET,
    ("bar.sync", "ld.shared", "bar.sync"): TICKET,
    ("bar.sync", "bar.sync", "atom"): TICKET,
    ("bar.sync", "cp.async.wait_group", "cp.async.cg"): LOOP_ENDS_WITH_ONE,
    ("bar.sync", "cp.async.wait_group", "st.shared"): LOOP_ENDS_WITH_ONE,
    ("cp.async.wait_group", "label", "bar.sync"): TAIL,
    (
        "bar.sync",
        "label",
        "st.shared",
    ): "the last barrier in the loop before comes after the last read of what is written here",
}


@dataclass(frozen=True)
class Mutant:
    ptx: str
    removed: str
    before: str
    after: str
    line: int


def mutants(ptx: str) -> Iterator[Mutant]:
    for point in POINT.finditer(ptx):
        rest = ("relaxed", "acquire", "release") if point[0] == "acq_rel" else ("",)
        around = [
            next((_named(n[0]) for n in found), "")
            for found in (
                reversed(list(NEIGHBOUR.finditer(ptx, 0, point.start()))),
                NEIGHBOUR.finditer(ptx, point.end()),
            )
        ]
        for instead in rest:
            changed = ptx[: point.start()] + instead + ptx[point.end() :]
            line = ptx.count("\n", 0, point.start()) + 1
            removed = re.sub(r"^@\S+ ", "", point[0]).split()[0].rstrip(";")
            yield Mutant(changed, instead or removed, *around, line)


def _named(neighbour: str) -> str:
    return "label" if neighbour.startswith("$") else neighbour


def survives(launch: Launch, ptx: str, right: Machine) -> bool:
    try:
        return bool((launch.execute(ptx).memory.data == right.memory.data).all())
    except Fault:
        return False


CASES = {
    "linear": ("linear", "bf16", dict(N=600, M=530, H=3, d=16, dv=16)),
    "linear tied masked": ("linear", "fp16", dict(N=600, H=3, d=16, dv=16, tied=True, masks="keys, queries")),
    "linear short": ("linear", "bf16", dict(N=70, M=45, d=16, dv=16)),
    "linear narrow": ("linear", "fp32", dict(N=300, M=210, d=20, dv=9, layout="every_other_channel")),
    "linear folding": ("linear", "bf16", dict(N=600, M=530, H=3, d=16, dv=16)),
    "pure": ("pure", "fp16", dict(H=1)),
    "pure masked": ("pure", "bf16", dict(N=300, M=330, H=1, masks="keys, queries")),
    "pure tied": ("pure", "bf16", dict(H=1, tied=True)),
    "pure tied masked": ("pure", "fp16", dict(N=300, H=1, tied=True, masks="keys, queries")),
    "pure fp32": ("pure", "fp32", dict(N=70, M=65, H=1)),
    "pure d = 128": ("pure", "bf16", dict(N=140, M=150, H=1, d=128, dv=128)),
    "pure few": ("pure", "fp16", dict(N=32, M=29, H=1)),
    "pure narrow": ("pure", "bf16", dict(N=130, M=70, H=1, d=16, dv=32, layout="every_other_channel")),
}


@pytest.mark.parametrize("case", some(CASES, "linear"))
def test_nothing_is_there_in_vain(case):
    op, dtype, sizes = CASES[case]
    seen, alive = set(), []

    def see(launch: Launch, right: Machine) -> None:
        if launch.ptx in seen:
            return
        seen.add(launch.ptx)
        reached = {i.line for i, here in zip(right.kernel.code, right.reached) if here}
        for mutant in mutants(launch.ptx):
            place = mutant.removed, mutant.before, mutant.after
            if mutant.line in reached and survives(launch, mutant.ptx, right) and place not in SPARE:
                alive.append(f"{launch.name}: {place}, line {mutant.line}")

    call = make(op, dtype, **sizes)
    folding = configs.always_folding() if case.endswith("folding") else contextlib.nullcontext()
    with folding, executing(see=see):
        call.gradients(output_gradient(call))
    assert len(seen) >= 3
    assert not alive, "\n".join(alive)


def test_before_the_ticket_one_of_two_barriers_is_needed():
    found = []

    def see(launch: Launch, right: Machine) -> None:
        before, atom, after = launch.ptx.partition(" atom.")
        if atom:
            *_, first, second = re.finditer(r"bar\.sync[^;]*;", before)
            without = before[: first.start()] + before[first.end() : second.start()] + before[second.end() :]
            found.append(survives(launch, without + atom + after, right))

    op, dtype, sizes = CASES["linear"]
    with executing(see=see):
        make(op, dtype, **sizes).run()
    assert found == [False]

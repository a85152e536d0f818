"""Each barrier, wait and ordering of an atomic in the compiled kernels, taken away in turn: found out, or known to be spare.

Two barriers of `bar.sync` that follow each other, say, hide each other. What survives has to stand in SPARE, by the instructions
beside it that touch memory or decide where lanes go on.
"""

import contextlib
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest import mock

import pytest
from helpers import pooled_linear_calls
from helpers.calls import output_gradient
from helpers.sweep import some

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter does not compile", allow_module_level=True)

from infsa_kernels import pooled_linear_infsa  # noqa: E402
from infsa_kernels.triton import central_query, configs  # noqa: E402

from .launches import Launch, executing  # noqa: E402
from .machine import Machine  # noqa: E402
from .memory import Fault  # noqa: E402
from .test_executed import DTYPES, make, splits  # noqa: E402, F401

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
AGAIN = "the wait and the barrier at the end of the turn before, or before the loop, are for the same copies"
TWICE = "Triton waits twice, once for each tile of the stage: test_of_two_waits_in_a_row_one_is_needed"
OWN_COPIES = (
    "each thread reads back what it has copied itself and waited for; what others have copied, and what is written in place of "
    "the turn's last reads, is behind other barriers"
)
# (what was removed, what stands before, what after) -> why nothing needs it. Elsewhere the same may be needed, and is found.
SPARE = {
    ("bar.sync", "ldmatrix", "bar.sync"): TICKET,
    ("bar.sync", "ld.shared", "bar.sync"): TICKET,
    ("bar.sync", "bar.sync", "atom"): TICKET,
    ("bar.sync", "cp.async.wait_group", "cp.async.cg"): LOOP_ENDS_WITH_ONE,
    ("bar.sync", "cp.async.wait_group", "st.shared"): LOOP_ENDS_WITH_ONE,
    ("cp.async.wait_group", "label", "bar.sync"): f"{TAIL}; in the pooled layer {AGAIN}",
    ("bar.sync", "cp.async.wait_group", "ldmatrix"): AGAIN,
    ("cp.async.wait_group", "cp.async.commit_group", "cp.async.wait_group"): TWICE,
    ("cp.async.wait_group", "cp.async.wait_group", "bar.sync"): TWICE,
    ("bar.sync", "cp.async.wait_group", "ld.shared"): OWN_COPIES,
    (
        "bar.sync",
        "label",
        "st.shared",
    ): "the last barrier in the loop before comes after the last read of what is written here; of the "
    "pooled layer's heads, where they are one group, the loop goes round once",
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


IN_A_ROW = (
    "Triton has a barrier before each arrival at an mbarrier and each copy: of those in a row any one orders the copy behind "
    "what was read before, as test_before_a_copy_one_of_several_barriers_is_needed has it"
)
ONLY_READ = (
    "between products that read, for whose operands each thread has waited itself or behind a barrier before; other barriers "
    "stand between the last of them and the next that writes there"
)
WAITED = "all threads are past their last wait for these mbarriers, and past a barrier since"
FENCED = "what the product reads was there before the fence of the product before, or came by tensor copies alone"
UNTOUCHED = "sums go on in registers that no thread has touched since the fence before, or begin in such"
LATER = "the next wait is for these products too, and nobody touches their sums before"
# The same in kernels for sm_90, beside the above.
SPARE_ON_HOPPER = {
    ("bar.sync", "mbarrier.arrive", "cp.async.bulk"): IN_A_ROW,
    ("bar.sync", "cp.async.bulk", "cp.async.bulk"): IN_A_ROW,
    ("bar.sync", "cp.async.bulk", "mbarrier.arrive"): IN_A_ROW,
    ("bar.sync", "fence.proxy", "cp.async.bulk"): IN_A_ROW,
    ("bar.sync", "wgmma.commit_group", "mbarrier.arrive"): IN_A_ROW,
    (
        "bar.sync",
        "mbarrier.init",
        "mbarrier.arrive",
    ): "no tile is whole, and nobody arrives before the next such barrier",
    ("bar.sync", "wgmma.wait_group", "mbarrier.inval"): WAITED,
    ("bar.sync", "wgmma.wait_group", "wgmma.fence"): ONLY_READ,
    ("bar.sync", "wgmma.wait_group", "fence.proxy"): ONLY_READ,
    ("bar.sync", "bra", "wgmma.fence"): ONLY_READ,
    ("bar.sync", "wgmma.commit_group", "cp.async.cg"): ONLY_READ,
    ("bar.sync", "wgmma.wait_group", "cp.async.cg"): ONLY_READ,
    ("cp.async.wait_group", "wgmma.wait_group", "bar.sync"): TAIL,
    ("fence.proxy.async.shared::cta", "bar.sync", "wgmma.fence"): FENCED,
    ("fence.proxy.async.shared::cta", "wgmma.commit_group", "wgmma.fence"): FENCED,
    ("fence.proxy.async.shared::cta", "wgmma.wait_group", "wgmma.fence"): FENCED,
    ("fence.proxy.async.shared::cta", "cp.async.bulk", "bra"): FENCED,
    ("wgmma.fence.sync.aligned", "bar.sync", "wgmma.mma_async"): UNTOUCHED,
    ("wgmma.fence.sync.aligned", "bra", "wgmma.mma_async"): UNTOUCHED,
    ("wgmma.fence.sync.aligned", "fence.proxy", "wgmma.mma_async"): UNTOUCHED,
    ("wgmma.fence.sync.aligned", "wgmma.commit_group", "wgmma.mma_async"): UNTOUCHED,
    ("wgmma.fence.sync.aligned", "wgmma.wait_group", "wgmma.mma_async"): UNTOUCHED,
    ("wgmma.commit_group.sync.aligned", "wgmma.mma_async", "bar.sync"): LATER,
    ("wgmma.commit_group.sync.aligned", "wgmma.mma_async", "fence.proxy"): LATER,
    ("wgmma.commit_group.sync.aligned", "wgmma.mma_async", "mbarrier.try_wait"): LATER,
    ("wgmma.commit_group.sync.aligned", "wgmma.mma_async", "wgmma.fence"): LATER,
    ("wgmma.commit_group.sync.aligned", "wgmma.mma_async", "wgmma.wait_group"): LATER,
    ("wgmma.wait_group.sync.aligned", "label", "bar.sync"): LATER,
    ("wgmma.wait_group.sync.aligned", "wgmma.commit_group", "bar.sync"): LATER,
    ("wgmma.wait_group.sync.aligned", "wgmma.commit_group", "fence.proxy"): LATER,
    ("wgmma.wait_group.sync.aligned", "wgmma.commit_group", "wgmma.fence"): LATER,
}

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
    # In two steps over the channels, which LLVM unrolls, and in more than there are stages.
    "pooled fp32": ("pooled", "fp32", dict(width=80, norm="")),
    "pooled bf16": ("pooled", "bf16", dict(width=80, norm="")),
    "pooled fp16": ("pooled", "fp16", dict(width=80, norm="")),
    "pooled bf16 wide": ("pooled", "bf16", dict(width=208, norm="")),
    "pooled fp16 wide": ("pooled", "fp16", dict(width=208, norm="")),
    "pooled bf16 normalised": ("pooled", "bf16", dict(width=208, norm="affine")),
    "pooled fp16 normalised": ("pooled", "fp16", dict(width=208, norm="plain", masked=True)),
    "pooled bf16 large": ("pooled", "bf16", dict(width=208, length=300, norm="affine")),
    "pooled fp16 large": ("pooled", "fp16", dict(width=208, length=300, norm="")),
}
# As many tiles that every buffer is filled again.
CASES_ON_HOPPER = {
    "forward": ("pure", "bf16", dict(N=70, M=260, H=1)),
    "pure": ("pure", "bf16", dict(N=130, M=260, H=1)),
    "pure masked": ("pure", "bf16", dict(N=130, M=260, H=1, masks="keys, queries")),
    "pure tied": ("pure", "bf16", dict(N=260, H=1, tied=True)),
    "pure tied masked": ("pure", "fp16", dict(N=260, H=1, tied=True, masks="keys, queries")),
    "pure d = 128": ("pure", "fp16", dict(N=130, M=150, H=1, d=128, dv=128)),
    "pure few": ("pure", "fp16", dict(N=32, M=29, H=1)),
    "linear": ("linear", "bf16", dict(N=600, M=530, H=3, d=16, dv=16)),
}


def pooled(dtype: str, width: int, length: int = 150, heads: int = 2, head: int = 16, **form) -> dict:
    return pooled_linear_calls.layer(
        DTYPES[dtype], tied=False, shape=(1, length, width), heads=heads, head=head, **form
    )


@contextlib.contextmanager
def several_tiles(op: str, large: bool = False):
    """Of the pooled layer's tokens too: every loop goes round again."""
    if op != "pooled":
        yield
        return
    with mock.patch.object(configs, "multiprocessors", return_value=1), central_query.tiles(large):
        yield


def _forward_and_backward(op, dtype, sizes):
    if op == "pooled":
        call = pooled(dtype, **sizes)
        pooled_linear_calls.results(pooled_linear_infsa, call, pooled_linear_calls.output_gradient(call))
    else:
        call = make(op, dtype, **sizes)
        call.gradients(output_gradient(call))


def survivors(run: Callable[[], object], spare: dict, arch: str) -> tuple[int, list[str]]:
    """How many kernels ran, and which mutants of theirs run right though nothing says that they may."""
    seen, alive = set(), []

    def see(launch: Launch, right: Machine) -> None:
        if launch.ptx in seen:
            return
        seen.add(launch.ptx)
        reached = {i.line for i, here in zip(right.kernel.code, right.reached) if here}
        for mutant in mutants(launch.ptx):
            place = mutant.removed, mutant.before, mutant.after
            if mutant.line in reached and survives(launch, mutant.ptx, right) and place not in spare:
                alive.append(f"{launch.name}: {place}, line {mutant.line}")

    with executing(see=see, arch=arch):
        run()
    return len(seen), alive


@pytest.mark.parametrize("case", some(CASES, "linear"))
def test_nothing_is_there_in_vain(case):
    op, dtype, sizes = CASES[case]
    with configs.always_folding() if case.endswith("folding") else several_tiles(op, case.endswith("large")):
        kernels, alive = survivors(lambda: _forward_and_backward(op, dtype, sizes), SPARE, "sm_80")
    assert kernels >= 3
    assert not alive, "\n".join(alive)


@pytest.mark.parametrize("case", some(CASES_ON_HOPPER, "forward"))
def test_nothing_is_there_in_vain_on_hopper(case):
    op, dtype, sizes = CASES_ON_HOPPER[case]
    call = make(op, dtype, **sizes)
    run = call.run if case == "forward" else lambda: call.gradients(output_gradient(call))
    kernels, alive = survivors(run, SPARE | SPARE_ON_HOPPER, "sm_90")
    assert kernels >= 2
    assert not alive, "\n".join(alive)


def test_before_a_copy_one_of_several_barriers_is_needed():
    found = []

    def see(launch: Launch, right: Machine) -> None:
        loop = re.search(r"(\$L__BB0_2):.*?bra \s*\1;", launch.ptx, re.S) if launch.name == "pure_fwd_kernel" else None
        if loop:
            barriers = re.findall(r"bar\.sync[^;]*;", loop[0])
            for kept in range(-1, len(barriers)):
                turn = itertools.count()
                body = re.sub(r"bar\.sync[^;]*;", lambda at: at[0] if next(turn) == kept else "", loop[0])
                found.append(survives(launch, launch.ptx.replace(loop[0], body), right))

    op, dtype, sizes = CASES_ON_HOPPER["forward"]
    with executing(see=see, arch="sm_90"):
        make(op, dtype, **sizes).run()
    assert found == [False, True, True, True, True]


def test_a_wrong_layout_in_shared_memory_is_seen():
    """In the descriptors of all matrices: another swizzle, and patterns of eight lines closer together."""
    right = 1 << 62 | 64 << 32
    found = []

    def see(launch: Launch, machine: Machine) -> None:
        if launch.name == "pure_fwd_kernel":
            assert launch.ptx.count(str(right)) >= 12
            for wrong in ((2 << 62 | 64 << 32) - (1 << 64), 1 << 62 | 32 << 32):
                found.append(survives(launch, launch.ptx.replace(str(right), str(wrong)), machine))

    op, dtype, sizes = CASES_ON_HOPPER["forward"]
    with executing(see=see, arch="sm_90"):
        make(op, dtype, **sizes).run()
    assert found == [False, False]


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


@pytest.mark.sweep
def test_of_two_waits_in_a_row_one_is_needed():
    pair, found = (
        re.compile(r"cp\.async\.wait_group \s*(\d+);(\s*(?:\.loc[^\n]*|\$L\w+:)?)*?cp\.async\.wait_group \s*\1;"),
        [],
    )

    def see(launch: Launch, right: Machine) -> None:
        if launch.name == "central_query_fwd_kernel":
            assert pair.search(launch.ptx)
            found.append(survives(launch, pair.sub("", launch.ptx), right))

    op, dtype, sizes = CASES["pooled fp16"]
    with several_tiles(op), executing(see=see):
        pooled_linear_infsa(**pooled(dtype, **sizes))
    assert found == [False]

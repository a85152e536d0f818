"""The machine itself: what it computes, and that it finds each kind of mistake."""

import numpy as np
import pytest
import torch

from .machine import Machine, Order, descending, shuffled, together
from .memory import Fault, Global
from .parse import parse

HEAD = """
.target sm_80
.visible .entry snippet(
	.param .u64 snippet_param_0,
	.param .u64 snippet_param_1
)
{
	.reg .pred %p<9>;
	.reg .b16 %h<9>;
	.reg .b32 %r<40>;
	.reg .b64 %d<9>;
	ld.param.b64 %d0, [snippet_param_0];
	ld.param.b64 %d1, [snippet_param_1];
	mov.u32 %r0, %tid.x;
	mad.wide.u32 %d2, %r0, 4, %d0;
	mad.wide.u32 %d3, %r0, 4, %d1;
	shl.b32 %r2, %r0, 2;
	mov.b32 %r1, global_smem;
	add.s32 %r1, %r1, %r2;
	mov.u32 %r3, %ctaid.x;
"""


def run(body: str, x: torch.Tensor, out: torch.Tensor, *, programs=1, threads=64, shared=512, order: Order = together):
    """In the body: thread %r0, its element of x at %d2 and of out at %d3 (4 bytes each), of shared memory at %r1; program %r3."""
    lines = "".join(f"\t{line.strip()}\n" for line in body.strip().splitlines())
    memory = Global([x, out])
    addresses = [np.uint64(memory.address(t)).tobytes() for t in (x, out)]
    machine = Machine(parse(HEAD + lines + "\tret;\n}\n"), addresses, programs, threads, shared, memory)
    machine.run(order)
    memory.write_back()
    return out


def numbers(count=64) -> torch.Tensor:
    return torch.arange(count, dtype=torch.float32) - 20.5


def whole(count=64) -> torch.Tensor:
    return torch.arange(count, dtype=torch.int32)


def test_what_it_does_not_know_is_an_error():
    for unknown in (
        "ex2.approx.f32 %r4, %r5;",
        "add.sat.f32 %r4, %r5, %r6;",
        "ld.volatile.global.b32 %r4, [%d2];",
        "bar.sync 1;",
        "shfl.sync.bfly.b32 %r4, %r5, 1, 15, -1;",
        "mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 %r4;",
    ):
        with pytest.raises(NotImplementedError, match="line 21"):
            run(unknown, numbers(), numbers())


def test_numbers_of_every_width():
    body = """
    ld.global.b32 %r4, [%d2];
    cvt.rn.bf16.f32 %h1, %r4;
    cvt.f32.bf16 %r5, %h1;
    cvt.rn.f16x2.f32 %r6, %r5, %r4;
    mov.b32 {%h2, %h3}, %r6;
    cvt.f32.f16 %r7, %h2;
    cvt.f32.f16 %r8, %h3;
    sub.f32 %r9, %r7, %r8;
    fma.rn.f32 %r10, %r9, 0f40000000, %r4;
    abs.f32 %r10, %r10;
    st.global.b32 [%d3], %r10;
    """
    x = torch.randn(64) * 100
    low = x.half().float() - x.bfloat16().float().half().float()
    assert torch.equal(run(body, x, torch.empty(64)), (2 * low + x).abs())


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        ("div.s32 %r5, %r4, -7", lambda x: torch.div(x, -7, rounding_mode="trunc")),
        ("rem.s32 %r5, %r4, 7", lambda x: torch.fmod(x, 7)),
        ("shr.s32 %r5, %r4, 40", lambda x: x >> 31),
        ("shr.u32 %r5, %r4, 40", lambda x: x * 0),
        ("shl.b32 %r5, %r4, 3", lambda x: x << 3),
        ("bfe.s32 %r5, %r4, 2, 3", lambda x: (x << 27) >> 29),
        ("bfe.u32 %r5, %r4, 2, 3", lambda x: (x >> 2) & 7),
        ("prmt.b32 %r5, %r4, 255, 0x4012U", lambda x: (x >> 16 & 255) | x & 0xFF00 | (x & 255) << 16 | -1 << 24),
        ("min.s32 %r5, %r4, 3", lambda x: x.clamp(max=3)),
    ],
)
def test_integers(operation, expected):
    x = torch.randint(-(2**31), 2**31 - 1, (64,), dtype=torch.int32)
    out = run(f"ld.global.b32 %r4, [%d2];\n{operation};\nst.global.b32 [%d3], %r5;", x, whole())
    assert torch.equal(out, expected(x))


def test_integers_of_64_bits():
    """A division by 3 as compilers write it, and a field inserted into a word."""
    body = """
    ld.global.b32 %r4, [%d2];
    cvt.s64.s32 %d4, %r4;
    mul.hi.s64 %d5, %d4, 6148914691236517206;
    shr.u64 %d6, %d5, 63;
    add.s64 %d5, %d5, %d6;
    cvt.u32.u64 %r5, %d5;
    bfi.b32 %r5, %r0, %r5, 28, 4;
    st.global.b32 [%d3], %r5;
    """
    x = torch.randint(0, 2**29, (64,), dtype=torch.int32)
    wanted = (torch.div(x, 3, rounding_mode="floor") & (1 << 28) - 1) | whole() << 28
    assert torch.equal(run(body, x, whole()), wanted)


TOGETHER = """
shl.b32 %r4, %r3, 7;
cvt.u64.u32 %d4, %r4;
add.s64 %d4, %d3, %d4;
st.global.b32 [%d4], %r3;
barrier.sync 0;
setp.ne.s32 %p1, %r0, 0;
@%p1 bra $L_together;
atom.add.release.gpu.u32 %r5, [%d0], 1;
$L_again:
ld.acquire.gpu.u32 %r6, [%d0];
setp.ne.s32 %p2, %r6, COUNT;
@%p2 bra $L_again;
$L_together:
barrier.sync 0;
xor.b32 %r7, %r4, 128;
cvt.u64.u32 %d5, %r7;
add.s64 %d5, %d3, %d5;
ld.global.cg.b32 %r8, [%d5];
st.global.b32 [%d4+256], %r8;
"""


@pytest.mark.parametrize("order", [together, descending, shuffled(1)], ids=["together", "descending", "some"])
def test_programs_that_wait_for_each_other(order):
    """Each reads what the other one has written before it came to a barrier of all programs."""

    def programs(count, change=lambda body: body):
        body, out = change(TOGETHER).replace("COUNT", str(count)), torch.full((128,), 2**31 - 1, dtype=torch.int32)
        return run(body, torch.zeros(1, dtype=torch.int32), out, programs=2, threads=32, order=order)

    out = programs(2).view(4, 32)
    assert (out == torch.tensor([[0], [1], [1], [0]])).all()
    with pytest.raises(Fault, match="all threads wait here or at a barrier, for ever"):
        programs(3)
    with pytest.raises(Fault, match=r"no atomic orders|was never written"):
        programs(2, lambda body: body.replace("add.release", "add.relaxed"))


def test_a_loop_whose_lanes_leave_it_one_by_one():
    body = """
    mov.b32 %r4, 0;
    mov.b32 %r5, 0;
    $L__BB0_1:
    add.s32 %r5, %r5, %r4;
    add.s32 %r4, %r4, 1;
    setp.le.s32 %p1, %r4, %r0;
    @%p1 bra $L__BB0_1;
    st.global.b32 [%d3], %r5;
    """
    n = torch.arange(64)
    assert torch.equal(run(body, whole(), torch.empty(64, dtype=torch.int32)), (n * (n + 1) // 2).int())


def test_a_product_of_matrices_through_shared_memory():
    """ldmatrix of A (16 x 16) and, transposed, of B (16 x 8), and mma: what each lane holds."""
    body = """
    ld.global.v4.b32 {%r4, %r5, %r6, %r7}, [%d4];
    st.shared.v4.b32 [%r8], {%r4, %r5, %r6, %r7};
    bar.sync 0;
    ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r11, %r12, %r13, %r14}, [%r8];
    ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%r5, %r6}, [%r9];
    mov.b32 %r4, 0f3F800000;
    mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%r21,%r22,%r23,%r24},{%r11,%r12,%r13,%r14},{%r5,%r6},{%r4,%r4,%r4,%r4};
    st.global.v4.b32 [%d5], {%r21, %r22, %r23, %r24};
    """
    place = """
    mad.wide.u32 %d4, %r0, 16, %d0;
    mad.wide.u32 %d5, %r0, 16, %d1;
    shl.b32 %r8, %r0, 4;
    and.b32 %r9, %r8, 255;
    mov.b32 %r10, global_smem;
    add.s32 %r8, %r8, %r10;
    add.s32 %r9, %r9, %r10;
    add.s32 %r9, %r9, 512;
    """
    A, B = torch.randn(16, 16).half(), torch.randn(16, 8).half()
    quarters = torch.stack([A[:8, :8], A[8:, :8], A[:8, 8:], A[8:, 8:]])  # as the registers of mma want them
    x = torch.cat([quarters.reshape(-1), B.reshape(-1), torch.zeros(128).half()])
    out = run(place + body, x, torch.empty(256), shared=1024)[:128].view(8, 4, 2, 2)
    lanes = out.permute(2, 0, 1, 3).reshape(16, 8)
    assert torch.allclose(lanes, A.float() @ B.float() + 1, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("ld.global.b32 %r4, [%d2+4];", "out of bounds"),
        ("ld.global.b32 %r4, [%d2+-4];", "out of bounds"),
        ("st.global.b32 [%d3+4], %r0;", "out of bounds"),
        ("st.shared.b32 [%r1+300], %r0;", "out of bounds"),
        ("ld.global.v2.b32 {%r4, %r5}, [%d2];", "misaligned"),
        ("ld.global.b32 %r4, [%d3];", "never written"),
        ("ld.shared.b32 %r4, [%r1];", "never written"),
    ],
)
def test_places_that_an_access_must_not_touch(body, words):
    with pytest.raises(AssertionError, match=words):
        run(body, numbers(), torch.full((64,), torch.nan))


SWAP = """
ld.global.b32 %r4, [%d2];
st.shared.b32 [%r1], %r4;
{}
xor.b32 %r5, %r2, {};
mov.b32 %r6, global_smem;
add.s32 %r5, %r5, %r6;
ld.shared.b32 %r7, [%r5];
st.global.b32 [%d3], %r7;
"""


def test_races_in_shared_memory():
    lane = torch.arange(64)
    swapped = run(SWAP.format("bar.sync 0;", 128), numbers(), torch.empty(64))
    assert torch.equal(swapped, numbers()[lane ^ 32])
    # Within a warp its own barrier is enough.
    assert torch.equal(run(SWAP.format("bar.warp.sync -1;", 4), numbers(), torch.empty(64)), numbers()[lane ^ 1])
    for barrier, apart in (("", 128), ("", 4), ("bar.warp.sync -1;", 128)):
        with pytest.raises(Fault, match="reads what another thread writes, with no barrier between"):
            run(SWAP.format(barrier, apart), numbers(), torch.empty(64))
    again = SWAP.format("bar.sync 0;", 128) + "st.shared.b32 [%r1], %r7;"
    with pytest.raises(Fault, match="writes what another thread reads"):
        run(again, numbers(), torch.empty(64))


COPY = """
mul.wide.u32 %d4, %r0, 16;
add.s64 %d5, %d0, %d4;
shl.b32 %r4, %r0, 4;
mov.b32 %r5, global_smem;
add.s32 %r5, %r5, %r4;
cp.async.cg.shared.global [%r5], [%d5], 0x10;
cp.async.commit_group;
{}
bar.sync 0;
ld.shared.b32 %r7, [%r1];
st.global.b32 [%d3], %r7;
"""


def test_asynchronous_copies():
    assert torch.equal(
        run(COPY.format("cp.async.wait_group 0;"), numbers(256), torch.empty(64), shared=1024), numbers(64)
    )
    for wait in ("", "cp.async.wait_group 1;"):
        with pytest.raises(Fault, match="asynchronous copy on its way"):
            run(COPY.format(wait), numbers(256), torch.empty(64), shared=1024)


@pytest.mark.parametrize(("how", "expected"), [("min", torch.amin), ("max", torch.amax), ("add", torch.sum)])
def test_reductions_of_a_warp(how, expected):
    body = f"""
    mov.b32 %r4, -1;
    ld.global.b32 %r5, [%d2];
    redux.sync.{how}.s32 %r6, %r5, %r4;
    st.global.b32 [%d3], %r6;
    """
    of_warps = expected((whole() - 20).view(2, 32), 1, keepdim=True).int()
    assert torch.equal(run(body, whole() - 20, whole()), of_warps.expand(2, 32).reshape(64))
    with pytest.raises(NotImplementedError, match="whole warps"):
        run(body.replace("-1", "255"), whole(), whole())


def test_a_part_of_a_warp_at_an_instruction_of_all():
    body = """
    setp.lt.u32 %p1, %r0, 40;
    @%p1 shfl.sync.bfly.b32 %r4, %r0, 1, 31, -1;
    """
    with pytest.raises(Fault, match="only some lanes of a warp"):
        run(body, numbers(), numbers())


TICKET = """
mad.wide.u32 %d4, %r3, 256, %d3;
st.global.b32 [%d4+4], %r3;
{barrier}
setp.eq.s32 %p1, %r0, 0;
mov.b32 %r4, 0;
@%p1 atom.global.gpu.{order}.add.u32 %r4, [%d1], 1;
@%p1 st.shared.b32 [%r1], %r4;
bar.sync 0;
mov.b32 %r5, global_smem;
ld.shared.b32 %r6, [%r5];
setp.ne.s32 %p2, %r6, 2;
@%p2 bra $L__BB0_9;
ld.global.b32 %r7, [%d3+4];
ld.global.b32 %r8, [%d3+260];
ld.global.b32 %r9, [%d3+516];
add.s32 %r7, %r7, %r8;
add.s32 %r7, %r7, %r9;
st.global.b32 [%d2], %r7;
$L__BB0_9:
"""


@pytest.mark.parametrize("order", [together, descending, shuffled(3)])
def test_the_last_of_several_programs_sees_what_the_others_wrote(order):
    def last(**how):
        x, out = whole(), torch.zeros(1 + 3 * 64, dtype=torch.int32)
        run(TICKET.format(**how), x, out, programs=3, order=order)
        return x

    assert (last(barrier="bar.sync 0;", order="acq_rel") == 3).all()
    for missing in ({"order": "relaxed"}, {"order": "acquire"}, {"order": "release"}):
        with pytest.raises(Fault, match="of another program, that no atomic orders"):
            last(barrier="bar.sync 0;", **missing)
    with pytest.raises(Fault, match="of another program, that no atomic orders"):
        last(barrier="", order="acq_rel")


def test_races_in_global_memory():
    with pytest.raises(Fault, match="of another program, that no atomic orders"):
        run("st.global.b32 [%d3], %r0;", whole(), whole(), programs=2)
    with pytest.raises(Fault, match="reads, no barrier between"):
        run("st.global.b32 [%d3], %r0;\nld.global.b32 %r4, [%d1];", whole(), whole())
    run("st.global.b32 [%d3], %r0;\nbar.sync 0;\nld.global.b32 %r4, [%d1];", whole(), whole())


def test_bytes_of_shared_memory_are_told_apart():
    body = """
    mov.b32 %r4, global_smem;
    add.s32 %r4, %r4, %r0;
    st.shared.b8 [%r4], %r0;
    {}
    xor.b32 %r5, %r0, 33;
    mov.b32 %r6, global_smem;
    add.s32 %r5, %r5, %r6;
    ld.shared.b8 %r7, [%r5];
    st.global.b32 [%d3], %r7;
    """
    out = run(body.format("bar.sync 0;"), whole(), torch.empty(64, dtype=torch.int32))
    assert torch.equal(out, whole() ^ 33)
    with pytest.raises(Fault, match="no barrier between"):
        run(body.format(""), whole(), torch.empty(64, dtype=torch.int32))

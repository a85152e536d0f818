"""What the machine makes of Hopper's own instructions, and that it finds each way to use them wrongly."""

import numpy as np
import pytest
import torch

from .machine import Machine
from .memory import Fault, Global
from .parse import parse
from .products import addresses_of, swizzled
from .transfers import TensorMap

HEAD = """
.target sm_90a
.visible .entry snippet(
	.param .u64 snippet_param_0,
	.param .u64 .ptr .global .align 1 snippet_param_1,
	.param .align 64 .b8 snippet_param_2[128]
)
{
	.reg .pred %p<9>;
	.reg .b32 %r<200>;
	.reg .b64 %d<9>;
	ld.param.b64 %d0, [snippet_param_0];
	ld.param.b64 %d1, [snippet_param_1];
	mov.b32 %r0, snippet_param_2;
	cvt.u64.u32 %d2, %r0;
	cvta.param.u64 %d2, %d2;
	mov.u32 %r0, %tid.x;
	mov.b32 %r1, global_smem;
	setp.eq.s32 %p1, %r0, 0;
	mov.b32 %r2, 0;
	mov.b32 %r3, 1;
	mov.pred %p2, -1;
	mov.pred %p3, 0;
"""


def run(body: str, x: torch.Tensor, out: torch.Tensor, *, threads=128, shared=8192, box=None, shape=None):
    """In the body: thread %r0, x at %d0, out at %d1, shared memory at %r1, 0 and 1 in %r2 and %r3, true and false in %p2 and %p3;
    thread 0 has %p1. With a ``box``, %d2 is a map of x, whose last dimension is the innermost, cut to ``shape``."""
    memory = Global([x, out])
    if box:
        strides = tuple(step * x.itemsize for step in x.stride()[-2::-1])
        mapped = TensorMap(memory.address(x), tuple(shape or x.shape)[::-1], strides, box[::-1], x.itemsize, 128)
    else:
        mapped = TensorMap(memory.address(x), (64,), (), (64,), 2, 128)
    lines = "".join(f"\t{line.strip()}\n" for line in body.strip().splitlines())
    parameters = [np.uint64(memory.address(t)).tobytes() for t in (x, out)] + [mapped]
    Machine(parse(HEAD + lines + "\tret;\n}\n"), parameters, 1, threads, shared, memory).run()
    memory.write_back()
    return out


def test_swizzles():
    """By hand: bits 7 to 9 into bits 4 to 6, of shorter lines only the lowest of them."""
    at = np.array([0x400, 0x470, 0x480, 0x500, 0x610, 0x7F0, 0x800])
    assert swizzled(at, 128).tolist() == [0x400, 0x470, 0x490, 0x520, 0x650, 0x780, 0x800]
    assert swizzled(at, 64).tolist() == [0x400, 0x470, 0x490, 0x520, 0x610, 0x7C0, 0x800]
    assert swizzled(at, 32).tolist() == [0x400, 0x470, 0x490, 0x500, 0x610, 0x7E0, 0x800]


def descriptor(swizzle: int, leading: int, stride: int, start: int = 0) -> int:
    """In units of 16 bytes."""
    return swizzle << 62 | stride << 32 | leading << 16 | start


def strided(sizes, steps) -> np.ndarray:
    """Offsets of a layout, its first dimension the fastest."""
    offsets = np.zeros(1, np.int64)
    for size, step in reversed(list(zip(sizes, steps))):
        offsets = np.add.outer(offsets, step * np.arange(size)).reshape(-1)
    return offsets


@pytest.mark.parametrize(
    ("line", "descriptor", "bytes", "mn_major", "mn", "k"),
    [
        # Sizes and steps in elements of M or N and of K: the examples of NVIDIA's manual, PTX ISA 9.7.15.5.1.2.1.3.
        (32, descriptor(3, 1, 16), 4, False, ((8, 2), (8, 64)), ((4, 2), (1, 4))),
        (32, descriptor(3, 16, 32), 2, True, ((8, 2, 2), (1, 8, 128)), ((8, 2), (16, 256))),
        (64, descriptor(2, 32, 64), 2, True, ((8, 4, 2), (1, 8, 256)), ((8, 2), (32, 512))),
        # The layout that Triton uses most, by its formula there.
        (128, descriptor(1, 0, 64), 2, False, ((8, 8), (64, 512)), ((8, 2), (1, 8))),
        (128, descriptor(1, 512, 64), 2, True, ((8, 8, 2), (1, 8, 4096)), ((8, 2), (64, 512))),
    ],
)
def test_where_a_matrix_lies(line, descriptor, bytes, mn_major, mn, k):
    each = 16 // bytes
    offsets = np.add.outer(strided(*k), strided(*mn)) * bytes  # [k, mn]
    wanted = swizzled(offsets[:, ::each] if mn_major else offsets.T[:, ::each], line)
    found = addresses_of(np.array([descriptor], np.uint64), *wanted.shape, mn_major, "here")
    assert (found[0] == wanted.reshape(-1)).all()


def test_matrices_that_it_does_not_know():
    for unknown in (descriptor(0, 1, 8), descriptor(1, 1, 64) | 3 << 49):
        with pytest.raises(NotImplementedError, match="here"):
            addresses_of(np.array([unknown], np.uint64), 8, 2, False, "here")


# A (64 x 16) and B (16 x 8, or its transpose) as rows of 32 bytes, of which 8 are a pattern of 256 bytes.
FILL = """
mul.wide.u32 %d3, %r0, 16;
add.s64 %d4, %d0, %d3;
ld.global.v4.b32 {%r4, %r5, %r6, %r7}, [%d4];
shl.b32 %r9, %r0, 4;
bfe.u32 %r8, %r0, 3, 1;
shl.b32 %r8, %r8, 4;
xor.b32 %r9, %r9, %r8;
add.s32 %r9, %r1, %r9;
st.shared.v4.b32 [%r9], {%r4, %r5, %r6, %r7};
setp.lt.u32 %p4, %r0, 16;
@%p4 ld.global.v4.b32 {%r4, %r5, %r6, %r7}, [%d4+2048];
@%p4 st.shared.v4.b32 [%r9+2048], {%r4, %r5, %r6, %r7};
shr.u32 %r10, %r1, 4;
cvt.u64.u32 %d5, %r10;
add.s64 %d6, %d5, 128;
"""
A_AND_B = f"or.b64 %d5, %d5, {descriptor(3, 1, 16)};\nor.b64 %d6, %d6, {descriptor(3, 1, 16)};"
FENCES = "fence.proxy.async.shared::cta;\nbar.sync 0;\nwgmma.fence.sync.aligned;"
SUMS = "{%r20, %r21, %r22, %r23}"
PRODUCT = f"wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {SUMS}, %d5, %d6, %p3, 1, 1, 0, 0;"
# Its A is what PRODUCT sums.
FROM_SUMS = PRODUCT.replace("%d5", SUMS).replace(SUMS, "{%r30, %r31, %r32, %r33}", 1).replace("1, 1, 0, 0", "1, 1, 0")
COMMIT, WAIT = "wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 0;"
STORE = """
add.s64 %d7, %d1, %d3;
st.global.v4.b32 [%d7], {%r20, %r21, %r22, %r23};
"""


def matrices() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A (64 x 16) and B (8 x 16) of small integers, and both in a row."""
    A, B = torch.randint(-4, 5, (64, 16)), torch.randint(-4, 5, (8, 16))
    return A, B, torch.cat([A, B]).bfloat16().reshape(-1)


def product(*body: str, x=None) -> torch.Tensor:
    """[64, 8], of what each thread has stored: rows 16 w + lane / 4 and 8 further, columns 2 (lane mod 4) and 1 further."""
    out = run("\n".join(body), matrices()[2] if x is None else x, torch.empty(512))
    return out.view(4, 8, 4, 2, 2).permute(0, 3, 1, 2, 4).reshape(64, 8)


def test_a_product_of_matrices_in_shared_memory():
    A, B, x = matrices()
    found = product(FILL, A_AND_B, FENCES, PRODUCT, COMMIT, WAIT, STORE, x=x)
    assert torch.equal(found, (A @ B.T).float())
    # Again onto the sums, in which no other instruction may have had a hand.
    again = PRODUCT.replace("%p3", "%p2")
    assert torch.equal(product(FILL, A_AND_B, FENCES, PRODUCT, again, COMMIT, WAIT, STORE, x=x), 2 * (A @ B.T).float())


def test_what_was_there_before_the_fence_may_be_moved_into_sums_behind_it():
    A, B, x = matrices()
    one = "mov.b32 %r15, 0f3F800000;"
    moves = "mov.b32 %r20, 0f3F800000;\nmov.b32 %r22, %r16;\n" + "".join(
        f"mov.b32 %r{n}, %r15;\n" for n in (16, 21, 23)
    )
    rest = PRODUCT.replace("%p3", "%p2"), COMMIT, WAIT, STORE
    found = product(FILL, A_AND_B, one, "mov.b32 %r16, %r15;", FENCES, moves, *rest, x=x)
    assert torch.equal(found, (A @ B.T).float() + 1)
    with pytest.raises(Fault, match=r"no wgmma\.fence since threads touched"):
        product(FILL, A_AND_B, one, "mov.b32 %r16, %r15;", FENCES, "add.f32 %r16, %r16, %r16;", moves, *rest)


def test_a_product_with_a_in_registers():
    A, B, x = matrices()
    load = """
    shr.u32 %r12, %r0, 2;
    and.b32 %r13, %r12, 7;
    shr.u32 %r14, %r0, 5;
    shl.b32 %r14, %r14, 4;
    add.s32 %r13, %r13, %r14;
    and.b32 %r14, %r0, 3;
    shl.b32 %r14, %r14, 2;
    mad.wide.u32 %d5, %r13, 32, %d0;
    mad.wide.u32 %d5, %r14, 1, %d5;
    ld.global.b32 %r30, [%d5];
    ld.global.b32 %r31, [%d5+256];
    ld.global.b32 %r32, [%d5+16];
    ld.global.b32 %r33, [%d5+272];
    """
    b = f"or.b64 %d6, %d6, {descriptor(3, 1, 16)};"
    multiply = PRODUCT.replace("%d5", "{%r30, %r31, %r32, %r33}").replace("1, 1, 0, 0", "1, 1, 0")
    assert torch.equal(product(FILL, b, load, FENCES, multiply, COMMIT, WAIT, STORE, x=x), (A @ B.T).float())
    with pytest.raises(Fault, match="touches a register of a product"):
        product(FILL, b, load, FENCES, multiply, COMMIT, "mov.b32 %r31, 0;", WAIT, STORE)
    with pytest.raises(Fault, match=r"no wgmma\.fence since threads touched"):
        product(FILL, b, load, FENCES, "mov.b32 %r31, 0;", multiply, COMMIT, WAIT, STORE)


def test_a_product_with_b_by_columns():
    """B 16 x 8 in rows of 16 columns, of which 8 are asked for: lines of 32 bytes along N."""
    A, _, x = matrices()
    B = torch.randint(-4, 5, (16, 16))
    x = torch.cat([A.bfloat16().reshape(-1), B.bfloat16().reshape(-1)])
    fill = FILL.replace("setp.lt.u32 %p4, %r0, 16", "setp.lt.u32 %p4, %r0, 32")
    found = product(fill, A_AND_B, FENCES, PRODUCT.replace("0, 0;", "0, 1;"), COMMIT, WAIT, STORE, x=x)
    assert torch.equal(found, (A @ B[:, :8]).float())


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ((FILL, A_AND_B, FENCES, PRODUCT, COMMIT, STORE, WAIT), "touches a register of a product on its way"),
        ((FILL, A_AND_B, FENCES, PRODUCT, WAIT, STORE, COMMIT), "touches a register of a product on its way"),
        ((FILL, A_AND_B, FENCES, PRODUCT, COMMIT, WAIT.replace("0;", "1;"), STORE), "register of a product on its way"),
        ((FILL, A_AND_B, FENCES, PRODUCT, COMMIT), "ends while this product is on its way"),
        ((FILL, A_AND_B, FENCES.rpartition("\n")[0], PRODUCT, COMMIT, WAIT, STORE), "no wgmma.fence before the first"),
        (
            (FILL, A_AND_B, FENCES, "add.s32 %r20, %r3, 0;", PRODUCT, COMMIT, WAIT, STORE),
            "no wgmma.fence since threads touched a register",
        ),
        (
            (FILL, A_AND_B, FENCES, PRODUCT, "mov.b32 %r20, 0;", COMMIT, WAIT, STORE),
            "a register of a product on its way",
        ),
        ((FILL, A_AND_B, FENCES.partition("\n")[2], PRODUCT, COMMIT, WAIT, STORE), "no fence.proxy.async between"),
        ((FILL, A_AND_B, FENCES.replace("bar.sync 0;", ""), PRODUCT, COMMIT, WAIT, STORE), "no barrier between"),
        (
            (FILL, A_AND_B, FENCES, PRODUCT, COMMIT, "st.shared.v4.b32 [%r9], {%r4, %r5, %r6, %r7};", WAIT, STORE),
            "writes what a",
        ),
        (
            (FILL, A_AND_B, FENCES, PRODUCT, COMMIT, "bar.sync 0;", "st.shared.b32 [%r9], %r4;", WAIT, STORE),
            "writes what a product on its way reads",
        ),
        (
            (FILL, A_AND_B, FENCES, PRODUCT, COMMIT, WAIT, "st.shared.b32 [%r9], %r4;", STORE),
            "writes what another thread reads, with no barrier",
        ),
        (
            (FILL, A_AND_B, "cvt.u64.u32 %d7, %r0;\nor.b64 %d5, %d5, %d7;", FENCES, PRODUCT, COMMIT, WAIT, STORE),
            "different descriptors",
        ),
        ((FILL, A_AND_B, "add.s64 %d5, %d5, 500;", FENCES, PRODUCT, COMMIT, WAIT, STORE), "out of bounds"),
        ((FILL, A_AND_B, "add.s64 %d5, %d5, 64;", FENCES, PRODUCT, COMMIT, WAIT, STORE), "never written"),
        (
            (
                FILL,
                A_AND_B,
                FENCES,
                PRODUCT,
                PRODUCT.replace("n8", "n16").replace("%r23", "%r23,%r24,%r25,%r26,%r27"),
                COMMIT,
            ),
            "of a product of another shape",
        ),
        (
            (FILL, A_AND_B, FENCES, PRODUCT, FROM_SUMS, COMMIT, WAIT),
            "A is in a register in which a product on its way sums",
        ),
        ((FILL, A_AND_B, FENCES, "setp.lt.u32 %p5, %r0, 64;\n@%p5 " + PRODUCT, COMMIT, WAIT), "only some threads"),
    ],
)
def test_products_that_are_not_ordered(body, words):
    with pytest.raises(Fault, match=words):
        product(*body)


def test_what_a_product_reads_may_be_written_after_its_wait_and_a_barrier():
    product(FILL, A_AND_B, FENCES, PRODUCT, COMMIT, WAIT, STORE, "bar.sync 0;\nst.shared.b32 [%r9], %r4;")


INIT = "@%p1 mbarrier.init.shared::cta.b64 [%r1+4096], 1;\nbar.sync 0;"
EXPECT = "@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1+4096], 2048;"
TILE = """
@%p1 cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%r1], [%d2, {%r2, %r3}], [%r1+4096];
"""
AWAIT = """

{
	.reg .pred complete;
	waitLoop:
	mbarrier.try_wait.parity.shared::cta.b64 complete, [%r1+4096], %r2;
	@!complete bra.uni waitLoop;
}
"""
READ = """
shl.b32 %r9, %r0, 4;
add.s32 %r10, %r1, %r9;
ld.shared.v4.b32 {%r4, %r5, %r6, %r7}, [%r10];
mul.wide.u32 %d3, %r0, 16;
add.s64 %d4, %d1, %d3;
st.global.v4.b32 [%d4], {%r4, %r5, %r6, %r7};
"""


def tile(*body: str, **how) -> torch.Tensor:
    """16 rows of 64 of a tensor of 14 x 60, from row 1 and column 0 on, as they lie in shared memory."""
    x = torch.arange(14 * 64, dtype=torch.float32).reshape(14, 64).half()
    x[:, 60:] = torch.nan  # must not even be read
    run("\n".join(body), x, out := torch.empty(1024).half(), box=(16, 64), shape=(14, 60), **how)
    return out.view(16, 8, 8)


def test_a_copy_of_a_tile():
    found = tile(INIT, EXPECT, TILE, AWAIT, READ)
    wanted = torch.zeros(16, 64)
    wanted[:13, :60] = torch.arange(64, 14 * 64).reshape(13, 64)[:, :60]
    for row in range(16):
        for part in range(8):
            # The swizzle: row r has its 16 bytes p at p xor (r mod 8).
            assert torch.equal(found[row, part ^ row % 8], wanted[row, 8 * part : 8 * part + 8].half())


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ((INIT, EXPECT, TILE, READ, AWAIT), "reads what another thread writes"),
        ((INIT, EXPECT, TILE, "bar.sync 0;", READ, AWAIT), "has an asynchronous copy on its way"),
        ((INIT, EXPECT, TILE), "ends while copies to its shared memory are on their way"),
        ((INIT, EXPECT.replace("2048", "4096"), TILE, AWAIT, READ), "for ever"),
        ((INIT, TILE, AWAIT, READ), "for ever"),
        ((INIT, EXPECT, AWAIT, TILE, READ), "for ever"),
        ((INIT, EXPECT.replace("2048", "0"), TILE, AWAIT, READ), "reads what another thread writes"),
        # The phase before the first one, of parity 1, is over from the beginning.
        (
            (INIT, EXPECT, TILE, AWAIT.replace("%r2;", "%r3;"), "bar.sync 0;", READ),
            "has an asynchronous copy on its way",
        ),
        ((EXPECT, TILE, AWAIT, READ), "no mbarrier is there"),
        ((INIT.partition("\n")[0], EXPECT, TILE, AWAIT, READ), "no barrier between"),
        ((INIT, EXPECT, EXPECT, TILE, AWAIT, READ), "arrives once more than the mbarrier counts"),
        (
            (INIT, EXPECT, TILE, "@%p1 mbarrier.inval.shared::cta.b64 [%r1+4096];", READ),
            "on their way to this mbarrier",
        ),
        ((INIT, EXPECT, TILE, AWAIT, "@%p1 mbarrier.inval.shared::cta.b64 [%r1+4096];"), "no barrier between"),
        ((INIT, EXPECT, TILE, AWAIT, "bar.sync 0;", INIT), "is part of an mbarrier"),
        ((INIT, EXPECT, TILE, AWAIT, "@%p1 st.shared.b32 [%r1+4096], %r2;"), "is part of an mbarrier|no barrier"),
        ((INIT, EXPECT, TILE.replace("[%r1],", "[%r1+64],"), AWAIT), "not to a multiple of 128"),
        ((INIT, EXPECT, TILE.replace("[%r1],", "[%r1+7168],"), AWAIT), "out of bounds"),
        ((INIT, EXPECT, TILE.replace("[%r1],", "[%r1+2176],"), AWAIT), "writes what a thread has written"),
        ((INIT, EXPECT, TILE.replace("%d2", "%d0"), AWAIT, READ), "no tensor map of 2 dimensions"),
        ((INIT, EXPECT, TILE.replace("2d", "3d"), AWAIT, READ), "no tensor map of 3 dimensions"),
        ((INIT, EXPECT, "st.shared.b32 [%r1], %r0;\nbar.sync 0;", TILE, AWAIT), "written, with no fence.proxy.async"),
        (
            (INIT, EXPECT, TILE, AWAIT, READ, "bar.sync 0;", EXPECT, TILE, AWAIT.replace("%r2;", "%r3;")),
            "read, with no fence.proxy.async between",
        ),
        (
            (INIT, EXPECT, TILE, AWAIT, READ, "fence.proxy.async.shared::cta;", EXPECT, TILE),
            "writes what another thread reads, with no barrier",
        ),
        # One thread alone waits: the others know only after a barrier.
        (
            (INIT, EXPECT, TILE, "@!%p1 bra $L_9;", AWAIT, "$L_9:", READ),
            "reads what another thread writes, with no barrier between",
        ),
    ],
)
def test_copies_that_are_not_ordered(body, words):
    with pytest.raises(Fault, match=words):
        tile(*body)


def test_one_thread_waits_for_all():
    found = tile(INIT, EXPECT, TILE, "@!%p1 bra $L_9;", AWAIT, "$L_9:", "bar.sync 0;", READ)
    assert torch.equal(found, tile(INIT, EXPECT, TILE, AWAIT, READ))


def test_a_second_phase_and_an_mbarrier_that_is_given_back():
    between = "fence.proxy.async.shared::cta;\nbar.sync 0;"
    second = AWAIT.replace("%r2;", "%r3;")
    last = "bar.sync 0;\n@%p1 mbarrier.inval.shared::cta.b64 [%r1+4096];\nbar.sync 0;\nst.shared.b32 [%r1+4096], %r2;"
    body = INIT, EXPECT, TILE, AWAIT, READ, between, EXPECT, TILE, second, "bar.sync 0;", READ, last
    assert torch.equal(tile(*body), tile(INIT, EXPECT, TILE, AWAIT, READ))
    with pytest.raises(Fault, match="has an asynchronous copy on its way"):
        tile(*(AWAIT if part is second else part for part in body))  # of parity 0 again, whose phase is over


def test_of_two_copies_the_second_may_be_late():
    """Whose bytes nobody has told the mbarrier of."""
    x, second = torch.zeros(8, 64).half(), TILE.replace("[%r1],", "[%r1+1024],")
    body = "\n".join([INIT, EXPECT, TILE, second, AWAIT, READ])
    run(body, x, torch.empty(1024).half(), box=(8, 64))
    with pytest.raises(Fault, match="reads what another thread writes"):
        run(body.replace("2048", "1024"), x, torch.empty(1024).half(), box=(8, 64))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"address": 8}, "an address on 16 bytes"),
        ({"strides": (72,)}, "strides in steps of 16 bytes"),
        ({"shape": (0, 4)}, "sizes of 1 to"),
        ({"box": (64, 257)}, "boxes of 1 to 256"),
        ({"box": (128, 8)}, "up to the swizzle's"),
        ({"shape": (64, 4, 1)}, "dimensions"),
    ],
)
def test_tensor_maps_that_the_driver_refuses(change, words):
    right = {"address": 1024, "shape": (64, 4), "strides": (128,), "box": (64, 8), "width": 2, "line": 128}
    TensorMap(**right)
    with pytest.raises(Fault, match=words):
        TensorMap(**right | change)


def test_boxes_that_it_does_not_know():
    with pytest.raises(NotImplementedError, match="narrower"):
        TensorMap(1024, (64, 4), (128,), (32, 8), 2, 128)


def test_an_election():
    body = """
    elect.sync %r4|%p4, -1;
    mov.b32 %r5, 0;
    @%p4 add.s32 %r5, %r5, 1;
    mad.wide.u32 %d3, %r0, 4, %d1;
    st.global.b32 [%d3], %r5;
    """
    out = run(body, torch.zeros(1), torch.empty(128, dtype=torch.int32))
    assert out.view(4, 32).sum(1).eq(1).all()


def test_matrices_stored_by_rows():
    """Lane l has elements 2 l and 2 l + 1 of a matrix of 8 x 8, here with the numbers 2 l and 2 l + 1; lane r names row r."""
    body = """
    shl.b32 %r4, %r0, 1;
    mad.lo.s32 %r5, %r4, 65537, 65536;
    and.b32 %r6, %r0, 7;
    shl.b32 %r6, %r6, 4;
    add.s32 %r6, %r6, %r1;
    stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r6], {%r5};
    bar.sync 0;
    shl.b32 %r7, %r0, 2;
    add.s32 %r7, %r7, %r1;
    ld.shared.b32 %r8, [%r7];
    mad.wide.u32 %d3, %r0, 4, %d1;
    st.global.b32 [%d3], %r8;
    """
    out = run(body, torch.zeros(1), torch.empty(64, dtype=torch.int16), threads=32)
    assert torch.equal(out, torch.arange(64, dtype=torch.int16))
    out = run(body.replace("x1", "x1.trans"), torch.zeros(1), torch.empty(64, dtype=torch.int16), threads=32)
    assert torch.equal(out.view(8, 8).T.reshape(-1), torch.arange(64, dtype=torch.int16))


def test_what_it_does_not_know_is_an_error():
    for unknown in (
        "mbarrier.arrive.expect_tx.shared::cta.b64 %d4, [%r1], 16;",
        "mbarrier.test_wait.parity.shared::cta.b64 %p4, [%r1], %r2;",
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r4, %r5, %r6, %r7}, %d5, %d6, %p3, -1, 1, 0, 0;",
        "wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3 {%r4, %r5, %r6, %r7}, %d5, %d6, %p3, 1, 1;",
        "elect.sync %r4|%p4, 255;",
        "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%d2, {%r2, %r3}], [%r1];",
        "fence.proxy.async;",
    ):
        with pytest.raises(NotImplementedError, match="line 24"):
            run(unknown, torch.zeros(1), torch.zeros(1))

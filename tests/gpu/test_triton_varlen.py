"""Packed sequences in Triton: interpreted, against the loop over the sequences in float64; grids, on tensors without data."""

import pytest
import torch
from helpers.calls import OPS, check, raw_op
from helpers.interpreter import needs_interpreter
from helpers.packed_calls import PACKED_OPS, make, offsets
from helpers.sweep import some
from torch.testing import assert_close

import infsa_kernels
from infsa_kernels.ops import varlen

pytest.importorskip("triton")

from infsa_kernels.triton import (
    configs,
    launch,
    linear,
    linear_backward,
    linear_varlen,
    pure,
    pure_backward,
    pure_tied,
    pure_varlen,
)

by_op = pytest.mark.parametrize("op", OPS)
by_tie = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Empty ones first, amid the others and last; few scores; a tile and a whole number of them; more than one of every kernel.
LENGTHS, KEY_LENGTHS = (0, 5, 64, 0, 130, 2, 0), (0, 4, 3, 7, 97, 0, 0)


def interpreted(test):
    return pytest.mark.interpreter(needs_interpreter(test))


@pytest.fixture
def triton(monkeypatch):
    """The backend in force, with sequences cut into splits where one of them has more than 32 tokens."""
    monkeypatch.setattr(configs, "WHOLE", 32)
    monkeypatch.setattr(configs, "resident", lambda *kind: 1)
    monkeypatch.setattr(configs, "multiprocessors", lambda device: 12)
    with infsa_kernels.backend("triton"):
        yield


def packed(op, *, lengths=LENGTHS, key_lengths=KEY_LENGTHS, heads=2, **options):
    options = {"rho": torch.rand(heads) + 0.5, "eps": 1.0} | options
    return make(op, lengths=lengths, key_lengths=key_lengths, heads=heads, **options)


@interpreted
@pytest.mark.parametrize("op", PACKED_OPS)
@by_tie
@pytest.mark.parametrize("dtype", some(DTYPES, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.one_in(4)
def test_is_the_loop_over_the_sequences(op, tied, dtype, triton):
    call = packed(op, tied=tied, dtype=dtype)
    check(call, call.output_gradient(), draws=4)


@interpreted
@pytest.mark.parametrize("op", PACKED_OPS)
@by_tie
@pytest.mark.parametrize(("d", "dv"), some([(20, 9), (64, 32), (33, 100)], (20, 9)))
@pytest.mark.one_in(3)
def test_short_sequences_and_head_dims(op, tied, d, dv, triton):
    """Linear in one program per sequence and head group; Pure's <dO, O> from few scores."""
    for dtype in (torch.float32, torch.bfloat16):
        call = packed(op, tied=tied, dtype=dtype, d=d, dv=dv, lengths=(3, 0, 30, 1), key_lengths=(4, 2, 32, 0))
        check(call, call.output_gradient(), draws=4)


EMPTY = {
    "no sequence": ((), ()),
    "no token": ((0, 0), (0, 0)),
    "no key": ((3, 2), (0, 0)),
    "no query": ((0, 0), (3, 2)),
    "one of each": ((3, 0, 2), (0, 4, 1)),
    "one sequence": ((70,), (45,)),
}


@interpreted
@pytest.mark.parametrize("op", PACKED_OPS)
@pytest.mark.parametrize("lengths", EMPTY.values(), ids=EMPTY)
@pytest.mark.one_in(2)
def test_empty(op, lengths, triton):
    for sizes in ({}, {"d": 0}, {"dv": 0}, {"heads": 0}):
        call = packed(op, lengths=lengths[0], key_lengths=lengths[1], **sizes)
        check(call, call.output_gradient(), draws=2)


@interpreted
@by_op
def test_offsets_bounds_and_layouts(op, triton):
    call = packed(op, lengths=(9, 0, 40), key_lengths=(0, 37, 5), index=torch.int64)
    q, k, v, cu_q, cu_k, *rest = call.raw()
    forward = raw_op(f"{op}_varlen_fwd", "triton")
    wanted = forward(q, k, v, cu_q, cu_k, *rest)
    strided = torch.stack((cu_q, cu_q + 7), 1)[:, 0]
    for other in (
        (q, k, v, strided, cu_k, *rest),
        (q, k, v, cu_q.int(), cu_k, *rest),
        (q, k, v, cu_q, cu_k, 10**6, 10**6, *rest[2:]),  # longest is a bound
        (q.transpose(0, 1).contiguous().transpose(0, 1), k, v, cu_q, cu_k, *rest),
    ):
        for found, right in zip(forward(*other), wanted):
            assert_close(found, right)
    wide = torch.full((q.shape[0] + 2, q.shape[1], 2 * q.shape[2] + 1), torch.nan)
    call.q = wide[1:-1, :, 1::2].copy_(q)
    check(call, call.output_gradient(), draws=2)


@interpreted
@by_op
@by_tie
@pytest.mark.one_in(2)
def test_a_sequence_does_not_feel_its_neighbours(op, tied, triton):
    """Which hold NaN. Alone, Pure's has the same bits; where Linear's are cut depends on how many tokens there are in all."""
    call = packed(op, tied=tied, dtype=torch.bfloat16, lengths=(31, 70, 40), key_lengths=(29, 45, 8), rho=1.0)
    dout = call.output_gradient()
    for t in filter(lambda t: t is not None, (call.q, call.k)):
        t[:29] = torch.nan
        t[-8:] = torch.nan
    queries, keys = call.spans()[1]
    mine = queries if op == "pure" else slice(1, 2)
    alone = packed(op, tied=tied, dtype=torch.bfloat16, lengths=(70,), key_lengths=(45,), rho=1.0)
    alone.q, alone.v = call.q[queries], call.v[keys]
    alone.k = None if tied else call.k[keys]
    found, right = ({"out": c.run(), **c.gradients(d)} for c, d in ((call, dout), (alone, dout[mine])))
    for name, at in {"out": mine, "q": queries, "k": keys, "v": keys}.items():
        if name in found:
            same = dict(rtol=0, atol=0) if op == "pure" else {}
            assert_close(found[name][at], right[name], **same)


@interpreted
@by_op
def test_rho_of_every_sequence(op, triton):
    *arguments, _ = packed(op).raw()
    head_rho, raw = torch.rand(len(LENGTHS), 2) + 0.5, raw_op(f"{op}_varlen_fwd", "triton")
    of_rows = head_rho if op == "linear" else head_rho.repeat_interleave(torch.tensor(LENGTHS), 0)
    assert_close(raw(*arguments, head_rho)[0], raw(*arguments, None)[0] * of_rows[..., None])


@interpreted
@pytest.mark.parametrize("op", PACKED_OPS)
@by_tie
@pytest.mark.one_in(3)
def test_gradients_only_on_demand_and_repeated_runs(op, tied, triton):
    call = packed(op, tied=tied, dtype=torch.bfloat16, lengths=(3, 0, 40), key_lengths=(5, 2, 33))
    q, k, v, *rest = call.raw()
    forward, backward = (raw_op(f"{call.raw_name}_{way}", "triton") for way in ("fwd", "bwd"))
    out, *statistics = forward(q, k, v, *rest)
    assert torch.equal(out, forward(q, k, v, *rest)[0])
    saved = [out, *statistics] if op == "pure" else statistics
    arguments = torch.randn_like(out), q, k, v, *saved, *rest
    everything = backward(*arguments, [True] * 4)
    for number in range(0, 16, 3):
        wanted = [bool(number >> i & 1) for i in range(4)]
        for made, whole, asked in zip(backward(*arguments, wanted), everything, wanted):
            assert torch.equal(made, whole) if asked else made.shape == (0,)


@interpreted
@by_op
@pytest.mark.parametrize("wrong", [(-5, 3, 90), (0, 90, 20), (30, 10, 40), (0, 0, 0), (40, 40, 40)], ids=str)
@pytest.mark.one_in(2)
def test_wrong_offsets_reach_nothing_outside(op, wrong, triton):
    """On a GPU nobody checks them. The interpreter would end this process where a pointer leaves its tensor far enough; what lies
    before and behind the tokens is not written to, and not read: it is NaN."""
    modules = {"linear": linear_varlen, "pure": pure_varlen}

    def amid(*shape, value=None):
        around = torch.full((shape[0] + 200, *shape[1:]), torch.nan)
        return around, around[100:-100].copy_(torch.randn(shape) if value is None else torch.full(shape, value))

    (_, q), (_, k), (_, v) = (amid(40, 2, 16) for _ in "qkv")
    cu_seqlens = torch.tensor(wrong, dtype=torch.int32)
    rest = cu_seqlens, cu_seqlens, 40, 40, 1.0, 1.0, None
    out, *saved = modules[op].forward(q, k, v, *rest)
    around, gradients = zip(*(amid(40, 2, 16, value=0.0) for _ in "qkv"))
    dout = torch.randn_like(out)
    saved = [t.nan_to_num() for t in ([out, *saved] if op == "pure" else saved)]
    modules[op].backward(dout, q, k, v, *saved, *rest, [*gradients, torch.empty(2, 2)])
    for whole, gradient in zip(around, gradients):
        assert not gradient.isnan().any()
        assert whole[:100].isnan().all() and whole[-100:].isnan().all()


@interpreted
def test_refusals_name_the_reason():
    def reason(op, dtype, d):
        return infsa_kernels.explain_backend(f"{op}_varlen", torch.device("cpu"), dtype, (8, 1, d))["triton"]

    for op in OPS:
        assert reason(op, torch.bfloat16, 64) is None
        assert "float64" in reason(op, torch.float64, 64)
        assert "257" in reason(op, torch.float32, 257)
    q, v, cu = torch.randn(8, 1, 16), torch.randn(8, 1, 300), offsets((8,))
    with infsa_kernels.backend("triton"), pytest.raises(ValueError, match=r"infsa::pure.*300"):
        torch.ops.infsa.pure_varlen(q, q, v, cu, cu, 8, 8)


@pytest.fixture
def grids(monkeypatch):
    """How many programs of each kernel start, none of which does."""
    found = []

    class Recorder:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *args, **options: found.append((self.name, *grid))

    for module in (linear, linear_backward, pure, pure_backward, pure_tied):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Recorder(name))
    return found


def start(op, tokens, sequences, longest, *, heads=4, d=64, tied=False):
    """Forward and backward on tensors without data: who asks for an offset gets an error."""
    raw, module = {"linear": (varlen.raw_linear, linear_varlen), "pure": (varlen.raw_pure, pure_varlen)}[op]
    q, k, v = (torch.empty(1, heads, d, dtype=torch.bfloat16, device="meta").expand(tokens, heads, d) for _ in "qkv")
    cu_seqlens = torch.empty(sequences + 1, dtype=torch.int32, device="meta")
    rest = cu_seqlens, None if tied else cu_seqlens, longest, longest, 1e-6, 1.0, None
    k = None if tied else k
    out, *saved = module.forward(q, k, v, *rest)
    saved = [out, *saved] if op == "pure" else saved
    arguments = torch.empty_like(out), q, k, v, *saved, *rest
    module.backward(*arguments, raw.gradients((*arguments, [True] * 4)))


@by_op
@by_tie
def test_grids_follow_the_tokens_and_not_the_longest_sequence(op, tied, grids):
    """A padded batch of 1000 sequences of up to 100000 tokens would be a hundred million tokens."""
    start(op, 200_000, 1000, 100_000, tied=tied)
    assert len(grids) >= 4
    for name, programs in grids:
        tile = 16 if op == "pure" else 32
        assert programs <= 4 * (200_000 // tile + 1000), name
    before = list(grids)
    grids.clear()
    start(op, 200_000, 1000, 200_000, tied=tied)
    assert grids == before


@by_op
def test_short_sequences_are_a_program_each(op, grids):
    start(op, 3000, 100, 50, heads=1)
    if op == "linear":
        assert grids == [
            ("linear_fwd_keys_kernel", 100), ("linear_bwd_keys_kernel", 100), ("linear_bwd_queries_kernel", 100)
        ]  # fmt: skip


@by_op
def test_sizes_past_32_bits_are_refused_before_a_launch(op, grids):
    with pytest.raises(ValueError, match=rf"infsa::{op}_varlen: N is 1073741825, the Triton kernels take up to"):
        start(op, (1 << 30) + 1, 1, 5)
    with pytest.raises(ValueError, match=rf"infsa::{op}_varlen: S \* H is 1073741828, the Triton kernels take up to"):
        start(op, 5, (1 << 28) + 1, 5)
    assert grids == []
    assert launch.LARGEST_COUNT == 1 << 30

"""The packed operators against the loop over their sequences in float64, and what torch asks of an operator."""

from functools import partial

import pytest
import torch
from helpers.calls import DTYPES, check, raw_op
from helpers.packed_calls import KEY_LENGTHS, LENGTHS, PACKED_OPS, H, make, offsets
from helpers.sweep import some
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

import infsa_kernels

by_op = pytest.mark.parametrize("op", PACKED_OPS)
by_tie = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])


@by_op
@by_tie
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.one_in(4)
def test_is_the_loop_over_the_sequences(op, dtype, tied, device, backend):
    # With few keys and a small eps numbers all but cancel, and nothing can be said about their digits.
    for d, dv, rho in (
        (16, 16, 0.9),
        (20, 9, torch.rand(H, device=device) + 0.5),
        (64, 32, torch.ones((), device=device)),
    ):
        call = make(op, device, tied=tied, dtype=dtype, d=d, dv=dv, rho=rho, eps=1.0)
        check(call, call.output_gradient(), draws=4)
    call = make(op, device, tied=tied, dtype=dtype, lengths=(190, 0, 97), key_lengths=(65, 0, 260))
    check(call, call.output_gradient(), draws=4)


def _between_nan(t):
    """Every other head and channel of a tensor that else holds NaN."""
    wide = torch.full((t.shape[0] + 2, 2 * t.shape[1], 2 * t.shape[2] + 1), torch.nan, dtype=t.dtype, device=t.device)
    view = wide[1:-1, 1::2, 1::2]
    return view.copy_(t)


def _head_major(t):
    return t.transpose(0, 1).contiguous().transpose(0, 1)


@by_op
@by_tie
@pytest.mark.parametrize("layout", [_between_nan, _head_major])
@pytest.mark.one_in(4)
def test_layouts(op, layout, tied, device, backend):
    for dtype in (torch.float32, torch.bfloat16):
        call = make(op, device, tied=tied, dtype=dtype, eps=1.0)
        call.q, call.v = layout(call.q), layout(call.v)
        call.k = None if tied else layout(call.k)
        check(call, layout(call.output_gradient()))


@by_op
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_integers_of_offsets(op, index, device, backend):
    call = make(op, device, index=index, eps=1.0)
    check(call, call.output_gradient(), draws=2)
    q, k, v, cu_q, cu_k, *rest = call.raw()
    strided = torch.stack((cu_q, cu_q + 7), 1)[:, 0]
    raw = raw_op(f"{call.raw_name}_fwd", backend)
    assert torch.equal(raw(q, k, v, strided, cu_k, *rest)[0], raw(q, k, v, cu_q, cu_k, *rest)[0])
    assert torch.equal(raw(q, k, v, cu_q, cu_k, 10**6, 10**6, *rest[2:])[0], call.run())  # longest is a bound


EMPTY = {
    "no sequence": ((), ()),
    "no token": ((0, 0), (0, 0)),
    "no key": ((3, 2), (0, 0)),
    "no query": ((0, 0), (3, 2)),
    "one of each": ((3, 0, 2), (0, 4, 1)),
}


@by_op
@pytest.mark.parametrize("lengths", EMPTY.values(), ids=EMPTY)
@pytest.mark.one_in(3)
def test_empty(op, lengths, device, backend):
    for sizes in ({}, {"d": 0}, {"dv": 0}, {"heads": 0}):
        heads = sizes.get("heads", H)
        rho = torch.ones(heads, device=device)
        call = make(op, device, lengths=lengths[0], key_lengths=lengths[1], rho=rho, eps=1.0, **sizes)
        check(call, call.output_gradient())


@by_op
def test_rho_of_every_sequence(op, device, backend):
    """The raw operator's may differ between sequences, the public one's is the same for all."""
    call = make(op, device, rho=torch.ones(H, device=device))
    (*arguments, _), raw = call.raw(), raw_op(f"{call.raw_name}_fwd", backend)
    head_rho = torch.rand(len(LENGTHS), H, device=device) + 0.5
    of_rows = head_rho if call.op == "linear" else head_rho.repeat_interleave(torch.tensor(LENGTHS, device=device), 0)
    assert_close(raw(*arguments, head_rho)[0], raw(*arguments, None)[0] * of_rows[..., None])


@by_op
@by_tie
@pytest.mark.one_in(4)
def test_gradients_of_every_order(op, tied, device, backend):
    lengths = {"lengths": (3, 0, 1, 4), "key_lengths": (2, 1, 0, 5)}
    call = make(
        op, device, tied=tied, dtype=torch.float64, d=3, dv=2, rho=torch.rand(H).double() + 0.5, **lengths
    ).leaves()
    names, tensors = zip(*call.tensors().items())

    def run(*tensors):
        for name, t in zip(names, tensors):
            setattr(call, name, t)
        return call.run()

    assert torch.autograd.gradcheck(run, tensors)
    assert torch.autograd.gradgradcheck(run, tensors, fast_mode=True)


@by_op
def test_k_that_is_q_in_other_sequences(op, device, backend):
    """The same tokens cut in another way: not tied, and right all the same."""
    call = make(op, device, tied=True, lengths=(4, 6), dtype=torch.float64).leaves()
    cu_k, dout = offsets((7, 3), device=device), call.output_gradient()

    def run(k):
        out = call.operator()(call.q, k, call.v, offsets((4, 6), device=device), cu_k, 6, 7)
        return out, *torch.autograd.grad(out, (call.q, call.v), dout)

    leaf = call.q.detach().clone().requires_grad_()
    out = call.operator()(call.q, leaf, call.v, offsets((4, 6), device=device), cu_k, 6, 7)
    dq, dk, dv = torch.autograd.grad(out, (call.q, leaf, call.v), dout)
    assert_close(run(call.q), (out, dq + dk, dv))


def raw_backward(call, backend, output_mask=(True,) * 4):
    q, k, v, *rest = call.raw()
    out, *statistics = raw_op(f"{call.raw_name}_fwd", backend)(q, k, v, *rest)
    saved = [out, *statistics] if call.op == "pure" else statistics
    return torch.randn_like(out), q, k, v, *saved, *rest, list(output_mask)


FORMS = {"plain": {}, "tied": {"tied": True}, "head_rho": {"rho": torch.rand(H) + 0.5, "index": torch.int64}}
SMALL = {"lengths": (3, 0, 2), "key_lengths": (2, 2, 0), "d": 4, "dv": 5}


@by_op
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("requires_grad", some([False, True], False))
@pytest.mark.one_in(4)
def test_opcheck(op, form, requires_grad, device, backend):
    call = make(op, device, **SMALL, **form)
    call = call.leaves() if requires_grad else call
    k = call.q if call.k is None else call.k
    arguments = call.q, k, call.v, *call.sequences(), call.eps, call.rho
    torch.library.opcheck(call.overload(), arguments, call.by_name())

    def leaf(t):
        return t.detach().requires_grad_(requires_grad and t.is_floating_point())

    torch.library.opcheck(
        raw_op(f"{call.raw_name}_fwd", backend).default, tree_map_only(torch.Tensor, leaf, call.raw())
    )
    arguments = tree_map_only(torch.Tensor, leaf, raw_backward(call, backend))
    torch.library.opcheck(raw_op(f"{call.raw_name}_bwd", backend).default, arguments)


@by_op
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fakes_tell_the_truth(op, dtype, device, backend):
    def describe(outputs):
        return [(t.shape, t.stride(), t.dtype, t.device) for t in outputs]

    for form in FORMS.values():
        call = make(op, device, dtype=dtype, **form)
        call.q, call.v = _head_major(call.q), _head_major(call.v)
        calls = [("fwd", call.raw())]
        calls += [("bwd", raw_backward(call, backend, wanted)) for wanted in ([True] * 4, [False, True] * 2)]
        for direction, arguments in calls:
            raw = raw_op(f"{call.raw_name}_{direction}", backend)
            with FakeTensorMode() as mode:
                fake = describe(raw(*tree_map_only(torch.Tensor, mode.from_tensor, arguments)))
            assert fake == describe(raw(*arguments))


@by_op
def test_gradients_only_on_demand(op, device, backend):
    for tied in (False, True):
        call = make(op, device, tied=tied, rho=torch.rand(H, device=device))
        backward, arguments = raw_op(f"{call.raw_name}_bwd", backend), raw_backward(call, backend)
        everything = backward(*arguments)
        for number in range(16):
            wanted = [bool(number >> i & 1) for i in range(4)]
            for made, whole, asked in zip(backward(*arguments[:-1], wanted), everything, wanted):
                assert torch.equal(made, whole) if asked else made.shape == (0,)


@by_op
@pytest.mark.one_in(2)
def test_compiles_at_most_twice_for_all_lengths(op, device, backend):
    function, counter = make(op).function(), CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True, dynamic=True)
    def compiled(q, k, v, *sequences):
        return function(q, k, v, *sequences) * 2

    # No two sizes of the first call are equal, by chance: a graph may take these for one.
    for lengths, key_lengths in (
        ((20, 8, 1, 2), (33, 15, 0, 7)),
        ((5, 2, 9), (1, 2, 3)),
        ((6,) * 4, (6,) * 4),
        ((0, 30, 7, 2, 4), (9,) * 5),
    ):
        call = make(op, device, lengths=lengths, key_lengths=key_lengths).leaves()
        arguments = call.q, call.k, call.v, *call.sequences()
        wanted, found = function(*arguments), compiled(*arguments)
        assert_close(found, wanted * 2)
        dout, leaves = torch.randn_like(wanted), arguments[:3]
        assert_close(torch.autograd.grad(found, leaves, dout), torch.autograd.grad(wanted, leaves, 2 * dout))
    assert counter.frame_count <= 2


@by_op
def test_exports(op, device, backend):
    class Packed(torch.nn.Module):
        def forward(self, q, v, cu_seqlens, longest):
            return make(op).function()(q, q, v, cu_seqlens, cu_seqlens, longest, longest)

    def inputs(*lengths):
        call = make(op, device, tied=True, lengths=lengths)
        return call.q, call.v, offsets(lengths, device=device), max(lengths)

    tokens, sequences = torch.export.Dim("tokens"), torch.export.Dim("sequences", min=3)
    shapes = {0: tokens}, {0: tokens}, {0: sequences}, torch.export.Dim.DYNAMIC
    program = torch.export.export(Packed(), inputs(3, 4, 5), dynamic_shapes=shapes).module()
    for lengths in ((9, 1), (2, 3, 4, 5, 6)):
        arguments = inputs(*lengths)
        assert_close(program(*arguments), Packed()(*arguments))


@by_op
@by_tie
def test_functions_give_rows_of_tokens(op, tied, device, backend):
    """As the dense function on a padded batch, values and gradients."""
    lengths, H, longest = (4, 0, 7, 1), 3, 7
    rho = torch.rand(H, device=device).requires_grad_()
    call = make(op, device, tied=tied, lengths=lengths, key_lengths=lengths, rho=rho).leaves()
    packed, dense = call.function(), partial(getattr(infsa_kernels, f"{call.op}_infsa"), **call.by_name())
    k = call.q if tied else call.k
    out = packed(call.q, k, call.v, *call.sequences(), call.rho, call.eps)
    assert out.shape == (sum(lengths), H, call.v.shape[2])

    rows = [slice(*span) for span in zip(offsets(lengths).tolist(), offsets(lengths).tolist()[1:])]
    padding = torch.arange(longest, device=device) >= torch.tensor(lengths, device=device)[:, None]

    def pad(t):
        sequences = torch.nn.utils.rnn.pad_sequence([t[r] for r in rows], batch_first=True)
        return sequences.transpose(1, 2)

    q = pad(call.q)
    batch = dense(q, q if tied else pad(call.k), pad(call.v), call.rho, call.eps, padding, padding)
    same = torch.cat([batch[s, :, :length].transpose(0, 1) for s, length in enumerate(lengths)])
    assert_close(out, same)
    dout, leaves = torch.randn_like(out), list(call.tensors().values())
    assert_close(torch.autograd.grad(out, leaves, dout), torch.autograd.grad(same, leaves, dout), rtol=1e-4, atol=1e-5)


def test_rows_sum_their_gradients_in_float32(device, backend):
    """4096 gradients of 1 in bfloat16, whose running sum there ends at 256."""
    q = torch.randn(4096, 1, 8, dtype=torch.bfloat16, device=device)
    v = torch.ones(4096, 1, 1, dtype=torch.bfloat16, device=device)
    rho = torch.ones((), device=device, requires_grad=True)
    cu_seqlens = offsets((4096,), device=device)
    infsa_kernels.linear_infsa_varlen(q, q, v, cu_seqlens, cu_seqlens, 4096, 4096, rho).sum().backward()
    assert abs(rho.grad.item() - 4096) < 32


@by_op
def test_vmap_and_func(op, device, backend):
    call = make(op, device, **SMALL, dtype=torch.float64)
    q = torch.randn(2, *call.q.shape).to(call.q)
    sequences = call.sequences()

    def run(q):
        return call.operator()(q, call.k, call.v, *sequences)

    def loss(q):
        return run(q).square().sum()

    assert_close(torch.func.vmap(run)(q), torch.stack([run(q[0]), run(q[1])]))
    gradients = torch.stack([torch.func.grad(loss)(t) for t in q])
    assert_close(torch.func.vmap(torch.func.grad(loss))(q), gradients)
    leaf = q[1].clone().requires_grad_()
    loss(leaf).backward()
    assert_close(gradients[1], leaf.grad)
    with pytest.raises(NotImplementedError, match=f"infsa::{call.raw_name}_fwd.* has no forward-mode derivative"):
        torch.func.jvp(run, (q[0],), (q[0],))


@by_op
def test_flops(op, device, backend):
    call = make(op, device).leaves()
    N, M, (_, H, d), dv = sum(LENGTHS), sum(KEY_LENGTHS), call.q.shape, call.v.shape[2]
    scores = sum(n * m for n, m in zip(LENGTHS, KEY_LENGTHS))
    with FlopCounterMode(display=False) as forward:
        out = call.run()
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    wanted = {
        "linear": (H * (4 * N * d + 2 * M * (d + dv)), H * (8 * N * d + 5 * M * d + 3 * M * dv)),
        "linear_floor": (H * (4 * N * d + 2 * M * d + 3 * M * dv), H * (8 * N * d + 5 * M * d + 3 * M * dv)),
        "pure": (2 * H * scores * (d + dv), H * scores * (6 * d + 4 * dv)),
    }
    assert (forward.get_total_flops(), backward.get_total_flops()) == wanted[op]
    with FakeTensorMode() as mode, FlopCounterMode(display=False) as unknown:
        call.operator()(*tree_map_only(torch.Tensor, mode.from_tensor, (call.q, call.k, call.v, *call.sequences())))
    longest = len(LENGTHS) * max(LENGTHS) * max(KEY_LENGTHS)
    assert unknown.get_total_flops() == (2 * H * longest * (d + dv) if op == "pure" else wanted[op][0])


@by_op
def test_autocast(op, device, backend):
    call = make(op, device, tied=True)
    with torch.autocast(device, dtype=torch.bfloat16):
        out = call.run()
    assert out.dtype == torch.bfloat16
    call.q, call.v = call.q.bfloat16(), call.v.bfloat16()
    assert torch.equal(out, call.run())


@by_op
def test_meta_tensors(op):
    call = make(op)
    out = call.operator()(*(t.to("meta") for t in (call.q, call.k, call.v)), *(
        t.to("meta") if isinstance(t, torch.Tensor) else t for t in call.sequences()
    ))  # fmt: skip
    assert out.is_meta and out.shape == call.output_shape()


@pytest.mark.only_backend("cpu")
@pytest.mark.parametrize("op", PACKED_OPS[:2])
def test_a_sequence_does_not_feel_its_neighbours(op, device, backend):
    """The cut of its work, and so its bits, are those of the dense operator on it alone."""
    call = make(op, device, lengths=(5, 700, 0, 3000), key_lengths=(7, 650, 2, 3001), d=64, dv=64)
    dout, leaves = call.output_gradient(), call.leaves()
    out = leaves.run()
    dq, dk, dv = torch.autograd.grad(out, (leaves.q, leaves.k, leaves.v), dout)
    for s, (queries, keys) in enumerate(call.spans()):
        q, k, v = (
            t[at].transpose(0, 1)[None].requires_grad_()
            for t, at in ((call.q, queries), (call.k, keys), (call.v, keys))
        )
        alone = torch.ops.infsa.linear(q, k, v, call.eps, call.rho, **call.by_name())
        assert torch.equal(alone[0], out[s])
        for whole, at, part in zip(
            (dq, dk, dv), (queries, keys, keys), torch.autograd.grad(alone, (q, k, v), dout[s : s + 1])
        ):
            assert torch.equal(whole[at].transpose(0, 1), part[0])


@by_op
@pytest.mark.only_backend("cpu")
def test_bits_do_not_depend_on_the_number_of_threads(op, device, backend):
    call = make(op, device, lengths=(900, 3, 0, 40, 40, 1), tied=True, d=64, dv=64)
    dout, before, found = call.output_gradient(), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append((call.run(), *call.gradients(dout).values()))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@by_op
def test_scores_out_of_the_range_of_float32(op, device, backend):
    if backend not in ("cpu", "eager"):
        pytest.skip("the range of the kernels for GPUs is that of float32: docs/linear.md")
    call = make(op, device, lengths=(6, 50, 4), key_lengths=(7, 40, 3), dtype=torch.float32, eps=1e-30)
    call.q[6:56] *= 2.0**70  # the second sequence alone
    call.k[7:47] *= 2.0**-60
    wanted = call.reference(torch.float64)
    assert_close(call.run().double(), wanted, rtol=1e-4, atol=1e-5)


def test_no_floor_is_the_papers_operator(device, backend):
    call = make("linear", device)
    assert torch.equal(call.function()(call.q, call.k, call.v, *call.sequences(), score_floor=0), call.function()(
        call.q, call.k, call.v, *call.sequences()
    ))  # fmt: skip


def test_heads_without_a_positive_score_pool_the_mean_of_their_sequence(device, backend):
    call = make("linear_floor", device, lengths=(3, 2, 4), key_lengths=(5, 0, 7), rho=1.0)
    call.q.abs_()
    call.k.abs_().neg_()
    means = [call.v[keys].mean(0) for _, keys in call.spans()]
    means[1] = torch.zeros_like(means[0])  # no keys
    assert_close(call.run(), torch.stack(means), rtol=1e-4, atol=1e-5)

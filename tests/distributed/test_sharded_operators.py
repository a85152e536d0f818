"""A sequence on two and on four ranks: outputs and gradients of one process, whatever the shards."""

import functools
import itertools
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from helpers import pooled_linear_calls, ranks
from helpers.calls import DTYPES, Call, expected
from helpers.framework_calls import tensor
from helpers.sweep import swept
from torch.utils.flop_counter import FlopCounterMode

import infsa_kernels
from infsa_kernels import distributed
from infsa_kernels.testing import FORWARD, GRADIENT, assert_within

B, H, D, DV = 2, 3, 16, 5

# Tokens of each rank, by the number of ranks.
SHARDS = {2: ([21, 16], [0, 37]), 4: ([13, 1, 7, 16], [20, 0, 17, 0])}
KEYS = {2: [16, 17], 4: [3, 0, 29, 1]}


def call_of(op, dtype, tied, masked, rho, layout="contiguous", floor=0.0):
    """A call of all tokens, the same on every rank."""
    torch.manual_seed(1)
    N, M = 37, 37 if tied else 33

    def random(L, d):
        return tensor(layout, B, H, L, d, dtype=torch.float64, device="cpu").to(dtype)

    q, k, v = random(N, D), None if tied else random(M, D), random(M, DV)
    key_mask, query_mask = torch.rand(B, M) < 0.3, torch.rand(B, N) < 0.3
    if masked:
        # What is ignored may hold anything.
        q[:, :, 5].masked_fill_(
            query_mask[:, 5, None, None] if not tied else torch.zeros(1, dtype=torch.bool), torch.nan
        )
        v[:, :, 3].masked_fill_(key_mask[:, 3, None, None], torch.nan)
    masks = (key_mask, query_mask) if masked else (None, None)
    rho = {"number": 0.9, "one": torch.tensor([0.8]), "heads": torch.rand(H)}[rho]
    return Call(op, q, k, v, rho, 1e-6, *masks, floor)


def run_sharded(call, dout, lengths, keys, **options):
    """The output and the gradients, put together from all ranks'."""
    part = ranks.of_rank(call, lengths, keys).leaves()
    function = {"linear": distributed.linear_infsa, "pure": distributed.pure_infsa}[call.op]
    q, k, v, eps, rho, *masks = part._arguments()
    out = function(q, k, v, rho, eps, *masks, **part.by_name(), **options)
    tensors = part.tensors()
    grads = torch.autograd.grad(out, tensors.values(), ranks.shard(dout, lengths, -2))
    results = {"out": ranks.whole(out, -2)}
    for name, gradient in zip(tensors, grads):
        assert gradient.dtype == tensors[name].dtype
        results[name] = ranks.over_ranks(gradient).to(gradient.dtype) if name == "rho" else ranks.whole(gradient, -2)
    return results


def check_case(call, lengths, keys, **options):
    """Against the truth, by the rule, and that ranks agree on what they all have."""
    torch.manual_seed(2)
    # Whole numbers: their sums over tokens, on one process or on several, are exact in every dtype.
    dout = torch.randint(-1, 2, (*call.q.shape[:-1], call.v.shape[-1])).to(call.q.dtype)
    wanted = expected(call, dout.sum(-2) if call.op == "linear" else dout, draws=8)
    for name, actual in run_sharded(call, dout, lengths, keys, **options).items():
        truth, what = wanted[name].truth, f"{name} of {call.op} {call.q.dtype} on {lengths}, {keys} {options}"
        if call.op == "linear" and name == "out":
            truth = truth.unsqueeze(-2).expand(actual.shape)
        assert_within(actual, truth, wanted[name].eager_error, FORWARD if name == "out" else GRADIENT, what)


def cases(op, every):
    """(call, lengths, keys): every dtype, tied or not, masked or not; with each rho and layout, and uneven or empty shards."""
    world = dist.get_world_size()
    varied = itertools.cycle(zip(("number", "heads", "one"), ("contiguous", "token_major", "gaps")))
    shards = itertools.cycle(SHARDS[world])
    kinds = itertools.product(DTYPES, (False, True), (False, True))
    for (dtype, tied, masked), lengths, (rho, layout) in list(zip(kinds, shards, varied))[::every]:
        yield call_of(op, dtype, tied, masked, rho, layout), lengths, lengths if tied else KEYS[world]


def linear_is_one_process(every):
    for case in cases("linear", every):
        check_case(*case)


def linear_with_a_floor_is_one_process(every):
    for call, lengths, keys in cases("linear", every):
        check_case(replace(call, score_floor=0.3), lengths, keys)


def pooled_layer_is_one_process(every):
    """Tied or not, masked or not, with a floor and without; shards may be empty."""
    world, rank = dist.get_world_size(), dist.get_rank()
    kinds = list(itertools.product((0.0, 0.3), DTYPES, (False, True), (False, True)))
    shards = itertools.cycle(SHARDS[world])
    for (floor, dtype, tied, masked), lengths in list(zip(kinds, shards))[::every]:
        torch.manual_seed(1)
        call = pooled_linear_calls.layer(dtype, tied=tied, masked=masked) | {"score_floor": floor, "eps": 1e-2}
        dout = pooled_linear_calls.output_gradient(call)
        wanted = pooled_linear_calls.expected(call, dout)
        part = call | {"x": ranks.shard(call["x"].detach(), lengths, 1).requires_grad_()}
        if masked:
            part["padding_mask"] = ranks.shard(call["padding_mask"], lengths, 1)
        # The row is the same on every rank: the loss of one of them is the loss.
        found = pooled_linear_calls.results(distributed.pooled_linear_infsa, part, dout if rank == 0 else 0 * dout)
        for name, t in found.items():
            if name != "out":
                t = ranks.whole(t, 1) if name == "dx" else ranks.over_ranks(t).to(t.dtype)
            factor, what = FORWARD if name == "out" else GRADIENT, f"{name} of {dtype} {floor} on {lengths}"
            assert_within(t, wanted[name].truth, wanted[name].eager_error, factor, what)


def ring_is_one_process(every):
    for case in cases("pure", every):
        check_case(*case, method="ring")


def all_to_all_is_one_process(every):
    for case in cases("pure", every):
        check_case(*case, method="all_to_all")


def eager_is_one_process(every):
    """The backend in force runs the steps and the blocks."""
    with infsa_kernels.backend("eager"):
        linear_is_one_process(every)
        linear_with_a_floor_is_one_process(every)
        ring_is_one_process(every)


def three_dimensions():
    """(B*H, N, d), and a rho of as many."""
    lengths = SHARDS[dist.get_world_size()][0]
    q, k, v = (torch.randn(B * H, 37, d, dtype=torch.float64) for d in (D, D, DV))
    for op in ("linear", "pure"):
        check_case(Call(op, q, k, v, torch.rand(B * H, dtype=torch.float64)), lengths, lengths)


def results_are_the_same_bits_again_and_on_every_rank():
    lengths = SHARDS[dist.get_world_size()][0]
    for op, options in (("linear", {}), ("pure", {"method": "ring"}), ("pure", {"method": "all_to_all"})):
        call = call_of(op, torch.float32, True, False, "heads")
        dout = torch.randn(*call.q.shape[:-1], DV)
        first, again = (run_sharded(call, dout, lengths, lengths, **options) for _ in range(2))
        for name, t in first.items():
            assert torch.equal(t, again[name]), f"{op} {name}"
        if op == "linear":
            assert (first["out"] == first["out"][..., :1, :]).all(), "ranks have different contexts"


def bytes_do_not_depend_on_the_length():
    """Linear: two sums forward and two backward, of a few numbers per head."""
    world = dist.get_world_size()
    for tied, floor in itertools.product((False, True), (0.0, 0.1)):
        sent = []
        for N in (16, 4096):
            q, k, v = (torch.randn(B, H, N // world, d, requires_grad=True) for d in (D, D, DV))
            with ranks.Sent() as counted:
                out = distributed.linear_infsa(q, q if tied else k, v, score_floor=floor)
                forward = len(counted.calls)
                out.sum().backward()
            sent.append(counted.calls)
            assert forward == 2 and len(counted.calls) == 4, counted.calls
        assert sent[0] == sent[1]
        numbers = D + 1 + DV + 1 + D + (DV + 2 if floor else 0)
        assert sum(size for _, size in sent[0]) == B * H * (8 * numbers + 4 * DV), sent[0]


def compiles_whole(names=("tied", "pure", "pooled")):
    """One graph, forward and backward, with collectives in it; the group as a mesh, as a process group and as None."""
    world, rank = dist.get_world_size(), dist.get_rank()
    mesh = dist.device_mesh.init_device_mesh("cpu", (world,))
    q, k, v = (torch.randn(B, H, 4 + rank, d, requires_grad=True) for d in (D, D, DV))
    w = torch.randn(3, H * 4, 12)
    x = torch.randn(B, 4 + rank, 12, requires_grad=True)
    functions = {
        "tied": lambda group: distributed.linear_infsa(q, q, v, group=group),
        "floor": lambda group: distributed.linear_infsa(q, k, v, score_floor=0.3, group=group),
        "pure": lambda group: distributed.pure_infsa(q, k, v, group=group),
        "pooled": lambda group: distributed.pooled_linear_infsa(x, H, w[0], w[1], w[2].T, group=group),
    }
    for name, group in zip(names, (mesh, dist.group.WORLD, None)):
        function = functions[name]
        expected = function(group)
        actual = torch.compile(function, backend="aot_eager", fullgraph=True)(group)
        inputs = [x] if name == "pooled" else [q, v]
        for run in (expected, actual):
            run.grads = torch.autograd.grad(run.square().sum(), inputs)
        torch.testing.assert_close((actual, *actual.grads), (expected, *expected.grads))


def autocast_and_flops():
    """Autocast casts q, k and v; operations are counted, a rank's share of them."""
    world = dist.get_world_size()
    q, k, v = (torch.randn(B, H, 8, d) for d in (D, D, DV))
    for function, per_rank in (
        (distributed.linear_infsa, B * H * 8 * (6 * D + 2 * DV)),
        (distributed.pure_infsa, 2 * B * H * 8 * 8 * world * (D + DV)),
    ):
        with torch.autocast("cpu", torch.bfloat16), FlopCounterMode(display=False) as counter:
            assert function(q, k, v).dtype == torch.bfloat16
        assert counter.get_total_flops() == per_rank


def wrong_calls_are_refused_on_all_ranks():
    rank = dist.get_rank()
    q = torch.randn(B, H, 4, D)
    with pytest.raises(ValueError, match="H differs between the ranks"):
        distributed.pure_infsa(*[q if rank else q[:, :1]] * 3)
    with pytest.raises(ValueError, match="whether there is a key_padding_mask differs"):
        distributed.pure_infsa(q, q, q, key_padding_mask=torch.zeros(B, 4, dtype=torch.bool) if rank else None)
    with pytest.raises(ValueError, match=r"^infsa::linear: score_floor is -0\.1"):
        distributed.linear_infsa(q, q, q, score_floor=-0.1)
    with pytest.raises(ValueError, match="v has shape"):
        distributed.linear_infsa(q, q, q[:, :, 1:])
    with pytest.raises(ValueError, match="method is 'gather'"):
        distributed.pure_infsa(q, q, q, method="gather")
    with pytest.raises(TypeError, match="group is a int"):
        distributed.linear_infsa(q, q, q, group=3)


@pytest.mark.parametrize(
    ("world", "checks"),
    [
        (
            2,
            [
                functools.partial(linear_is_one_process, 3),
                functools.partial(linear_with_a_floor_is_one_process, 3),
                functools.partial(pooled_layer_is_one_process, 5),
                functools.partial(ring_is_one_process, 3),
                functools.partial(all_to_all_is_one_process, 5),
                functools.partial(eager_is_one_process, 7),
                three_dimensions,
                results_are_the_same_bits_again_and_on_every_rank,
                bytes_do_not_depend_on_the_length,
                autocast_and_flops,
                wrong_calls_are_refused_on_all_ranks,
            ],
        ),
        swept((2, [compiles_whole, functools.partial(compiles_whole, ("floor",))])),
        *(
            swept((world, [functools.partial(check, 1) for check in (
                linear_is_one_process, linear_with_a_floor_is_one_process, pooled_layer_is_one_process, ring_is_one_process,
                all_to_all_is_one_process, eager_is_one_process,
            )]))
            for world in (2, 4)
        ),
    ],
    ids=["2", "2 compiled", "2 all", "4 all"],
)  # fmt: skip
def test_ranks(world, checks, tmp_path):
    ranks.run(checks, world, tmp_path / "store")


def test_without_a_process_group():
    q = torch.randn(B, H, 4, D)
    with pytest.raises(ValueError, match="there is no process group"):
        distributed.linear_infsa(q, q, q)

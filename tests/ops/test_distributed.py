"""DTensor: two processes compute together what one computes alone, however the inputs are sharded."""

import functools
import itertools

import pytest
import torch
from helpers import ranks
from helpers.calls import OPS, raw_op
from helpers.framework_calls import DV, D
from helpers.sweep import swept
from torch.testing import assert_close

import infsa_kernels

# Both batch and heads divide by the number of processes.
B, H, N = 2, 4, 6
WORLD = 2
MASKS = ((), ("key_padding_mask",), ("query_padding_mask",), ("key_padding_mask", "query_padding_mask"))


def inputs():
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, H, N, d, dtype=torch.float64) for d in (D, D, DV))
    masks = {"key_padding_mask": torch.rand(B, N) < 0.3, "query_padding_mask": torch.rand(B, N) < 0.3}
    return {"q": q, "k": k, "v": v, "rho": torch.rand(H, dtype=torch.float64)}, masks


def forward_and_backward(op, tensors, masks, tied, wanted):
    leaves = {name: t.requires_grad_(name in wanted) for name, t in tensors.items()}
    q, k, v, rho = leaves.values()
    out = getattr(torch.ops.infsa, op)(q, q if tied else k, v, 1e-6, rho, **masks)
    out.square().sum().backward()
    return out, {name: t.grad for name, t in leaves.items() if t.grad is not None}


def placements_are_equivalent(mesh):
    """Every placement of the inputs and of rho, tied or not, with all masks and with some gradients only."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    batch, heads, sequence, features = map(Shard, range(4))
    everywhere = [batch, heads, sequence, features, Replicate()]
    cases = [(where, Replicate(), (), ("q", "k", "v", "rho")) for where in everywhere]
    cases += [(batch, Shard(0), masks, ("q", "k", "v", "rho")) for masks in MASKS]
    cases += [(heads, Shard(0), masks, wanted) for masks, wanted in zip(MASKS, ("qk", "v", "qv", ("rho",)))]
    for op, tied, (where, rho_where, mask_names, wanted) in itertools.product(OPS, (False, True), cases):
        tensors, masks = inputs()
        masks = {name: masks[name] for name in mask_names}
        sharded = {
            name: distribute_tensor(t.clone(), mesh, [rho_where if name == "rho" else where])
            for name, t in tensors.items()
        }
        mask_where = batch if where == batch else Replicate()
        sharded_masks = {name: distribute_tensor(m, mesh, [mask_where]) for name, m in masks.items()}
        out, grads = forward_and_backward(op, sharded, sharded_masks, tied, wanted)
        expected, expected_grads = forward_and_backward(op, tensors, masks, tied, wanted)

        assert_close(out.full_tensor(), expected)
        assert grads.keys() == expected_grads.keys()
        for name, grad in grads.items():
            assert_close(grad.full_tensor(), expected_grads[name])


def sharded_work_stays_where_it_is(mesh):
    """Batch and heads need no communication; a sharded sequence does not come back unsharded and unseen."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    tensors, _ = inputs()
    del tensors["rho"]
    for op, where in itertools.product(OPS, (Shard(0), Shard(1))):
        q, k, v = (distribute_tensor(t, mesh, [where]).requires_grad_() for t in tensors.values())
        with CommDebugMode() as communication:
            out = getattr(torch.ops.infsa, op)(q, k, v)
            grads = torch.autograd.grad(out, [q, k, v], torch.ones_like(out))
        assert communication.get_total_counts() == 0
        assert out.placements == (where,)
        assert all(grad.placements == (where,) for grad in grads)
    for op, tied in itertools.product(OPS, (False, True)):
        q, k, v = (distribute_tensor(t, mesh, [Shard(2)]).requires_grad_() for t in tensors.values())
        with CommDebugMode() as communication:
            out = getattr(torch.ops.infsa, op)(q, q if tied else k, v)
            grads = torch.autograd.grad(out, [q, v] if tied else [q, k, v], torch.ones_like(out))
        assert out.placements == (Replicate() if op == "linear" else Shard(2),)
        assert all(grad.placements == (Shard(2),) for grad in grads)
        if op == "linear":
            # Two sums forward; backward, where every rank has the gradient of the context, one.
            assert communication.get_total_counts() == 3


def sharded_sequences_of_any_length(mesh):
    """Uneven and empty shards, cross-attention, three dimensions, and a mask that hides NaN."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    for op, (N, M), unbatched in itertools.product(OPS, ((7, 5), (1, 3)), (False, True)):
        torch.manual_seed(0)
        heads = (B * H,) if unbatched else (B, H)
        q, k, v = (torch.randn(*heads, n, d, dtype=torch.float64) for n, d in ((N, D), (M, D), (M, DV)))
        rho = torch.rand(heads[-1], dtype=torch.float64)
        mask = torch.arange(M).expand(heads[0], M) == M - 1
        v[..., -1, :] = torch.nan
        leaves = [t.clone().requires_grad_() for t in (q, k, v, rho)]
        expected = getattr(torch.ops.infsa, op)(*leaves[:3], 1e-6, leaves[3], mask)
        expected_grads = torch.autograd.grad(expected.square().sum(), leaves)
        where = Shard(q.dim() - 2)
        placed = [distribute_tensor(t, mesh, [where]).requires_grad_() for t in (q, k, v)]
        placed.append(distribute_tensor(rho, mesh, [Replicate()]).requires_grad_())
        out = getattr(torch.ops.infsa, op)(*placed[:3], 1e-6, placed[3], distribute_tensor(mask, mesh, [Replicate()]))
        assert_close(out.full_tensor(), expected)
        grads = torch.autograd.grad(out.square().sum(), placed)
        for actual, truth in zip(grads, expected_grads):
            assert_close(actual.full_tensor(), truth)


def sharded_sequence_of_a_mesh(mesh):
    """Another mesh dimension has the batch, or the heads; two of them cannot share the sequence."""
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    tensors, _ = inputs()
    q, k, v = (tensors[n] for n in "qkv")
    grid = init_device_mesh("cpu", (1, WORLD), mesh_dim_names=("data", "sequence"))
    for op, first in itertools.product(OPS, (Shard(0), Shard(1))):
        placed = (distribute_tensor(t, grid, [first, Shard(2)]) for t in (q, k, v))
        assert_close(getattr(torch.ops.infsa, op)(*placed).full_tensor(), getattr(torch.ops.infsa, op)(q, k, v))
        with pytest.raises(TypeError, match="is no DTensor and others are"):
            getattr(torch.ops.infsa, op)(
                *(distribute_tensor(t, mesh, [Shard(2)]) for t in (q, k, v)), 1e-6, torch.ones(H)
            )
        with pytest.raises(NotImplementedError, match=r"sharded over 2 dimensions of the mesh \(data, sequence\)"):
            getattr(torch.ops.infsa, op)(*(distribute_tensor(t, grid, [Shard(2), Shard(2)]) for t in (q, k, v)))


def sharded_sequences_compile(mesh):
    from torch.distributed.tensor import Shard, distribute_tensor

    tensors, _ = inputs()
    q, k, v = (distribute_tensor(tensors[n], mesh, [Shard(2)]).requires_grad_() for n in "qkv")
    for op in OPS:
        function = getattr(torch.ops.infsa, op)
        outs = [f(q, k, v) for f in (torch.compile(function, backend="aot_eager"), function)]
        assert_close(*(out.full_tensor() for out in outs))
        grads = [torch.autograd.grad(out.square().sum(), [q, k, v]) for out in outs]
        for actual, expected in zip(*grads):
            assert_close(actual.full_tensor(), expected.full_tensor())


def raw_operators_are_sharded(mesh):
    from torch.distributed.tensor import Shard, distribute_tensor

    tensors, _ = inputs()
    q, k, v = (tensors[name] for name in "qkv")
    sharded = [distribute_tensor(t, mesh, [Shard(1)]) for t in (q, k, v)]
    for op in OPS:
        forward = raw_op(f"{op}_fwd", "eager")
        expected = forward(q, k, v, 1e-6, 0.9, None, None, None)
        for actual, truth in zip(forward(*sharded, 1e-6, 0.9, None, None, None), expected):
            assert actual.placements == (Shard(1),)
            assert_close(actual.full_tensor(), truth)
        with torch.no_grad(), infsa_kernels.backend("eager"):
            actual = getattr(torch.ops.infsa, op)(*sharded, 1e-6, 0.9)
        assert_close(actual.full_tensor(), expected[0])


def two_mesh_dimensions_and_uneven_shards(mesh):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    tensors, _ = inputs()
    tensors = {name: torch.cat([t, t[:1]]) for name, t in tensors.items() if name != "rho"}
    grid = init_device_mesh("cpu", (1, WORLD))
    for op, where in itertools.product(
        OPS, ((mesh, [Shard(0)]), (grid, [Shard(0), Shard(1)]), (grid, [Shard(1), Replicate()]))
    ):
        actual = getattr(torch.ops.infsa, op)(*(distribute_tensor(t, *where) for t in tensors.values()))
        assert_close(actual.full_tensor(), getattr(torch.ops.infsa, op)(*tensors.values()))


def pooled_layer_is_sharded(mesh):
    """A batch in shards with weights on every process; and heads of the queries in shards, as tensor parallelism has them."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    torch.manual_seed(0)
    sizes = {"x": (B, N, D), "q_weight": (H * 3, D), "v_weight": (H * 2, D), "out_weight": (5, H * 2)}
    tensors = {name: torch.randn(size, dtype=torch.float64) for name, size in sizes.items()}
    placements = [{"x": Shard(0)}, {"q_weight": Shard(0)}, {"x": Shard(1)}]

    def step(tensors, floor):
        leaves = {name: t.requires_grad_() for name, t in tensors.items()}
        out = infsa_kernels.pooled_linear_infsa(**leaves, num_heads=H, norm_eps=1e-5, score_floor=floor)
        out.square().sum().backward()
        return [out, *(t.grad for t in leaves.values())]

    for floor in (0.0, 0.3):
        expected = step({name: t.clone() for name, t in tensors.items()}, floor)
        for where in placements:
            placed = {n: distribute_tensor(t.clone(), mesh, [where.get(n, Replicate())]) for n, t in tensors.items()}
            for actual, truth in zip(step(placed, floor), expected):
                assert_close(actual.full_tensor(), truth)


def a_floor_is_sharded(mesh):
    """Of both operators that have one; the mean token, which has no heads, is the same on every shard of these."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    tensors, masks = inputs()
    del tensors["rho"]

    def step(q, k, v, mask):
        out = infsa_kernels.linear_infsa(q, k, v, key_padding_mask=mask, score_floor=0.3)
        return [out, *torch.autograd.grad(out.square().sum(), (q, k, v))]

    expected = step(*(t.requires_grad_() for t in tensors.values()), masks["key_padding_mask"])
    for where, of_mask in ((Shard(0), Shard(0)), (Shard(1), Replicate()), (Shard(2), Replicate())):
        q, k, v = (distribute_tensor(t.detach(), mesh, [where]).requires_grad_() for t in tensors.values())
        mask = distribute_tensor(masks["key_padding_mask"], mesh, [of_mask])
        with CommDebugMode() as communication:
            found = step(q, k, v, mask)
        # As without a floor: two sums forward and one backward, and the tokens stay.
        assert communication.get_total_counts() == (3 if where == Shard(2) else 0)
        for actual, truth in zip(found, expected):
            assert_close(actual.full_tensor(), truth)
    x, keys = torch.randn(B, N, D, dtype=torch.float64), torch.randn(B, H, D, dtype=torch.float64)
    forward = raw_op("score_pool_floor_fwd", "eager")
    sharded = distribute_tensor(x, mesh, [Replicate()]), distribute_tensor(keys, mesh, [Shard(1)])
    for actual, truth in zip(
        forward(*sharded, None, 1e-5, 1e-6, 0.3, None), forward(x, keys, None, 1e-5, 1e-6, 0.3, None)
    ):
        assert_close(actual.full_tensor(), truth)


def on_mesh(check):
    check(torch.distributed.device_mesh.init_device_mesh("cpu", (WORLD,)))


@pytest.mark.parametrize(
    "checks",
    [
        [
            placements_are_equivalent,
            sharded_work_stays_where_it_is,
            two_mesh_dimensions_and_uneven_shards,
            sharded_sequences_of_any_length,
            sharded_sequence_of_a_mesh,
            sharded_sequences_compile,
            pooled_layer_is_sharded,
            a_floor_is_sharded,
        ],
        swept([raw_operators_are_sharded]),  # in processes that have called no public operator before
    ],
    ids=["public", "raw"],
)
def test_two_processes(checks, tmp_path):
    ranks.run([functools.partial(on_mesh, check) for check in checks], WORLD, tmp_path / "store")

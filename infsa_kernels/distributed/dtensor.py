"""DTensors whose sequence is sharded: local tensors in, the functions of this package on them, DTensors out.

On the mesh dimension of the sequence, q, k, v and masks are taken as Shard(sequence). On every other one q says what is sharded,
batch or heads or nothing, and the other tensors follow. What is placed otherwise is redistributed, as DTensor does everywhere.
"""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from .linear import context_over_ranks, scaled
from .pooled_linear import sharded_pooled_linear
from .pure import sharded_pure


class Layout:
    """Where the parts of a call lie.

    Args:
        op: names the operator in errors.
        like: the tensor of the tokens that says it: q, or x.
        others: more tensors of tokens.
        sequence: the dimension of the tokens in all of these.
        heads: that of the heads, if there is one beside the batch's.
    """

    def __init__(self, op: str, like: DTensor, others: list, sequence: int, heads: int | None):
        self.op, self.mesh = op, like.device_mesh
        tensors = [like, *(t for t in others if isinstance(t, DTensor))]
        for t in tensors:
            if t.device_mesh != self.mesh:
                raise ValueError(
                    f"{op}: a DTensor is on {t.device_mesh}, expected {self.mesh}, where q is; use one mesh"
                )
        over = {at for t in tensors for at, where in enumerate(t.placements) if where == Shard(sequence)}
        if len(over) > 1:
            names = self.mesh.mesh_dim_names or range(self.mesh.ndim)
            raise NotImplementedError(
                f"{op}: the sequence is sharded over {len(over)} dimensions of the mesh "
                f"({', '.join(str(names[i]) for i in sorted(over))}), expected one: there is a group of ranks for one; flatten "
                "them, or replicate the sequence over the others"
            )
        (self.at,) = over
        self.group = self.mesh.get_group(self.at).group_name
        # Batch, heads or nothing, on every mesh dimension but that of the sequence.
        dims = (0,) if heads is None else (0, heads)
        self.rest = [where if any(where == Shard(d) for d in dims) else Replicate() for where in like.placements]

    def placements(self, on_sequence: Placement, batch: int | None = 0, heads: int | None = None) -> list[Placement]:
        """Of a tensor whose batch and heads are these of its dimensions, None where it has none of them."""

        def placed(where):
            if where == Replicate():
                return where
            dim = batch if where == Shard(0) else heads
            return Replicate() if dim is None else Shard(dim)

        found = [placed(where) for where in self.rest]
        found[self.at] = on_sequence
        return found

    def local(self, t: Tensor | None, placements: list[Placement], gradient: list[Placement] | None = None):
        if t is None:
            return None
        self.demand(t)
        t = t if list(t.placements) == placements else t.redistribute(placements=placements)
        return t.to_local(grad_placements=gradient or placements)

    def demand(self, t: Tensor) -> None:
        if not isinstance(t, DTensor):
            raise TypeError(
                f"{self.op}: a tensor of the call is no DTensor and others are, expected all of them; distribute_tensor() it, "
                "rho and masks too"
            )

    def of_parameter(self, t, placements: list[Placement]):
        """A tensor without tokens, and its gradient: every rank whose tokens or heads it met has a share."""
        shares = [
            place if place.is_shard() or (at != self.at and where == Replicate()) else Partial()
            for at, (where, place) in enumerate(zip(self.rest, placements))
        ]
        return self.local(t, placements, shares)

    def dtensor(self, local: Tensor, placements: list[Placement], shape: tuple[int, ...]) -> DTensor:
        stride = torch.empty(shape, device="meta").stride()
        if local.dim() == 4 and local.stride(1) < local.stride(2):
            B, H, N, d = shape
            stride = (N * H * d, d, H * d, 1)
        return DTensor.from_local(local, self.mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)


def attend(op: str, q, k, v, eps, rho, key_padding_mask, query_padding_mask, backend: str, *floor: float) -> DTensor:
    """`infsa::linear`, with a floor or without, or `infsa::pure` of DTensors."""
    tied, unbatched = k is q, q.dim() == 3
    sequence, heads = q.dim() - 2, None if unbatched else 1
    layout = Layout(f"infsa::{op}", q, [k, v], sequence, heads)
    if isinstance(rho, Tensor):
        layout.demand(rho)
    tokens = layout.placements(Shard(sequence), 0, heads)
    q_local, v_local = layout.local(q, tokens), layout.local(v, tokens)
    k_local = q_local if tied else layout.local(k, tokens)
    masks = [layout.local(m, layout.placements(Shard(1))) for m in (key_padding_mask, query_padding_mask)]
    if op == "linear":
        context = context_over_ranks(q_local, k_local, v_local, eps, *masks, layout.group, backend, *floor)
        context = layout.dtensor(
            context, layout.placements(Replicate(), 0, heads), (*q.shape[:-2], v.shape[-1])
        )  # fmt: skip
        return scaled(context, rho, q)
    if isinstance(rho, Tensor):
        # One rho of a head: heads are the first dimension here.
        of_heads = 0 if rho.dim() and rho.shape[0] > 1 else None
        where = layout.placements(Replicate(), of_heads if unbatched else None, of_heads)
        rho = layout.of_parameter(rho, where)
    out = sharded_pure.composite(q_local, k_local, v_local, eps, rho, *masks, layout.group, "", backend)
    return layout.dtensor(out, tokens, (*q.shape[:-1], v.shape[-1]))


class _GradientOnce(torch.autograd.Function):
    """A DTensor's gradient is whole on every rank; the operators here add up what the ranks give."""

    @staticmethod
    def forward(ctx, t, is_first):
        ctx.is_first = is_first
        return t.view_as(t)

    @staticmethod
    def backward(ctx, gradient):
        return gradient if ctx.is_first else torch.zeros_like(gradient), None


def pooled(x: DTensor, arguments: dict) -> DTensor:
    """`infsa::pooled_linear` of DTensors: tokens in shards, parameters on every rank."""
    layout = Layout("infsa::pooled_linear", x, [], 1, None)
    everywhere = [Replicate()] * layout.mesh.ndim
    given = dict(arguments)
    given["x"] = layout.local(x, layout.placements(Shard(1)))
    given["padding_mask"] = layout.local(given["padding_mask"], layout.placements(Shard(1)))
    given |= {
        n: layout.of_parameter(t, everywhere)
        for n, t in arguments.items()
        if isinstance(t, Tensor) and n not in ("x", "padding_mask")
    }
    y = sharded_pooled_linear.composite(**given, group=layout.group)
    y = _GradientOnce.apply(y, layout.mesh.get_local_rank(layout.at) == 0)
    return layout.dtensor(y, layout.placements(Replicate()), (x.shape[0], y.shape[1]))

"""Linear-InfSA of a sequence that lies on several ranks: O(H d) bytes sent, whatever its length.

forward    sum_i e_i u_i, sum_i e_i          of this rank's queries  -> sum over ranks -> qbar
           sum_j r_j v_j, sum_j r_j          of this rank's keys     -> sum over ranks -> z
backward   dz                                of this rank's loss     -> sum over ranks
           dk, dv, sum_j dt_j kappa_j        of this rank's keys     -> sum over ranks -> dqbar
           dq                                of this rank's queries

With a floor the second sum has sum_j v_j, sum_j |t_j| and the number of keys in it too.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..eager.common import acc_dtype
from ..ops import linear as dense
from ..ops import linear_floor, linear_steps, qkv
from ..ops.register import public
from .collectives import Group, name_of, sum_gradients, sum_over_ranks


def linear_infsa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rho: float | Tensor = 0.95,
    eps: float = 1e-6,
    key_padding_mask: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
    *,
    score_floor: float = 0.0,
    group: Group = None,
) -> Tensor:
    """:func:`infsa_kernels.linear_infsa` of a sequence whose tokens are sharded over the ranks of a group.

    Every rank of the group has to make the call, with its own tokens and equal B, H, d, dv and dtype. Shards may differ in length
    and be empty. Sent are two sums forward and two backward, O(B H (d + dv)) numbers in float64, whatever the length.

    Args:
        q, k, v, key_padding_mask, query_padding_mask: this rank's tokens, in the shapes of the dense operator.
        rho, eps, score_floor: the same on every rank.
        group: a process group, a one-dimensional DeviceMesh as ``mesh["sequence"]``, or None for all ranks.

    Returns:
        (B, H, N, dv) for this rank's N queries: an expanded view.

    Gradients are those of the sum of the losses of all ranks; that of ``rho``, as of any parameter that all ranks have, is this
    rank's share, which DistributedDataParallel, FSDP or an all-reduce adds up.

    Raises:
        ValueError, TypeError: as the dense operator; no process group. RuntimeError: a rank was lost.
    """
    name = name_of("infsa::linear", group)
    context = sharded_linear(q, k, v, eps, rho, key_padding_mask, query_padding_mask, name, score_floor=score_floor)
    return context.unsqueeze(-2).expand(*q.shape[:-1], context.shape[-1])


@public(
    "sharded_linear(Tensor q, Tensor k, Tensor v, float eps=1e-6, Tensor? rho=None, Tensor? key_padding_mask=None, "
    "Tensor? query_padding_mask=None, str group='', str backend='', float score_floor=0.0) -> Tensor",
    dense.TENSORS,
    raw=[linear_steps],
    cast=qkv.cast,
)
def sharded_linear(q, k, v, eps, rho, key_padding_mask, query_padding_mask, group, backend="", score_floor=0.0):
    """`torch.ops.infsa.sharded_linear`: the context (B, H, dv), or (B*H, dv), the same on every rank."""
    qkv.demand(linear_floor.raw, q, k, v, eps, rho, key_padding_mask, query_padding_mask, score_floor)
    context = context_over_ranks(q, k, v, eps, key_padding_mask, query_padding_mask, group, backend, score_floor)
    return scaled(sum_gradients(context, group), rho, q)


def context_over_ranks(
    q, k, v, eps, key_padding_mask, query_padding_mask, group: str, backend: str = "", score_floor: float = 0.0
) -> Tensor:
    """z / rho, (B, H, dv) or (B*H, dv), in the dtype of sums. Its gradient is taken as all ranks' sum, equal on all of them."""
    tied = k is q
    unbatched = q.dim() == 3
    if unbatched:
        q, k, v = q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)
    masks = key_padding_mask, query_padding_mask
    context = _Context.apply(q, None if tied else k, v, *masks, eps, score_floor, group, backend)
    return context.squeeze(1) if unbatched else context


def scaled(context: Tensor, rho: float | Tensor | None, q: Tensor) -> Tensor:
    """rho times the context, in the dtype of q."""
    if isinstance(rho, Tensor):
        rho = rho.to(context.dtype)
        rho = rho[:, None] if rho.dim() else rho
    return (context if rho is None else rho * context).to(q.dtype)


class _Context(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, key_padding_mask, query_padding_mask, eps, score_floor, group, backend):
        steps, acc = linear_steps.choose_steps(q, backend), acc_dtype(q)
        keys = q if k is None else k
        sums = sum_over_ranks(steps.queries_fwd(q, query_padding_mask), group)
        central_query, energy_sum = linear_steps.mean(sums, eps, acc)
        of_keys = keys, v, central_query, key_padding_mask
        if score_floor == 0:
            context, *sums = linear_steps.mean(sum_over_ranks(steps.keys_fwd(*of_keys), group), eps, acc)
        else:
            sums = torch.cat([steps.keys_floor_fwd(*of_keys), linear_steps.key_count(v, key_padding_mask)], -1)
            context, sums = linear_steps.floored_mean(sum_over_ranks(sums, group), score_floor, eps, acc)
        ctx.save_for_backward(
            q, k, v, key_padding_mask, query_padding_mask, context, central_query, energy_sum, *sums
        )  # fmt: skip
        ctx.constants = steps, eps, score_floor, group
        return context

    @staticmethod
    @once_differentiable
    def backward(ctx, dcontext):
        q, k, v, key_mask, query_mask, context, central_query, energy_sum, *sums = ctx.saved_tensors
        steps, eps, score_floor, group = ctx.constants
        want_q, want_k, want_v = ctx.needs_input_grad[:3]
        tied = k is None
        keys_bwd, numbers = (steps.keys_bwd, [eps]) if score_floor == 0 else (steps.keys_floor_bwd, [eps, score_floor])
        dk, dv, dcentral, *dscores = keys_bwd(
            dcontext, q if tied else k, v, context, central_query, *sums, *numbers, key_mask,
            [want_k, want_v, want_q, want_q and tied],
        )  # fmt: skip
        dq = None
        if want_q:
            dcentral = sum_over_ranks(dcentral, group)
            dscores = dscores if tied else (None, None)
            dq = steps.queries_bwd(dcentral, *dscores, q, central_query, energy_sum, eps, query_mask)
        return dq, dk if want_k else None, dv if want_v else None, *[None] * 6

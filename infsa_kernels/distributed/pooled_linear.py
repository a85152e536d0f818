"""The pooled layer of tokens that lie on several ranks: its two raw operators, each with a sum over ranks behind it.

A raw operator's forward gives a weighted mean of this rank's tokens and the sum of their weights; these make the mean of all.
Its backward needs the mean and the sum of all, and gives this rank's tokens theirs, and its share of what parameters get.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..ops import backends, central_query, linear_steps, score_pool, score_pool_floor
from ..ops import pooled_linear as dense
from ..ops.extension import torch_ops
from ..ops.register import public
from .collectives import Group, name_of, sum_over_ranks


def pooled_linear_infsa(
    x: Tensor, num_heads: int, q_weight: Tensor, v_weight: Tensor, out_weight: Tensor, *, group: Group = None, **options
) -> Tensor:
    """:func:`infsa_kernels.pooled_linear_infsa` of tokens that are sharded over the ranks of a group: O(H D) bytes sent.

    Args:
        x: this rank's tokens (B, N, D); shards may differ in length and be empty.
        group: a process group, a one-dimensional DeviceMesh as ``mesh["sequence"]``, or None for all ranks.
        options: the other arguments of the dense operator; ``padding_mask`` is this rank's, the rest the same on every rank.

    Returns:
        (B, D_out), the same on every rank.

    Gradients are those of the sum of the losses of all ranks; those of weights, biases and rho are this rank's share.

    Raises:
        ValueError, TypeError: as the dense operator; no process group. RuntimeError: a rank was lost.
    """
    required = x, q_weight, v_weight, out_weight, num_heads
    names = sharded_pooled_linear.signature.arguments[len(required) : -2]  # up to group
    given = {"rho": 0.95, "eps": 1e-6} | options
    score_floor = given.pop("score_floor", 0.0)
    if unknown := given.keys() - {*names}:
        raise TypeError(
            f"{dense.OP}: {min(unknown)} is given, expected arguments of infsa_kernels.pooled_linear_infsa only"
        )
    given["group"] = name_of(dense.OP, group)
    return sharded_pooled_linear(*required, *map(given.get, names), score_floor=score_floor)


def _cast(dtype_of, args, kwargs):
    return dense.cast(dtype_of, (), dict(zip(sharded_pooled_linear.signature.arguments, args)) | kwargs)


@public(
    "sharded_pooled_linear(Tensor x, Tensor q_weight, Tensor v_weight, Tensor out_weight, int num_heads, Tensor? q_bias=None, "
    "Tensor? k_weight=None, Tensor? k_bias=None, Tensor? v_bias=None, Tensor? out_bias=None, Tensor? rho=None, "
    "float eps=1e-6, Tensor? norm_weight=None, Tensor? norm_bias=None, float? norm_eps=None, Tensor? padding_mask=None, "
    "str group='', str backend='', float score_floor=0.0) -> Tensor",
    dense.TENSORS,
    raw=[central_query.raw, score_pool.raw, score_pool_floor.raw],
    cast=_cast,
)
def sharded_pooled_linear(
    x, q_weight, v_weight, out_weight, num_heads, q_bias=None, k_weight=None, k_bias=None, v_bias=None, out_bias=None,
    rho=None, eps=1e-6, norm_weight=None, norm_bias=None, norm_eps=None, padding_mask=None, group="", backend="",
    score_floor=0.0,
):  # fmt: skip
    """`torch.ops.infsa.sharded_pooled_linear`: the row (B, D_out)."""

    def over_ranks(name):
        def pool(x, keys, key_bias, norm_eps, eps, *more):
            return *_ScorePool.apply(x, keys, key_bias, norm_eps, eps, more[-1], score_floor, group, name), None

        return lambda *arguments: (_CentralQuery.apply(*arguments, group, name),), pool

    return dense.pooled_linear.composite(
        x, q_weight, v_weight, out_weight, num_heads, q_bias, k_weight, k_bias, v_bias, out_bias, rho, eps, norm_weight,
        norm_bias, norm_eps, padding_mask, backend, score_floor, over_ranks=over_ranks,
    )  # fmt: skip


def _mean_over_ranks(mean: Tensor, weights: Tensor, eps: float, group: str) -> tuple[Tensor, Tensor]:
    """From this rank's mean and sum of weights those of all tokens, in their dtype."""
    sums = torch.cat([mean * (weights[..., None].double() + eps), weights[..., None]], -1)
    mean, total = linear_steps.mean(sum_over_ranks(sums, group), eps, mean.dtype)
    return mean, total.to(mean.dtype)


def _backward_of(raw, name):
    return getattr(torch_ops, f"{raw.name}_bwd{backends.SUFFIXES[name]}").default


def _wanted(gradients, wanted, others):
    """Those of a raw operator's inputs, and of so many arguments that get none."""
    return *(t if want else None for t, want in zip(gradients, wanted)), *[None] * others


class _CentralQuery(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, norm_eps, eps, padding_mask, group, name):
        mean, weights = central_query.raw.forwards[name](x, weight, bias, norm_eps, eps, padding_mask)
        mean, weights = _mean_over_ranks(mean, weights, eps, group)
        ctx.save_for_backward(x, weight, bias, mean, weights, padding_mask)
        ctx.constants = norm_eps, eps, group, _backward_of(central_query.raw, name)
        return mean

    @staticmethod
    @once_differentiable
    def backward(ctx, dmean):
        *saved, padding_mask = ctx.saved_tensors
        norm_eps, eps, group, backward = ctx.constants
        wanted = list(ctx.needs_input_grad[:3])
        gradients = backward(sum_over_ranks(dmean, group), *saved, norm_eps, eps, padding_mask, wanted)
        return _wanted(gradients, wanted, 5)


class _ScorePool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, keys, key_bias, norm_eps, eps, padding_mask, score_floor, group, name):
        given = x, keys, key_bias, norm_eps, eps
        if score_floor == 0:
            raw, numbers = score_pool.raw, (norm_eps, eps)
            pooled, _, scores = raw.forwards[name](*given, padding_mask)
            pooled, scores = _mean_over_ranks(pooled, scores, eps, group)
            weights, saved = scores, [scores]
        else:
            raw, numbers = score_pool_floor.raw, (norm_eps, eps, score_floor)
            sums = score_pool_floor.sums_of_part(raw.forwards[name], *given, padding_mask)
            pooled, weights, saved = _floored_mean_over_ranks(sums, eps, score_floor, keys.dtype, group)
        ctx.save_for_backward(x, keys, key_bias, pooled, *saved, padding_mask)
        ctx.constants = numbers, group, _backward_of(raw, name)
        return pooled, weights / (weights + eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, dpooled, dmass):
        *saved, padding_mask = ctx.saved_tensors
        numbers, group, backward = ctx.constants
        wanted = list(ctx.needs_input_grad[:3])
        both = sum_over_ranks(torch.cat([dpooled, dmass[..., None]], -1), group)
        gradients = backward(
            both[..., :-1].contiguous(), both[..., -1].contiguous(), *saved, *numbers, padding_mask, wanted
        )  # fmt: skip
        return _wanted(gradients, wanted, 6)


def _floored_mean_over_ranks(sums: Tensor, eps: float, score_floor: float, dtype: torch.dtype, group: str):
    """From this rank's sums the mean of all tokens, the sum of their weights, and what backward takes of both on this rank."""
    count = sums[..., -1]
    pooled, (scores, absolute, token_mean, total) = linear_steps.floored_mean(
        sum_over_ranks(sums, group), score_floor, eps, dtype
    )
    # Backward divides score_floor T by this rank's tokens: they get their share of T, and the norm has the rest from R.
    share = absolute * count / total
    rest = scores + score_floor * (absolute - share)
    weights = (scores + score_floor * absolute).to(dtype)
    return pooled, weights, [rest.to(dtype), share.to(dtype), token_mean[:, 0].contiguous()]

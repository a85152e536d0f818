"""Tokens of a model on several ranks: which are whose, and what all ranks need of them."""

import itertools

import torch
import torch.distributed as dist
from torch import Tensor

from ..torch_private import not_compiled, process_group
from .collectives import differentiable_sum, gather_numbers, sum_over_ranks


def _rank(group: str) -> int:
    return dist.get_rank(process_group(group))


@not_compiled
def place_of_strip(rows: int, columns: int, rest: int, group: str, device: torch.device) -> tuple[int, int, bool]:
    """The rows of patches of the whole picture, how many of them lie above this rank's strip, and whether it is the first.

    Args:
        rest: pixels of a last row that is no whole patch.

    Raises:
        ValueError, on every rank: strips of different widths, or one that ends within a patch and is not the last.
    """
    everyones = gather_numbers([rows, columns, rest], group, device)
    widths = [columns for rows, columns, _ in everyones if rows]
    if len(set(widths)) > 1:
        raise ValueError(
            f"InfViT: the ranks have strips of {[c for _, c, _ in everyones]} patches across, expected one picture's; cut it by "
            "rows"
        )
    last = max((rank for rank, (rows, *_) in enumerate(everyones) if rows), default=0)
    for rank, (_, _, rest) in enumerate(everyones):
        if rest and rank != last:
            raise ValueError(
                f"InfViT: the strip of rank {rank} ends {rest} pixels into a row of patches, expected whole rows on every rank "
                "but the last; cut the picture at a multiple of patch_size"
            )
    above = [0, *itertools.accumulate(rows for rows, *_ in everyones)]
    return above[-1], above[_rank(group)], _rank(group) == 0


class _First(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens, group):
        ctx.group, ctx.shape = group, tokens.shape
        B, _, D = tokens.shape
        first = tokens[:, :1] if _rank(group) == 0 else tokens.new_zeros(B, 1, D)
        return sum_over_ranks(first, group)

    @staticmethod
    def backward(ctx, gradient):
        total = sum_over_ranks(gradient, ctx.group)
        gradient = total.new_zeros(ctx.shape)
        if _rank(ctx.group) == 0:
            gradient[:, :1] = total
        return gradient, None


def first_of(tokens: Tensor, group: str) -> Tensor:
    """The first token of the sequence, which the first rank has, on every rank: (B, 1, D)."""
    return _First.apply(tokens, group)


def mean_of(tokens: Tensor, group: str) -> Tensor:
    """The mean over all tokens, (B, D), on every rank."""
    acc = torch.promote_types(tokens.dtype, torch.float32)
    count = torch.full((tokens.shape[0], 1), tokens.shape[1], dtype=acc, device=tokens.device)
    sums = differentiable_sum(torch.cat([tokens.sum(1, dtype=acc), count], 1), group)
    return (sums[:, :-1] / sums[:, -1:]).to(tokens.dtype)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens, lengths, group):
        rank = _rank(group)
        ctx.group, ctx.mine = group, slice(sum(lengths[:rank]), sum(lengths[: rank + 1]))
        whole = tokens.new_zeros(tokens.shape[0], sum(lengths), *tokens.shape[2:])
        whole[:, ctx.mine] = tokens
        return sum_over_ranks(whole, group)

    @staticmethod
    def backward(ctx, gradient):
        return sum_over_ranks(gradient, ctx.group)[:, ctx.mine], None, None


def shard_lengths(tokens: int, group: str) -> list[int]:
    """How many tokens of a sequence each rank takes: about equal, the first ranks one more."""
    size = dist.get_world_size(process_group(group))
    return [tokens // size + (rank < tokens % size) for rank in range(size)]


def shard(tokens: Tensor, group: str) -> Tensor:
    """This rank's part of tokens (B, N, ...) that every rank has."""
    return tokens.split(shard_lengths(tokens.shape[1], group), 1)[_rank(group)]


def gather(tokens: Tensor, total: int, group: str) -> Tensor:
    """The way back: (B, total, ...) on every rank."""
    return _Gather.apply(tokens, shard_lengths(total, group), group)

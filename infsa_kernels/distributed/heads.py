"""Pure InfSA with the heads divided over the ranks: each gets the whole sequence of some heads, runs the dense operator, and
gives the result back by tokens. What travels is a rank's share of q, k, v and the output, once each."""

import itertools

import torch
import torch.distributed as dist
from torch import Tensor

from ..torch_private import process_group
from .collectives import sum_over_ranks, told


class Heads:
    """Who has which heads, and how many tokens.

    Args:
        queries, keys: how many each rank has.
        heads: of all ranks together.
    """

    def __init__(self, group: str, queries: list[int], keys: list[int], heads: int):
        self.name, self.group = group, process_group(group)
        self.queries, self.keys, self.rank = queries, keys, dist.get_rank(self.group)
        size = len(queries)
        first = [heads * rank // size for rank in range(size + 1)]
        self.slices = [slice(*bounds) for bounds in itertools.pairwise(first)]
        self.mine = self.slices[self.rank]

    def gather(self, t: Tensor, tokens: list[int]) -> Tensor:
        """(B, H, tokens of this rank, d) as (B, heads of this rank, all tokens, d)."""
        B, _, _, d = t.shape
        mine = self.mine.stop - self.mine.start
        pieces = self._all_to_all([t[:, heads] for heads in self.slices], [(B, mine, n, d) for n in tokens])
        return torch.cat(pieces, 2)

    def scatter(self, t: Tensor, tokens: list[int]) -> Tensor:
        """The way back."""
        B, _, _, d = t.shape
        n = tokens[self.rank]
        shapes = [(B, heads.stop - heads.start, n, d) for heads in self.slices]
        return torch.cat(self._all_to_all(list(t.split(tokens, 2)), shapes), 1)

    def gather_mask(self, mask: Tensor | None, tokens: list[int]) -> Tensor | None:
        """(B, tokens of this rank) as (B, all tokens)."""
        if mask is None:
            return None
        B, longest = mask.shape[0], max(tokens)
        mine = torch.zeros(B, longest, dtype=torch.uint8, device=mask.device)
        mine[:, : mask.shape[1]] = mask
        all_masks = [torch.empty_like(mine) for _ in tokens]
        with told(self.name):
            dist.all_gather(all_masks, mine, group=self.group)
        return torch.cat([m[:, :n] for m, n in zip(all_masks, tokens)], 1).bool()

    def of_mine(self, per_head: Tensor | None) -> Tensor | None:
        """(B, H) as (B, heads of this rank)."""
        return None if per_head is None else per_head[:, self.mine].contiguous()

    def of_all(self, per_head: Tensor, heads: int) -> Tensor:
        """(B, heads of this rank) as (B, H), 0 elsewhere."""
        out = per_head.new_zeros(per_head.shape[0], heads)
        out[:, self.mine] = per_head
        return out

    def _all_to_all(self, pieces: list[Tensor], shapes: list[tuple[int, ...]]) -> list[Tensor]:
        there = torch.cat([piece.reshape(-1) for piece in pieces])
        sizes = [torch.Size(shape).numel() for shape in shapes]
        here = there.new_empty(sum(sizes))
        with told(self.name):
            dist.all_to_all_single(here, there, sizes, [piece.numel() for piece in pieces], group=self.group)
        return [t.view(shape) for t, shape in zip(here.split(sizes), shapes)]


def forward(ops, q, k, v, eps, rho, head_rho, key_padding_mask, query_padding_mask, heads: Heads):
    tensors, masks = _whole(heads, q, k, v, key_padding_mask, query_padding_mask)
    out, norm = ops.forward(*tensors, eps, rho, heads.of_mine(head_rho), *masks)
    return heads.scatter(out, heads.queries), sum_over_ranks(heads.of_all(norm, q.shape[1]), heads.name)


def backward(
    ops, dout, q, k, v, out, norm, eps, rho, head_rho, key_padding_mask, query_padding_mask, heads: Heads, wanted
):  # fmt: skip
    tensors, masks = _whole(heads, q, k, v, key_padding_mask, query_padding_mask)
    dout, out = heads.gather(dout, heads.queries), heads.gather(out, heads.queries)
    want_q, want_k, want_v, want_rho = wanted
    dq, dk, dv, drho = ops.backward(
        dout, *tensors, out, heads.of_mine(norm), eps, rho, heads.of_mine(head_rho), *masks, wanted
    )  # fmt: skip
    return (
        heads.scatter(dq, heads.queries) if want_q else None,
        heads.scatter(dk, heads.keys) if want_k else None,
        heads.scatter(dv, heads.keys) if want_v else None,
        heads.of_all(drho, q.shape[1]) if want_rho else None,
    )


def _whole(heads, q, k, v, key_padding_mask, query_padding_mask):
    tensors = (
        heads.gather(q, heads.queries),
        None if k is None else heads.gather(k, heads.keys),
        heads.gather(v, heads.keys),
    )
    return tensors, (
        heads.gather_mask(key_padding_mask, heads.keys),
        heads.gather_mask(query_padding_mask, heads.queries),
    )

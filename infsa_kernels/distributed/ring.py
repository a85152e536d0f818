"""Pure InfSA with keys and values that travel around a ring of ranks, while every rank keeps its queries.

    forward    in each of P steps: the block P_b v_b of this rank's queries with the keys that are here, added to what the blocks
               before gave, under the norm of all of them; meanwhile the next keys arrive. ||P||_F in the end, one sum over ranks.
    backward   <dO, O> first, one sum over ranks; then the same steps. What a block gives to dk and dv follows its keys around
               the ring, and has come home after the last step.

The order of the steps is that of the ranks: results are the same bits in every run of as many ranks.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from ..eager.common import acc_dtype
from ..eager.pure import output_like
from ..torch_private import process_group
from .collectives import sum_over_ranks, told


class Ring:
    """The ranks of a group in a circle: messages go to the next one, and come from the one before.

    Args:
        keys: how many keys each rank has.
    """

    def __init__(self, group: str, keys: list[int]):
        self.name, self.group = group, process_group(group)
        self.rank, self.size, self.keys = dist.get_rank(self.group), len(keys), keys

    def origin(self, step: int) -> int:
        """The rank whose keys are here in a step."""
        return (self.rank - step) % self.size

    def exchange(self, there: Tensor, numel: int) -> "Arrival":
        """Starts to send a contiguous tensor on, and to receive one of its dtype with ``numel`` elements."""
        here = there.new_empty(numel)
        to, source = (dist.get_global_rank(self.group, (self.rank + turn) % self.size) for turn in (1, -1))
        # Nothing travels of what has no elements, and both ends know.
        transfers = [(dist.isend, there, to)] * (there.numel() > 0) + [(dist.irecv, here, source)] * (numel > 0)
        with told(self.name):
            ops = [dist.P2POp(way, t.view(-1), peer, self.group) for way, t, peer in transfers]
            return Arrival(self.name, here, there, dist.batch_isend_irecv(ops) if ops else [])

    def keys_and_values(self, k: Tensor, v: Tensor, mask: Tensor | None):
        """(step, k, v, mask) of every rank in turn, from this one's own on; the next are on their way meanwhile."""
        B, H, _, d = k.shape
        width = d + v.shape[3]
        packed = torch.cat([k.reshape(-1), v.reshape(-1)]) if self.size > 1 else None
        for step in range(self.size):
            last = step == self.size - 1
            if not last:
                M = self.keys[self.origin(step + 1)]
                arrival = self.exchange(packed, B * H * M * width)
                arrival_of_mask = None if mask is None else self.exchange(mask.to(torch.uint8).contiguous(), B * M)
            yield step, k, v, mask
            if not last:
                packed = arrival.wait()
                k, v = packed.split([B * H * M * d, B * H * M * (width - d)])
                k, v = k.view(B, H, M, d), v.view(B, H, M, width - d)
                mask = None if mask is None else arrival_of_mask.wait().view(B, M).bool()


class Arrival:
    """What a neighbour is sending; what goes to the other one is kept until it is there."""

    def __init__(self, group: str, here: Tensor, there: Tensor, works: list):
        self._group, self._here, self._there, self._works = group, here, there, works

    def wait(self) -> Tensor:
        with told(self._group):
            for work in self._works:
                work.wait()
        return self._here


def forward(blocks, q, k, v, eps, rho, head_rho, key_padding_mask, query_padding_mask, ring: Ring):
    acc = acc_dtype(q)
    out = output_like(q, v, acc).zero_()
    norm = q.new_zeros(q.shape[:2], dtype=torch.float64)
    for step, k_b, v_b, mask_b in ring.keys_and_values(q if k is None else k, v, key_padding_mask):
        tied = k is None and step == 0
        block, block_norm = blocks.fwd(q, None if tied else k_b, v_b, eps, mask_b, query_padding_mask)
        # Both are divided by norms of their own, and so never out of range.
        block_norm = block_norm.double()
        together = torch.hypot(norm, block_norm)
        out.mul_(_rows((norm + eps) / (together + eps), acc)).addcmul_(
            block, _rows((block_norm + eps) / (together + eps), acc)
        )
        norm = together
    total = sum_over_ranks(norm.square(), ring.name).sqrt()
    gain = rho * (norm + eps) / (total + eps)
    out.mul_(_rows(gain if head_rho is None else gain * head_rho, acc))
    return out.to(q.dtype), total.to(acc)


def backward(
    blocks, dout, q, k, v, out, norm, eps, rho, head_rho, key_padding_mask, query_padding_mask, ring: Ring, wanted
):  # fmt: skip
    tied = k is None
    want_q, want_k, want_v, want_rho = wanted
    want_k = want_q if tied else want_k
    acc = acc_dtype(q)
    dout = dout if query_padding_mask is None else dout.masked_fill(query_padding_mask[:, None, :, None], 0)
    dout_out = sum_over_ranks((dout.to(acc) * out.to(acc)).sum((-2, -1), dtype=torch.float64), ring.name)

    keys = q if tied else k
    dq = torch.zeros_like(q, dtype=acc) if want_q else None
    drho = norm.new_zeros(norm.shape) if want_rho else None
    B, H, _, d = keys.shape
    widths = [d * want_k, v.shape[3] * want_v]
    travelling = None
    for step, k_b, v_b, mask_b in ring.keys_and_values(keys, v, key_padding_mask):
        own = tied and step == 0
        dq_b, dk_b, dv_b, drho_b = blocks.bwd(
            dout, q, None if own else k_b, v_b, dout_out, norm, eps, rho, head_rho, mask_b, query_padding_mask,
            [want_q, want_k and not own, want_v, want_rho],
        )  # fmt: skip
        if want_q:
            dq += dq_b
        if want_rho:
            drho += drho_b
        # A tied block with itself has given dk to dq.
        dk_b = torch.zeros_like(k_b, dtype=acc) if own and want_k else dk_b
        given = torch.cat(
            [t.reshape(-1) for t, want in ((dk_b, want_k), (dv_b, want_v)) if want] or [norm.new_empty(0)]
        )
        given = given if travelling is None else travelling.wait() + given
        arriving = ring.keys[ring.origin(step + 1)]
        travelling = ring.exchange(given, B * H * arriving * sum(widths)) if ring.size > 1 else None
    if ring.size > 1:
        given = travelling.wait()
    M = ring.keys[ring.rank]
    dk, dv = given.split([B * H * M * width for width in widths])
    dk, dv = dk.view(keys.shape) if want_k else None, dv.view(v.shape) if want_v else None
    if tied and want_q:
        dq += dk
        dk = None
    return dq, dk, dv, drho


def _rows(per_head: Tensor, dtype: torch.dtype) -> Tensor:
    return per_head.to(dtype)[..., None, None]

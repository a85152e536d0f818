"""Partial sums of Linear, added up between two launches where every program of the second would else read many of them.

A head group of S splits has S programs, and what they read is S x S partial sums: with 683 splits of 4 heads of 16, 127 MB for
the 8 MB of Q. The programs here read each of them once, one program a head. A ticket in the first launch, whose last program
adds up, would not save a launch: before it something has to set the ticket to 0. Here no program waits for another.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, maker, padded
from .tokens import store_part, sum_of_splits

# 16 elements a thread, as Linear's other kernels.
WARPS, ELEMENTS = 8, 8 * 32 * 16


@triton.jit(do_not_specialize=["H", "splits"])
def linear_fold_kernel(
    parts, energy_parts, totals, energy,  # (B, H, splits, d), (B, H, splits) or None, (B, H, d), (B, H) or None
    H, splits, d: tl.constexpr, D: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    b, heads = pid // H, pid % H + tl.arange(0, 1)
    store_part(totals, sum_of_splits(parts, b, heads, H, 0, splits, splits, d, D, 1, BT), b, heads, H, 0, 1, d, D)
    if energy_parts is not None:
        total = sum_of_splits(energy_parts, b, heads, H, 0, splits, splits, 1, 1, 1, BT)
        store_part(energy, total, b, heads, H, 0, 1, 1, 1)


class Fold:
    """Adds up the partial sums (B, H, splits, d) of every head, and where there are any those (B, H, splits), in their order."""

    def __init__(self, B: int, H: int, splits: int, d: int, device: torch.device):
        D = padded(d)
        self._new_totals, self._new_energy = maker(device, torch.float32, B, H, d), maker(device, torch.float32, B, H)
        self._launch = Launch(
            linear_fold_kernel, B * H, device, H, splits, d=d, D=D, BT=max(1, ELEMENTS // D), num_warps=WARPS
        )

    def __call__(self, parts: Tensor, energy_parts: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        totals, energy = self._new_totals(), None if energy_parts is None else self._new_energy()
        self._launch(parts, energy_parts, totals, energy)
        return totals, energy

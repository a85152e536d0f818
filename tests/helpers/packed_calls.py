"""Calls of the packed operators as data: `Call` with the tokens of all sequences one behind another."""

from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

import infsa_kernels
from helpers.calls import REFERENCE, Call, accumulation

# With a floor under its scores linear has raw operators of its own.
PACKED_OPS = ("linear", "linear_floor", "pure")
FLOOR = 0.3

H, D, DV = 3, 16, 24

# Empty ones first, amid the others and last; one query, one key; more than a block of either backend.
LENGTHS = (0, 5, 1, 0, 0, 33, 300, 2, 0)
KEY_LENGTHS = (0, 4, 0, 3, 0, 40, 257, 1, 0)


def offsets(lengths, dtype=torch.int32, device="cpu") -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=dtype, device=device)


@dataclass
class PackedCall(Call):
    """The arguments of `infsa::<op>_varlen`; k and key_lengths are None where k is tied to q."""

    lengths: tuple[int, ...] = LENGTHS
    key_lengths: tuple[int, ...] | None = None
    index: torch.dtype = torch.int32

    @property
    def raw_name(self) -> str:
        return f"{self.op}_varlen_floor" if self.score_floor else f"{self.op}_varlen"

    def sequences(self) -> tuple:
        """cu_seqlens_q, cu_seqlens_k, max_q, max_k; the first two are one tensor where k is tied."""
        queries = offsets(self.lengths, self.index, self.q.device)
        keys = queries if self.k is None else offsets(self.key_lengths, self.index, self.q.device)
        return queries, keys, max(self.lengths, default=0), max(self.key_lengths or self.lengths, default=0)

    def run(self) -> Tensor:
        k = self.q if self.k is None else self.k
        return self.operator()(self.q, k, self.v, *self.sequences(), self.eps, self.rho)

    def operator(self):
        return partial(self.overload(), **self.by_name())

    def overload(self):
        overload = "default" if isinstance(self.rho, Tensor) else "scalar_rho"
        return getattr(getattr(torch.ops.infsa, f"{self.op}_varlen"), overload)

    def function(self):
        return partial(getattr(infsa_kernels, f"{self.op}_infsa_varlen"), **self.by_name())

    def reference(self, dtype: torch.dtype) -> Tensor:
        call = self.to(dtype)
        found = []
        for queries, keys in call.spans():
            q, v = _heads(call.q[queries]), _heads(call.v[keys])
            out = REFERENCE[call.op](
                q, q if call.k is None else _heads(call.k[keys]), v, call.rho, call.eps, **self.by_name()
            )
            found.append(out[0].transpose(0, 1) if call.op == "pure" else out)
        # Of no sequence, nothing that depends on anything.
        return (
            torch.cat(found) if found else 0 * sum(t.sum() for t in call.tensors().values()).expand(self.output_shape())
        )

    def spans(self) -> list[tuple[slice, slice]]:
        queries, keys, _, _ = (t.tolist() if isinstance(t, Tensor) else t for t in self.sequences())
        return [(slice(*queries[s : s + 2]), slice(*keys[s : s + 2])) for s in range(len(queries) - 1)]

    def output_shape(self) -> tuple[int, ...]:
        return (self.q.shape[0] if self.op == "pure" else len(self.lengths), self.q.shape[1], self.v.shape[2])

    def output_gradient(self) -> Tensor:
        return torch.randn(self.output_shape(), dtype=self.q.dtype, device=self.q.device)

    def raw(self) -> tuple:
        rho, head_rho = self.rho, None
        if isinstance(rho, Tensor):
            sizes = len(self.lengths), self.q.shape[1]
            head_rho, rho = rho.detach().to(accumulation(self.q.dtype)).expand(sizes), 1.0
        queries, keys, *longest = self.sequences()
        keys = None if self.k is None else keys
        numbers = self.eps, *self.by_name().values(), rho
        return self.q, self.k, self.v, queries, keys, *longest, *numbers, head_rho


def make(
    op, device="cpu", *, tied=False, lengths=LENGTHS, key_lengths=KEY_LENGTHS, dtype=torch.float32, d=D, dv=DV, heads=H, **options
) -> PackedCall:  # fmt: skip
    """`op` is one of PACKED_OPS."""
    if op == "linear_floor":
        op, options = "linear", {"score_floor": FLOOR} | options

    def tokens(count, width):
        return torch.randn(count, heads, width, dtype=dtype, device=device)

    key_lengths = None if tied else key_lengths
    options = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}
    N, M = sum(lengths), sum(lengths if tied else key_lengths)
    return PackedCall(
        op, tokens(N, d), None if tied else tokens(M, d), tokens(M, dv), lengths=tuple(lengths), key_lengths=key_lengths,
        **options,
    )  # fmt: skip


def _heads(t: Tensor) -> Tensor:
    """(N, H, d) as (1, H, N, d)."""
    return t.transpose(0, 1)[None]

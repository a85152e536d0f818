"""Packed sequences in torch operations: the dense operator on one sequence after another.

Where sequences begin is read from ``cu_seqlens``: on a GPU the CPU waits for it, once per call.
"""

from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from . import linear as dense_linear
from . import linear_floor as dense_linear_floor
from . import pure as dense_pure


class EachSequence:
    """The kernels of a packed operator from those of its dense one.

    Args:
        dense: an eager module, with ``forward`` and ``backward``.
        per_token: whether its output has a row per token, or one per head.
        saved: how many outputs of forward backward takes.
    """

    def __init__(self, dense: ModuleType, per_token: bool, saved: int):
        self.dense, self.per_token, self.saved = dense, per_token, saved

    def forward(self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, *numbers):
        *numbers, head_rho = numbers  # eps, those that the dense operator takes beside, rho
        S, (N, H, _), dv = cu_seqlens_q.shape[0] - 1, q.shape, v.shape[2]
        out = q.new_empty(N if self.per_token else S, H, dv)
        # What a call of no tokens returns has the shapes and dtypes of all.
        like = self.dense.forward(*(_heads(t[:0]) for t in (q, q, v)), *numbers, None, None, None)[1:]
        statistics = [t.new_empty(S, *t.shape[1:]) for t in like]
        for s, queries, keys in _sequences(cu_seqlens_q, cu_seqlens_k):
            k_s = None if k is None else _heads(k[keys])
            found, *rest = self.dense.forward(
                _heads(q[queries]), k_s, _heads(v[keys]), *numbers, _of(head_rho, s), None, None
            )
            self._output(out, s, queries).copy_(found)
            for t, row in zip(statistics, rest):
                t[s] = row[0]
        return out, *statistics

    def backward(self, dout, q, k, v, *rest):
        saved = rest[: self.saved]
        cu_seqlens_q, cu_seqlens_k, _, _, *numbers, head_rho, gradients = rest[self.saved :]
        if self.per_token:
            out, *saved = saved
        for s, queries, keys in _sequences(cu_seqlens_q, cu_seqlens_k):
            k_s = None if k is None else _heads(k[keys])
            of_sequence = [self._output(out, s, queries)] if self.per_token else []
            of_sequence += [_of(t, s) for t in saved]
            dq, dk, dv, dhead_rho = gradients
            self.dense.backward(
                self._output(dout, s, queries), _heads(q[queries]), k_s, _heads(v[keys]), *of_sequence, *numbers,
                _of(head_rho, s), None, None,
                [_rows(dq, queries), _rows(dk, keys), _rows(dv, keys), _of(dhead_rho, s)],
            )  # fmt: skip

    def _output(self, t: Tensor, s: int, queries: slice) -> Tensor:
        return _heads(t[queries]) if self.per_token else _of(t, s)


def _sequences(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None) -> Iterator[tuple[int, slice, slice]]:
    queries = cu_seqlens_q.tolist()
    keys = queries if cu_seqlens_k is None else cu_seqlens_k.tolist()
    for s in range(len(queries) - 1):
        yield s, slice(queries[s], queries[s + 1]), slice(keys[s], keys[s + 1])


def _heads(t: Tensor) -> Tensor:
    """Tokens (N, H, d) as (1, H, N, d), a view."""
    return t.transpose(0, 1).unsqueeze(0)


def _rows(t: Tensor | None, tokens: slice) -> Tensor | None:
    return None if t is None else _heads(t[tokens])


def _of(t: Tensor | None, s: int) -> Tensor | None:
    """What there is of one sequence, of what there is per sequence."""
    return None if t is None else t[s : s + 1]


def sequence_of_token(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """The number of the sequence that each of so many packed tokens belongs to."""
    at = torch.arange(tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.bucketize(at, cu_seqlens[1:].contiguous(), right=True)


def padded(x: Tensor, cu_seqlens: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """Packed tokens (N, H, d) as a padded batch (S, H, longest, d), and its padding (S, longest). No value is read."""
    at = cu_seqlens[:-1, None] + torch.arange(longest, device=x.device)
    padding = at >= cu_seqlens[1:, None]
    rows = torch.cat((x, x.new_zeros(1, *x.shape[1:])))[at.masked_fill(padding, x.shape[0])]
    return rows.transpose(1, 2), padding


linear = EachSequence(dense_linear, per_token=False, saved=4)
linear_floor = EachSequence(dense_linear_floor, per_token=False, saved=6)
pure = EachSequence(dense_pure, per_token=True, saved=2)

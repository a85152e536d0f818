"""Packed sequences in Triton: which sequence a program works on, and on which of its tokens.

Packed tokens are a batch of one, (1, H, N, d), and sequence s is what lies from cu_seqlens[s] to cu_seqlens[s + 1]: the kernels
of the dense operators run on it, between other bounds. Where nothing is packed cu_seqlens is None, and these functions are gone.

The tokens of each sequence are cut into tiles of T, and tiles are numbered: cu_seqlens[s] // T + s is the first of sequence s. It
has as many numbers as tiles, at least one, and at most one to spare; together there are N // T + S. So the size of a grid and of
scratch follows from shapes, nobody waits to read an offset, and padding, of which there is none, costs nothing. A program looks
its sequence up, by halves, in cu_seqlens. Whose number is to spare ends there.

Offsets are not checked on a GPU. Each is clamped into the tensor: those that are wrong give wrong numbers, and nothing outside
is read or written.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from .launch import LARGEST_COUNT


@triton.jit
def begin_of(cu_seqlens, s, size):
    """Where sequence s of ``size`` tokens in all begins, or the last one ends."""
    return tl.minimum(tl.maximum(tl.load(cu_seqlens + s), 0), size).to(tl.int32)


@triton.jit
def span_of(cu_seqlens, s, size):
    """Where the tokens of s begin and end: all ``size`` of a sample where nothing is packed."""
    if cu_seqlens is None:
        begin, end = 0, size
    else:
        begin = begin_of(cu_seqlens, s, size)
        end = tl.maximum(begin, begin_of(cu_seqlens, s + 1, size))
    return begin, end


@triton.jit
def tiles_of_sequence(cu_seqlens, s, size, tile, tiles):
    """The number of its first tile, and how many it has, at least one; of a sample, 0 and ``tiles``."""
    if cu_seqlens is None:
        first, count = 0, tiles
    else:
        begin, end = span_of(cu_seqlens, s, size)
        first, count = begin // tile + s, tl.maximum(1, tl.cdiv(end - begin, tile))
    return first, count


@triton.jit
def sequence_of_tile(cu_seqlens, sequences, number, size, tile, b):
    """The sequence of the tile of this number, and which of its tiles that is; in a sample b, the number itself."""
    if cu_seqlens is None:
        s, own = b, number
    else:
        # first tile of s <= number < first tile of last; and a sequence before has one number at least.
        s = tl.maximum(0, number - size // tile)
        last = tl.minimum(sequences, number + 1)
        while last - s > 1:
            middle = (s + last) // 2
            before = begin_of(cu_seqlens, middle, size) // tile + middle <= number
            s = tl.where(before, middle, s)
            last = tl.where(before, last, middle)
        own = tl.maximum(0, number - begin_of(cu_seqlens, s, size) // tile - s)
    return s, own


@dataclass(frozen=True)
class Packing:
    """What is known of packed sequences on the host."""

    op: str  # "infsa::linear_varlen", for errors
    sequences: int
    longest: int  # at least the tokens of the longest one, on either side

    @classmethod
    def of(cls, op: str, q: Tensor, cu_seqlens_q: Tensor, max_q: int, max_k: int) -> "Packing":
        """Raises ValueError where there are more heads, of all sequences, than the kernels count."""
        sequences, heads = cu_seqlens_q.shape[0] - 1, q.shape[1]
        if sequences * heads > LARGEST_COUNT:
            raise ValueError(
                f"{op}: S * H is {sequences * heads}, the Triton kernels take up to {LARGEST_COUNT}; split the call or use the "
                "eager backend"
            )
        return cls(op, sequences, max(max_q, max_k))


def tiles_of_all(tokens: int, tile: int, packing: Packing | None) -> int:
    """How many tiles there are numbers for: of every sample, or of all packed sequences together."""
    return triton.cdiv(tokens, tile) if packing is None else tokens // tile + packing.sequences


def as_batch(t: Tensor | None) -> Tensor | None:
    """Packed tokens (N, H, d) as a batch of one, (1, H, N, d), a view."""
    return None if t is None else t.transpose(0, 1).unsqueeze(0)


def gradients_as_batch(gradients) -> tuple[Tensor | None, ...]:
    """dq, dk, dv and dhead_rho, the first three like this."""
    *of_tokens, dhead_rho = gradients
    return *map(as_batch, of_tokens), dhead_rho


def offsets(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both as kernels read them; the keys' are the queries' where they are None."""
    cu_seqlens_q = cu_seqlens_q.contiguous()
    return cu_seqlens_q, cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k.contiguous()

"""Calls of Linear and Pure whose results are known, for the check before a kernel's first use (first_use.py)."""

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..ops import launch_bound
from . import configs
from .known_calls import MARGIN, Known, dtype_of, rounding
from .tiles import describable

# Of Linear's calls the one whose partial sums are added up by a launch of their own.
FOLDING = 2

# Batch and heads of a call.
HEADS = (2, 4)


@dataclass(frozen=True)
class Variant:
    """What is compiled to machine code of its own, as far as a call decides it."""

    op: str  # "linear", "linear_floor", "pure" or one of PACKED
    direction: str  # "forward" or "backward"
    dtype: str
    precision: str  # of products of float32
    d: int
    dv: int
    tied: bool
    masked: str  # which sides have a mask: "", "keys", "queries" or "keys and queries"
    token_major: bool  # q is a view of [B, N, H, d]
    described: bool  # tiles come by descriptor, which the copy engine reads
    offsets: str = ""  # the dtype of those of packed sequences
    backend: str = "triton"  # or "cuda"

    @property
    def packed(self) -> bool:
        return bool(self.offsets)

    def __str__(self) -> str:
        words = [f"infsa::{self.op} {self.direction}", self.dtype, f"head dimensions {self.d} and {self.dv}"]
        words += ["tied"] * self.tied + [f"masked {self.masked}"] * bool(self.masked)
        words += ["token-major" if self.token_major else "head-major"]
        words += [self.precision] if self.dtype == "float32" else []
        words += [f"{self.offsets} offsets"] if self.packed else []
        words += ["descriptors"] * self.described + ["CUDA C++"] * (self.backend == "cuda")
        return ", ".join(words)


# In the order of the operators' masks, which those of packed sequences do not have.
SIDES = ("keys", "queries")
PACKED = ("linear_varlen", "linear_varlen_floor", "pure_varlen")

# Sequences beside the one whose length is checked: tokens of queries and of keys. An odd number of queries, so that no score is
# 0; of the pairs of 3 tokens alone Pure makes <dO, O> from the scores.
AMONG = ((0, 2), (33, 34), (0, 0), (3, 3))


def usual(device: torch.device) -> list[Variant]:
    """The operators as attention layers call them: d = 64, token-major."""
    described = configs.arch_of(device) in configs.DESCRIBED
    found = [
        Variant(
            op, direction, dtype, "ieee" if dtype == "float32" else "", 64, 64, tied, masked, True,
            described and op == "pure" and not masked and dtype != "float32", "int32" if op in PACKED else "",
        )
        for op, direction, dtype, tied, masked in itertools.product(
            ("linear", "linear_floor", "pure", *PACKED), ("forward", "backward"), ("bfloat16", "float16", "float32"),
            (True, False), ("", " and ".join(SIDES)),
        )
        if not (masked and op in PACKED)
    ]  # fmt: skip
    compiled = ("linear", "linear_floor") if launch_bound.sizes_on(device) else ()
    return found + [replace(variant, backend="cuda") for variant in found if variant.op in compiled]


def of(op: str, direction: str, arguments) -> Variant:
    """The variant of a call."""
    forward = direction == "forward"
    q, k, v = arguments[:3] if forward else arguments[1:4]
    masks = () if op in PACKED else arguments[-2:]
    read = [t for t in (q, k, v, None if forward else arguments[0]) if t is not None]
    dtype = dtype_of(q)
    tokens, heads = (0, 1) if op in PACKED else (2, 1)
    return Variant(
        op, direction, dtype, configs.precision(q) if dtype == "float32" else "", q.shape[-1], v.shape[-1], k is None,
        " and ".join(side for side, mask in zip(SIDES, masks) if mask is not None), q.stride(heads) < q.stride(tokens),
        op == "pure" and describable(masks, None, *read),
        next((dtype_of(t) for t in arguments if isinstance(t, Tensor) and not t.is_floating_point()), "") if op in PACKED else "",
    )  # fmt: skip


def calls(variant: Variant, device: torch.device) -> Iterator[Known]:
    """The calls of a check. All heads have the same content."""
    # The compiled kernels read rows 16 bytes at a time where they may, and element by element behind a gap: both are checked.
    gaps = [(0,), (1,)] if variant.backend == "cuda" else [(0, 1, 2)]
    for number, (lengths, gap) in enumerate(itertools.product(_lengths(variant, device), gaps)):
        folding = number == FOLDING and variant.backend == "triton"
        yield Known(
            f"{lengths[0]} queries and {lengths[1]} keys",
            _arguments(variant, device, *lengths, torch.Generator("cpu").manual_seed(number), gap),
            configs.always_folding if folding else contextlib.nullcontext,
        )


def alone(variant: Variant, arguments: list) -> list:
    """The arguments of the same call of one head."""
    return [one_head(variant, x) for x in arguments]


def _lengths(variant: Variant, device: torch.device) -> list[tuple]:
    """Queries and keys of the calls: three tiles and one row, and a whole number of tiles. Packed, one such amid others."""
    found = _lengths_of_one(variant, device)
    if not variant.packed:
        return found
    among = [(N, N) for N, _ in AMONG] if variant.tied else list(AMONG)
    return [tuple(zip(*among[:1], one, *among[1:])) for one in found]


def _lengths_of_one(variant: Variant, device: torch.device) -> list[tuple[int, int]]:
    if not variant.op.startswith("pure"):
        # Short sequences are one program's, long ones are cut into runs. An odd number of queries, so that no score is 0.
        # Dense ones once more, with a launch of its own for their partial sums, as far longer ones have.
        odd = 3 * 32 + 1, *[2 * configs.WHOLE + 1] * (1 if variant.packed or variant.backend == "cuda" else 2)
        return [(N, N if variant.tied else N - 1) for N in odd]
    like = torch.empty(1, 1, 1, max(variant.d, variant.dv), dtype=getattr(torch, variant.dtype), device=device)
    kernels = ("fwd",)
    if variant.direction == "backward":
        kernels = ("bwd_tied",) if variant.tied and like.element_size() == 2 else ("bwd_queries", "bwd_keys")
    tiles = [configs.pure(like, like, kernel, variant.described) for kernel in kernels]
    tile = max(max(tile.block_m, tile.block_n) for tile in tiles)
    odd, whole = 3 * tile + 1, 2 * tile
    return [(odd, odd), (whole, whole)] if variant.tied else [(odd, whole), (whole, odd)]


def _arguments(variant: Variant, device: torch.device, N, M, random: torch.Generator, gaps=(0,)) -> list:
    """Of the forward pass, from q on, with the floor after eps. All heads have the same content.

    Packed, N and M are the tokens of each sequence.
    """
    if variant.packed:
        return _packed_arguments(variant, device, N, M, random)
    ignored = [
        torch.arange(length, device="cpu") % 4 == 2 if side in variant.masked else None
        for side, length in zip(("queries", "keys"), (N, M))
    ]
    rows = _rows(variant, N, M, random)
    if variant.tied:
        # A row that a mask leaves out on one side alone takes part on the other.
        both = None if None in ignored else ignored[0] & ignored[1]
        unread = both, both, ignored[1]
    else:
        unread = *ignored, ignored[1]
    rows = [x if mask is None else x.masked_fill(mask[:, None], torch.nan) for x, mask in zip(rows, unread)]
    masks = [None if mask is None else mask.expand(*HEADS[:1], -1).contiguous().to(device) for mask in ignored[::-1]]
    head_rho = torch.full(HEADS, 0.75, dtype=torch.float32, device=device)
    # Rows of a length that the copy engine cannot step over are read through pointers.
    for gap in gaps:
        q, k, v = (_amid_nan(x.to(device), gap, variant.token_major, HEADS) for x in rows)
        arguments = [q, None if variant.tied else k, v, *_numbers(variant), head_rho, *masks]
        if of(variant.op, "forward", arguments).described == variant.described:
            break
    return arguments


def _packed_arguments(variant: Variant, device: torch.device, queries, keys, random: torch.Generator) -> list:
    heads = HEADS[1]
    q, k, v = (
        _amid_nan(x.to(device), 0, variant.token_major, (1, heads))[0].transpose(0, 1)
        for x in _rows(variant, sum(queries), sum(keys), random)
    )
    cu_seqlens = [
        torch.tensor([0, *itertools.accumulate(lengths)], dtype=getattr(torch, variant.offsets), device=device)
        for lengths in (queries, keys)
    ]
    head_rho = torch.full((len(queries), heads), 0.75, dtype=torch.float32, device=device)
    k, cu_seqlens[1] = (None, None) if variant.tied else (k, cu_seqlens[1])
    return [q, k, v, *cu_seqlens, max(queries), max(keys), *_numbers(variant), head_rho]


def _numbers(variant: Variant) -> list[float]:
    """eps, the floor where there is one, and rho."""
    return [2.0**-20, 0.125, 1.0] if variant.op.endswith("floor") else [2.0**-20, 1.0]


def _rows(variant: Variant, N: int, M: int, random: torch.Generator) -> list[Tensor]:
    """Queries, keys and values of one head."""
    queries, keys = (_odd_rows(length, variant, random) for length in (N, M))
    values = torch.randint(-4, 5, (M, variant.dv), generator=random, device="cpu")
    return [x.to(getattr(torch, variant.dtype)) for x in (queries, keys, values)]


def _odd_rows(length: int, variant: Variant, random: torch.Generator) -> Tensor:
    """Rows of an odd number of 1 and -1, whose products are odd: no score is 0, where either side of the ReLU would be right."""
    rows = torch.randint(0, 2, (length, variant.d), generator=random, device="cpu") * 2 - 1
    rows[:, variant.d - 1 + variant.d % 2 :] = 0
    return rows


def _amid_nan(rows: Tensor, gap: int, token_major: bool, heads: tuple[int, int]) -> Tensor:
    """rows (N, d) as every head of (B, H, N, d), each with NaN before it, after it, and in the gap after each row."""
    B, H = heads
    N, d = rows.shape
    sizes = (B, N + 2 * MARGIN, H, d + gap) if token_major else (B, H, N + 2 * MARGIN, d + gap)
    around = rows.new_full(sizes, torch.nan)
    inside = (around.transpose(1, 2) if token_major else around)[:, :, MARGIN : MARGIN + N, :d]
    return inside.copy_(rows)


def backward(variant: Variant, arguments: list, plain) -> list:
    """The arguments of the backward pass after that forward pass, which torch operations make, once for all heads."""
    q, k, v, *rest = arguments
    one, *saved = plain.forward(*(one_head(variant, x) for x in arguments))
    dout = (torch.arange(one.numel(), device=q.device) % 3 - 1).to(q.dtype).view(one.shape)

    def every_head(t):
        return t.expand(*(t.shape[:1] if variant.packed else HEADS[:1]), HEADS[1], *t.shape[2:]).contiguous()

    out, dout, *saved = map(every_head, (one, dout, *saved))
    return [dout, q, k, v, *([out] if variant.op.startswith("pure") else []), *saved, *rest]


def one_head(variant: Variant, x, name: str = ""):
    """What of an argument or a result belongs to the first head, of all packed sequences or of the first sample."""
    if not isinstance(x, Tensor) or x.dim() == 1:
        return x
    if variant.packed:
        return x[:, :1]
    return x[:1] if x.dtype == torch.bool else x[:1, :1]


def tolerance(variant: Variant, result: Tensor) -> float:
    """How far a result may be off, as a share of its largest element."""
    return rounding(variant.precision, result)

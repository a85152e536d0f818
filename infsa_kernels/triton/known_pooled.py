"""Calls of the pooled layer's operators whose results are known, for the check before a kernel's first use (first_use.py)."""

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from . import central_query, configs, score_pool
from .known_calls import MARGIN, Known, dtype_of, raw_of, rounding

OPS = ("central_query", "score_pool", "score_pool_floor")

# Samples of a call, which have the same content, as all heads have.
SAMPLES = 2


@dataclass(frozen=True)
class Variant:
    """What is compiled to machine code of its own, as far as a call decides it."""

    op: str  # one of OPS
    direction: str  # "forward" or "backward"
    dtype: str
    precision: str  # of products of float32
    heads: int
    d: int  # of central_query
    width: int  # D, channels of a token
    biased: bool
    normalised: bool
    masked: bool
    dense: bool  # channels lie side by side
    large: bool  # tiles of central_query, for so many tokens

    backend = "triton"  # there is no other

    def __str__(self) -> str:
        words = [f"infsa::{self.op} {self.direction}", self.dtype, f"{self.width} channels", f"{self.heads} heads"]
        words[-1] += f" of {self.d}" * bool(self.d)
        words += ["with a bias"] * self.biased + ["normalised"] * self.normalised + ["masked"] * self.masked
        words += ([] if self.dense else ["channels apart"]) + ["large tiles"] * self.large
        return ", ".join([*words, *([self.precision] if self.dtype == "float32" else [])])


def usual(device: torch.device) -> list[Variant]:
    """The operators as attention layers call them: 16 heads of 64, after LayerNorm."""
    return [
        Variant(
            op, direction, dtype, "ieee" if dtype == "float32" else "", 16, 64 if op == "central_query" else 0, 1024,
            True, True, masked, True, large,
        )
        for op, direction, dtype, masked, large in itertools.product(
            OPS, ("forward", "backward"), ("bfloat16", "float16", "float32"), (False, True), (False, True)
        )
        if not large
        or (op == "central_query" and dtype != "float32" and configs.arch_of(device) in central_query.LARGE_ON[direction])
    ]  # fmt: skip


def of(op: str, direction: str, arguments) -> Variant:
    """The variant of a call."""
    raw = raw_of(op)
    given = dict(zip((raw.forward if direction == "forward" else raw.backward).arguments, arguments))
    x, weight = given["x"], given.get("weight")
    dtype = dtype_of(x)
    return Variant(
        op, direction, dtype, configs.precision(x) if dtype == "float32" else "",
        *(given["keys"].shape[1], 0) if weight is None else weight.shape[:2], x.shape[2],
        given["key_bias" if weight is None else "bias"] is not None, given["norm_eps"] is not None,
        given["padding_mask"] is not None, x.stride(2) == 1,
        weight is not None and central_query.Tiling(x, weight, direction).large,
    )  # fmt: skip


def calls(variant: Variant, device: torch.device) -> Iterator[Known]:
    """The calls of a check."""
    around = functools.partial(central_query.tiles, variant.large)
    for number, tokens in enumerate(_lengths(variant, device)):
        random = torch.Generator("cpu").manual_seed(number)
        yield Known(f"{tokens} tokens", _arguments(variant, device, tokens, random), around)


def alone(variant: Variant, arguments: list) -> list:
    """The arguments of the same call in torch operations, which take all heads: the gradient of a token sums over them."""
    return arguments


def _lengths(variant: Variant, device: torch.device) -> list[int]:
    """Three tiles and one token, a whole number of tiles, and so many that every program has several."""
    dtype = getattr(torch, variant.dtype)
    x = torch.empty(SAMPLES, 1, variant.width, dtype=dtype, device=device)
    if variant.op == "central_query":
        with central_query.tiles(variant.large):
            weight = x.new_empty(variant.heads, variant.d, variant.width)
            tiling = central_query.Tiling(x, weight, variant.direction)
        tile, (splits, _) = tiling.rows, tiling.splits(SAMPLES, 1 << 30, device)
    else:
        launches = score_pool.Calls(x, variant.heads, 0.0 if variant.normalised else None)
        tile, (splits, _) = launches.pooling["BM"], launches.splits(SAMPLES, 1 << 30)
    return [3 * tile + 1, 2 * tile, 2 * splits * tile + 1]


def _arguments(variant: Variant, device: torch.device, tokens: int, random: torch.Generator) -> list:
    """Of the forward pass. Every product of a token is a whole number that the dtype of x holds."""
    D, dtype = variant.width, getattr(torch, variant.dtype)
    signs = torch.randint(0, 2, (tokens, D // 2), generator=random, device="cpu") * 2 - 1
    rows = torch.cat([signs, -signs, torch.zeros(tokens, D % 2, dtype=signs.dtype, device="cpu")], 1).float()
    norm_eps = None
    if variant.normalised:
        # Of mean 3, and with norm_eps of variance 4: normalised they are the signs again.
        rows, norm_eps = 3 + 2 * rows, 4.0 / D * (D % 2)
    mask = None
    if variant.masked:
        ignored = torch.arange(tokens, device="cpu") % 4 == 2
        rows = rows.masked_fill(ignored[:, None], torch.nan)
        mask = ignored.expand(SAMPLES, -1).contiguous().to(device)
    x = _amid_nan(rows.to(dtype), variant.dense, device)
    of_heads = _projection if variant.op == "central_query" else _keys
    floor = [0.125] if variant.op.endswith("floor") else []
    # An eps of the size of the sums, so that the mass has a gradient.
    return [x, *of_heads(variant, device, random), norm_eps, float(tokens), *floor, mask]


def _keys(variant: Variant, device: torch.device, random: torch.Generator) -> list[Tensor | None]:
    """Keys and their biases, the same of every head: of sum 0, which is taken off where tokens are normalised."""
    signs = torch.randint(-2, 3, (variant.width // 2,), generator=random, device="cpu")
    key = torch.cat([signs, -signs.flip(0), torch.zeros(variant.width % 2, dtype=signs.dtype, device="cpu")]).float()
    keys = key.expand(SAMPLES, variant.heads, -1).contiguous().to(device)
    return [keys, torch.full(keys.shape[:2], 1.0, dtype=torch.float32, device=device) if variant.biased else None]


def _projection(variant: Variant, device: torch.device, random: torch.Generator) -> list[Tensor | None]:
    """Weights and biases, the same of every head: few whole numbers in a row, so that 16 bits hold their sums."""
    d, D = variant.d, variant.width
    weight = torch.randint(-1, 2, (d, D), generator=random, device="cpu")
    every = -(-D // 128)
    weight *= (torch.arange(D, device="cpu") + torch.arange(d, device="cpu")[:, None]) % every == 0
    bias = torch.randint(-3, 4, (d,), generator=random, device="cpu").float().expand(variant.heads, -1).contiguous()
    weight = weight.to(getattr(torch, variant.dtype)).expand(variant.heads, -1, -1).contiguous()
    return [weight.to(device), bias.to(device) if variant.biased else None]


def _amid_nan(rows: Tensor, dense: bool, device: torch.device) -> Tensor:
    """rows (N, D) as every sample of (B, N, D), with NaN before and behind, and between channels that are apart."""
    N, D = rows.shape
    around = torch.full((SAMPLES, N + 2 * MARGIN, D, 1 if dense else 2), torch.nan, dtype=rows.dtype, device=device)
    return around[:, MARGIN : MARGIN + N, :, 0].copy_(rows)


def backward(variant: Variant, arguments: list, plain) -> list:
    """The arguments of the backward pass after that forward pass, which torch operations make."""
    raw = raw_of(variant.op)
    results = dict(zip(raw.forward.results, plain.forward(*arguments)))
    given = dict(zip(raw.forward.arguments, arguments)) | results
    for name in raw.backward.arguments:
        if (t := results.get(name[1:])) is not None:
            if name == "dmass":  # so large that what a bias of keys gets does not cancel
                given[name] = torch.full_like(t, 16.0)
                continue
            row = torch.arange(t.shape[2], device=t.device) % 3 - 1
            row[len(row) // 2 :] *= -1  # as those of a token are: products with it are not all 0
            given[name] = row.float().expand_as(t).contiguous()
    return [given[name] for name in raw.backward.arguments[:-1]]


def one_head(variant: Variant, t: Tensor, name: str) -> Tensor:
    """What of a result belongs to the first head of the first sample, if it has both: others are sums, partly made by torch."""
    raw = raw_of(variant.op)
    letters = (raw.forward if variant.direction == "forward" else raw.backward).tensors[name].letters
    return t[:1, :1] if letters[:2] == ("B", "H") else t


def tolerance(variant: Variant, result: Tensor) -> float:
    """How far a result may be off, as a share of its largest element."""
    if variant.op != "central_query" and variant.direction == "backward":
        # The gradients of scores are no integers, cancel in part, and in bfloat16 multiply with 16 digits.
        return max(2.0**-15, rounding(variant.precision, result))
    return rounding(variant.precision, result)

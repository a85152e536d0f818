"""`score_pool` in Triton: scores of tokens against one key of width D per head, and the tokens pooled by them.

Of all tokens' scores only those of a block of tokens exist, in float32. A block fits the L2 cache, so that of the passes over x
only the first reads memory. Tiles and splits leave partial sums, added up in their order: the bits never depend on timing.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..eager import score_pool as eager
from . import configs
from .launch import Launch, all_countable, ceil_div, maker, padded, planned, strides
from .score_pool_kernels import ALIGNED, pool_kernel, score_gradients_kernel, scores_kernel, token_gradient_kernel
from .token_rows import plan_statistics

# Bytes of the tokens of a block: half of the L2 cache of most GPUs.
BLOCK_BYTES = 1 << 24

# What a product multiplies -> what it makes -> most heads at a time -> tokens, channels, warps and stages: large tiles
# of which no kernel spills registers. No GPU has measured any.
TILES = {
    "bf16": {
        "scores": {32: (64, 64, 4, 3), 64: (64, 64, 8, 2)},
        "pooled": {32: (32, 128, 4, 3), 64: (32, 64, 4, 2)},
        "dx": {32: (64, 64, 4, 1), 64: (64, 64, 8, 1)},
    },
    "tf32": {
        "scores": {32: (64, 32, 4, 3), 64: (64, 32, 8, 2)},
        "pooled": {32: (32, 64, 4, 3), 64: (32, 64, 8, 2)},
        "dx": {32: (32, 64, 4, 1), 64: (32, 64, 8, 1)},
    },
    "ieee": {"scores": {16: (32, 32, 4, 1)}, "pooled": {16: (32, 32, 4, 1)}, "dx": {16: (32, 32, 4, 1)}},
}

# In place of these where no matrix instruction takes 64 rows.
SHORT = {
    "bf16": {"scores": {32: (64, 64, 4, 3), 64: (32, 32, 4, 2)}, "pooled": {32: (32, 128, 4, 3), 64: (64, 64, 8, 2)}},
    "tf32": {
        "scores": {16: (64, 32, 4, 3), 64: (32, 32, 4, 2)},
        "pooled": {32: (32, 64, 4, 3), 64: (32, 64, 4, 2)},
        "dx": {32: (32, 64, 4, 1), 64: (32, 32, 8, 1)},
    },
    "ieee": {"dx": {16: (32, 32, 8, 1)}},
}


class Block(NamedTuple):
    """Some samples and tokens of a call, or all."""

    samples: slice
    tokens: slice
    all: bool

    def of(self, t: Tensor | None) -> Tensor | None:
        """This block of a tensor of samples and tokens, ..."""
        return t if t is None or self.all else t[self.samples, self.tokens]

    def of_samples(self, t: Tensor | None) -> Tensor | None:
        """... or of one of samples."""
        return t if t is None or self.all else t[self.samples]


def blocks(x: Tensor) -> list[Block]:
    B, N, D = x.shape
    most = max(1, BLOCK_BYTES // (D * x.element_size()))
    together = min(B, max(1, most // N))
    return [
        Block(slice(sample, sample + together), slice(token, token + most), together == B and most >= N)
        for sample in range(0, B, together)
        for token in range(0, N, most)
    ]


class Calls:
    """The launches of calls of one kind: tiles chosen by registers and bytes of shared memory, measured on no GPU."""

    def __init__(self, x: Tensor, H: int, norm_eps: float | None):
        B, N, D = x.shape
        all_countable("infsa::score_pool", {"N": N, "D": D, "B * H": B * H})
        self.H, self.D, self.dtype, self.device, self.norm_eps = H, D, x.dtype, x.device, norm_eps
        self.parts = 1 if x.dtype == torch.float32 else 2
        precision = "tf32" if x.dtype == torch.float16 else configs.precision(x)
        products = "bf16" if x.dtype == torch.bfloat16 else precision
        HP = min(padded(H, 16), 16 if products == "ieee" else 64)
        self.groups = ceil_div(H, HP)
        self.heads = self.groups * HP
        self.options = {"D": self.D, "HP": HP, "PARTS": self.parts, "PRECISION": precision}
        tiles = TILES[products] | (SHORT[products] if configs.arch_of(x.device) in ("sm_80", "sm_120") else {})
        self.over_tokens, self.pooling, self.writing = (
            dict(zip(("BM", "BK", "num_warps", "num_stages"), next(tile for most, tile in sizes.items() if most >= HP)))
            for sizes in (tiles["scores"], tiles["pooled"], tiles["dx"])
        )
        self.pooling |= configs.all_registers(x)

    def parts_of(self, t: Tensor) -> Tensor:
        """(B, H, D) in float32 as the kernels take it: (B, PARTS, H, D), D rounded up; of mean 0 if tokens are, as theirs is only
        rounding."""
        t = t if self.norm_eps is None else t - t.mean(-1, keepdim=True)
        if missing := -self.D % ALIGNED.value:
            t = torch.nn.functional.pad(t, (0, missing))
        t = t.contiguous()
        if self.parts == 1:
            return t[:, None]
        if self.dtype == torch.bfloat16:
            high = t.bfloat16()
            return torch.stack([high, _rest(t, high).bfloat16()], 1)
        high = (t.view(torch.int32) & -8192).view(torch.float32)
        return torch.stack([high, _rest(t, high)], 1)

    def maker(self, *shape: int) -> Callable[[], Tensor]:
        return maker(self.device, torch.float32, *shape)

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float32, device=self.device)

    def tiles(self, N: int) -> int:
        """Of scores, and so partial sums of them."""
        return ceil_div(N, self.over_tokens["BM"])

    def splits(self, B: int, N: int) -> tuple[int, int]:
        """How many runs of how many tokens are pooled: two waves of programs."""
        chunks, steps = ceil_div(self.D, self.pooling["BK"]), ceil_div(N, self.pooling["BM"])
        most = max(1, 2 * configs.multiprocessors(self.device) // (B * chunks * self.groups))
        split_tokens = ceil_div(steps, min(most, steps)) * self.pooling["BM"]
        return ceil_div(N, split_tokens), split_tokens

    def over_scores(self, kernel, block: Tensor, mask: Tensor | None) -> Launch:
        """Of a kernel over tiles of tokens and all their channels."""
        B, N, _ = block.shape
        tiles = self.tiles(N)
        return Launch(
            kernel, B * tiles * self.groups, self.device, block.stride(), strides(mask, 2), self.H, N, tiles,
            **self.options, **self.over_tokens,
        )  # fmt: skip

    def pool(self, block: Tensor, mask: Tensor | None, total: bool = False) -> Callable[..., tuple]:
        """(block, scores, statistics, mask) -> sum_j scores_jh x^_j, (B, H, D), and with ``total`` sum_j x^_j, (B, D)."""
        B, N, D = block.shape
        chunks, (splits, split_tokens) = ceil_div(D, self.pooling["BK"]), self.splits(B, N)
        new_pooled_parts, new_token_parts = self.maker(B, splits, self.H, D), self.maker(B, splits, D)
        launch = Launch(
            pool_kernel, B * splits * chunks * self.groups, self.device, block.stride(), strides(mask, 2), self.H, N, splits,
            split_tokens, **self.options, **self.pooling,
        )  # fmt: skip

        def pool(block, scores, statistics, mask):
            pooled_parts, token_parts = new_pooled_parts(), new_token_parts() if total else None
            launch(block, scores, statistics, mask, pooled_parts, token_parts)
            return pooled_parts.sum(1), token_parts.sum(1) if total else None

        return pool

    def token_gradient(self, block: Tensor, mask: Tensor | None, dx: Tensor) -> Launch:
        """Of the kernel that writes the gradients of tokens."""
        B, N, D = block.shape
        chunks, tiles = ceil_div(D, self.writing["BK"]), ceil_div(N, self.writing["BM"])
        return Launch(
            token_gradient_kernel, B * tiles * chunks, self.device, block.stride(), dx.stride(), strides(mask, 2), self.H, N,
            tiles, **self.options, **self.writing,
        )  # fmt: skip

    def of_heads(self, parts: Tensor | None) -> Tensor | None:
        """Partial sums of tiles, (B, tiles, heads), added up: (B, H)."""
        return None if parts is None else (parts if self.heads == self.H else parts[..., : self.H]).sum(1)


def _rest(t: Tensor, high: Tensor) -> Tensor:
    """What rounding left: of what is infinite nothing."""
    return (t - high).nan_to_num_(0.0, torch.inf, -torch.inf)


def plan_sums(
    x: Tensor, keys: Tensor, key_bias: Tensor | None, norm_eps: float | None, padding_mask: Tensor | None, floored: bool
) -> Callable[..., tuple]:
    """(x, keys, key_bias, padding_mask) -> sum_j r_j x^_j (B, H, D), sum_j r_j (B, H) and, for a floor, sum_j |t_j| (B, H) and
    sum_j x^_j (B, D), None without."""
    B, calls = x.shape[0], Calls(x, keys.shape[1], norm_eps)
    found = [(b, _plan_sums_of_block(calls, b.of(x), b.of(padding_mask), floored)) for b in blocks(x)]

    def run(x, keys, key_bias, padding_mask):
        parts, key_bias = calls.parts_of(keys), None if key_bias is None else key_bias.contiguous()
        totals = None
        for block, sums in found:
            of_block = sums(block.of(x), block.of_samples(parts), block.of_samples(key_bias), block.of(padding_mask))
            if block.all:
                return of_block
            if totals is None:
                totals = tuple(None if t is None else calls.zeros(B, *t.shape[1:]) for t in of_block)
            for total, t in zip(totals, of_block):
                if t is not None:
                    total[block.samples] += t
        return totals

    return run


def _plan_sums_of_block(calls: Calls, x: Tensor, mask: Tensor | None, floored: bool) -> Callable[..., tuple]:
    B, N, _ = x.shape
    statistics_of = None if calls.norm_eps is None else plan_statistics(x, calls.norm_eps, mask)
    new_scores, new_score_parts = calls.maker(B, N, calls.heads), calls.maker(B, calls.tiles(N), calls.heads)
    score, pool = calls.over_scores(scores_kernel, x, mask), calls.pool(x, mask, floored)

    def sums(x, keys, key_bias, mask):
        statistics = None if statistics_of is None else statistics_of(x, mask)
        scores, score_parts, absolute_parts = new_scores(), new_score_parts(), new_score_parts() if floored else None
        score(x, keys, key_bias, statistics, mask, scores, score_parts, absolute_parts)
        weighted, tokens = pool(x, scores, statistics, mask)
        return weighted, calls.of_heads(score_parts), calls.of_heads(absolute_parts), tokens

    return sums


def plan_gradients(
    gradients: tuple[Tensor | None, ...], x: Tensor, keys: Tensor, norm_eps: float | None, padding_mask: Tensor | None
) -> Callable[..., None]:
    """(gradients, dpooled, offset, floor, dabsolute, x, keys, key_bias, padding_mask): fills those gradients that are given.

    Args of what it returns:
        gradients: dx, dkeys and dkey_bias.
        dpooled: that of the operator by what its sums are divided by, (B, H, D).
        offset: what a score's gradient owes to that divisor, (B, H).
        floor, dabsolute: what a floor adds to every score, and the gradient of \\|t\\|, (B, H) both or None.
    """
    dx, *of_keys = gradients
    calls, wanted = Calls(x, keys.shape[1], norm_eps), [t is not None for t in of_keys]
    found = [(b, _plan_gradients_of_block(calls, b.of(x), b.of(padding_mask), b.of(dx), *wanted)) for b in blocks(x)]

    def run(gradients, dpooled, offset, floor, dabsolute, x, keys, key_bias, padding_mask):
        dx, *of_keys = gradients
        key_parts, dpooled_parts = calls.parts_of(keys), calls.parts_of(dpooled)
        per_head = [None if t is None else t.contiguous() for t in (key_bias, offset, floor, dabsolute)]
        given = key_parts, dpooled_parts, *per_head
        for block, fill in found:
            parts = fill(block.of(x), block.of(padding_mask), block.of(dx), *map(block.of_samples, given))
            for total, part in zip(of_keys, parts):
                if total is None:
                    continue
                if block.tokens.start == 0:
                    block.of_samples(total).copy_(part)
                else:
                    block.of_samples(total).add_(part)

    return run


def _plan_gradients_of_block(
    calls: Calls, x: Tensor, mask: Tensor | None, dx: Tensor | None, wants_keys: bool, wants_bias: bool
) -> Callable[..., tuple]:
    """(x, mask, dx, keys, dpooled, key_bias, offset, floor, dabsolute) -> what a block gives to dkeys and dkey_bias."""
    B, N, _ = x.shape
    statistics_of = None if calls.norm_eps is None else plan_statistics(x, calls.norm_eps, mask)
    new_scores, new_dbias_parts = calls.maker(B, N, calls.heads), calls.maker(B, calls.tiles(N), calls.heads)
    new_along = None if dx is None or calls.norm_eps is None else calls.maker(B, N, calls.groups)
    differentiate = calls.over_scores(score_gradients_kernel, x, mask)
    write = None if dx is None else calls.token_gradient(x, mask, dx)
    pool = calls.pool(x, mask) if wants_keys else None

    def fill(x, mask, dx, keys, dpooled, *per_head):
        statistics = None if statistics_of is None else statistics_of(x, mask)
        dscores, weights = new_scores(), None if write is None else new_scores()
        along = None if new_along is None else new_along()
        dbias_parts = new_dbias_parts() if wants_bias else None
        differentiate(x, keys, dpooled, *per_head, statistics, mask, weights, dscores, along, dbias_parts)
        if write is not None:
            write(weights, dscores, dpooled, keys, x, statistics, along, mask, dx)
        of_keys = None if pool is None else pool(x, dscores, statistics, mask)[0]
        return of_keys, calls.of_heads(dbias_parts)

    return fill


@planned
def forward(x, keys, key_bias, norm_eps, eps, padding_mask):
    if 0 in (*x.shape, *keys.shape):
        return eager.forward
    sums = plan_sums(x, keys, key_bias, norm_eps, padding_mask, False)

    def run(x, keys, key_bias, norm_eps, eps, padding_mask):
        weighted, score_sum, *_ = sums(x, keys, key_bias, padding_mask)
        R = score_sum + eps
        return weighted / R[..., None], score_sum / R, score_sum

    return run


@planned
def backward(dpooled, dmass, x, keys, key_bias, pooled, score_sum, norm_eps, eps, padding_mask, gradients):
    if 0 in (*x.shape, *keys.shape):
        return eager.backward
    fill = plan_gradients(gradients, x, keys, norm_eps, padding_mask)

    def run(dpooled, dmass, x, keys, key_bias, pooled, score_sum, norm_eps, eps, padding_mask, gradients):
        of_sums = eager.gradient_of_sums(dpooled, dmass, pooled, score_sum, eps)
        fill(gradients, *of_sums, None, None, x, keys, key_bias, padding_mask)

    return run

"""`score_pool` in Triton: scores of tokens against one key of width D per head, and the tokens pooled by them.

Of all tokens' scores only those of a block of tokens exist, in float32. A block fits the L2 cache, so that of the passes over x
only the first reads memory. Tiles and splits leave partial sums, added up in their order: the bits never depend on timing.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..eager import score_pool as eager
from . import configs
from .launch import all_countable, ceil_div, kept_launch, padded, strides
from .score_pool_kernels import ALIGNED, pool_kernel, score_gradients_kernel, scores_kernel, token_gradient_kernel
from .token_rows import statistics_of

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


class Calls:
    """The launches of one call: tiles chosen by registers and bytes of shared memory, measured on no GPU."""

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
        t = torch.nn.functional.pad(t, (0, -self.D % ALIGNED.value))
        if self.parts == 1:
            return t.contiguous()[:, None]
        halves = self.dtype == torch.bfloat16
        high = t.bfloat16().float() if halves else (t.contiguous().view(torch.int32) & -8192).view(torch.float32)
        # Of what is infinite nothing remains.
        parts = torch.stack([high, torch.where(t == high, 0, t - high)], 1)
        return parts.bfloat16() if halves else parts

    def blocks(
        self, x: Tensor, padding_mask: Tensor | None
    ) -> Iterator[tuple[slice, slice, Tensor, Tensor | None, Tensor | None]]:
        """Samples, tokens, and of these x, the mask and the statistics."""
        B, N, D = x.shape
        most = max(1, BLOCK_BYTES // (D * x.element_size()))
        together = min(B, max(1, most // N))
        for sample in range(0, B, together):
            for token in range(0, N, most):
                samples, tokens = slice(sample, sample + together), slice(token, token + most)
                block = x[samples, tokens]
                mask = None if padding_mask is None else padding_mask[samples, tokens]
                statistics = None if self.norm_eps is None else statistics_of(block, self.norm_eps, mask)
                yield samples, tokens, block, mask, statistics

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)

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

    def scores(self, kernel, block: Tensor, mask: Tensor | None, *tensors: Tensor | None) -> None:
        """Starts a kernel over tiles of tokens and all their channels."""
        B, N, _ = block.shape
        tiles = self.tiles(N)
        start = kept_launch(
            kernel, B * tiles * self.groups, self.device, block.stride(), strides(mask, 2), self.H, N, tiles,
            **self.options, **self.over_tokens,
        )  # fmt: skip
        start(block, *tensors)

    def pool(
        self, block: Tensor, scores: Tensor, statistics: Tensor | None, mask: Tensor | None, total: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """sum_j scores_jh x^_j, (B, H, D), and with ``total`` sum_j x^_j, (B, D)."""
        B, N, D = block.shape
        chunks, (splits, split_tokens) = ceil_div(D, self.pooling["BK"]), self.splits(B, N)
        pooled_parts = self.empty(B, splits, self.H, D)
        token_parts = self.empty(B, splits, D) if total else None
        start = kept_launch(
            pool_kernel, B * splits * chunks * self.groups, self.device, block.stride(), strides(mask, 2), self.H, N, splits,
            split_tokens, **self.options, **self.pooling,
        )  # fmt: skip
        start(block, scores, statistics, mask, pooled_parts, token_parts)
        return pooled_parts.sum(1), token_parts.sum(1) if total else None

    def token_gradient(self, block: Tensor, mask: Tensor | None, dx: Tensor, *tensors: Tensor | None) -> None:
        B, N, D = block.shape
        chunks, tiles = ceil_div(D, self.writing["BK"]), ceil_div(N, self.writing["BM"])
        start = kept_launch(
            token_gradient_kernel, B * tiles * chunks, self.device, block.stride(), dx.stride(), strides(mask, 2), self.H, N,
            tiles, **self.options, **self.writing,
        )  # fmt: skip
        start(*tensors, mask, dx)


def sums(
    x: Tensor, keys: Tensor, key_bias: Tensor | None, norm_eps: float | None, padding_mask: Tensor | None, floored: bool
) -> tuple[Tensor, ...]:
    """sum_j r_j x^_j (B, H, D), sum_j r_j (B, H) and, for a floor, sum_j |t_j| (B, H) and sum_j x^_j (B, D)."""
    B, _, D = x.shape
    H = keys.shape[1]
    calls = Calls(x, H, norm_eps)
    parts, key_bias = calls.parts_of(keys), None if key_bias is None else key_bias.contiguous()
    weighted, score_sum, absolute_sum, token_sum = calls.zeros(B, H, D), *(calls.zeros(B, n) for n in (H, H, D))
    for samples, _, block, mask, statistics in calls.blocks(x, padding_mask):
        n, N, _ = block.shape
        scores, score_parts = calls.empty(n, N, calls.heads), calls.empty(n, calls.tiles(N), calls.heads)
        absolute_parts = torch.empty_like(score_parts) if floored else None
        bias = None if key_bias is None else key_bias[samples]
        calls.scores(
            scores_kernel, block, mask, parts[samples], bias, statistics, mask, scores, score_parts, absolute_parts
        )
        of_block, total = calls.pool(block, scores, statistics, mask, floored)
        weighted[samples] += of_block
        score_sum[samples] += score_parts.sum(1)[:, :H]
        if floored:
            absolute_sum[samples] += absolute_parts.sum(1)[:, :H]
            token_sum[samples] += total
    return weighted, score_sum, absolute_sum, token_sum


def fill(
    gradients: tuple[Tensor | None, ...], dpooled: Tensor, offset: Tensor, floor: Tensor | None, dabsolute: Tensor | None,
    x: Tensor, keys: Tensor, key_bias: Tensor | None, norm_eps: float | None, padding_mask: Tensor | None,
) -> None:  # fmt: skip
    """Fills dx, dkeys and dkey_bias as far as they are given.

    Args:
        dpooled: that of the operator by what its sums are divided by, (B, H, D).
        offset: what a score's gradient owes to that divisor, (B, H).
        floor, dabsolute: what a floor adds to every score, and the gradient of \\|t\\|, (B, H) both or None.
    """
    dx, dkeys, dkey_bias = gradients
    H = keys.shape[1]
    calls = Calls(x, H, norm_eps)
    key_parts, dpooled_parts = calls.parts_of(keys), calls.parts_of(dpooled)
    per_head = [None if t is None else t.contiguous() for t in (key_bias, offset, floor, dabsolute)]
    keys_sum, bias_sum = calls.zeros(*keys.shape), calls.zeros(*keys.shape[:2])
    for samples, tokens, block, mask, statistics in calls.blocks(x, padding_mask):
        n, N, _ = block.shape
        dscores = calls.empty(n, N, calls.heads)
        weights = None if dx is None else torch.empty_like(dscores)
        along = None if dx is None or norm_eps is None else calls.empty(n, N, calls.groups)
        dbias_parts = None if dkey_bias is None else calls.empty(n, calls.tiles(N), calls.heads)
        of_keys, of_dpooled = key_parts[samples], dpooled_parts[samples]
        calls.scores(
            score_gradients_kernel, block, mask, of_keys, of_dpooled, *(None if t is None else t[samples] for t in per_head),
            statistics, mask, weights, dscores, along, dbias_parts,
        )  # fmt: skip
        if dx is not None:
            calls.token_gradient(
                block, mask, dx[samples, tokens], weights, dscores, of_dpooled, of_keys, block, statistics, along
            )
        if dkeys is not None:
            keys_sum[samples] += calls.pool(block, dscores, statistics, mask)[0]
        if dkey_bias is not None:
            bias_sum[samples] += dbias_parts.sum(1)[:, :H]
    if dkeys is not None:
        dkeys.copy_(keys_sum)
    if dkey_bias is not None:
        dkey_bias.copy_(bias_sum)


def forward(x, keys, key_bias, norm_eps, eps, padding_mask):
    if 0 in (*x.shape, *keys.shape):
        return eager.forward(x, keys, key_bias, norm_eps, eps, padding_mask)
    weighted, score_sum, *_ = sums(x, keys, key_bias, norm_eps, padding_mask, False)
    R = score_sum + eps
    return weighted / R[..., None], score_sum / R, score_sum


def backward(dpooled, dmass, x, keys, key_bias, pooled, score_sum, norm_eps, eps, padding_mask, gradients):
    if 0 in (*x.shape, *keys.shape):
        return eager.backward(
            dpooled, dmass, x, keys, key_bias, pooled, score_sum, norm_eps, eps, padding_mask, gradients
        )
    dpooled, offset = eager.gradient_of_sums(dpooled, dmass, pooled, score_sum, eps)
    fill(gradients, dpooled, offset, None, None, x, keys, key_bias, norm_eps, padding_mask)

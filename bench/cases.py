"""What is measured: sizes, dtypes and layouts, and what each case costs in bytes and FLOPs."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import roofline
from .image import PATCH

DIRECTIONS = {"fwd": "forward", "bwd": "backward", "fwd+bwd": "forward + backward"}
SIZES = (224, 512, 1024, 2048, 4096)
RHO, EPS = 0.95, 1e-6

# The paper's heads at D = 1024: (H, d).
HEADS = {"linear": (64, 16), "pure": (16, 64)}

# Up to where Pure's variants are measured: bound by arithmetic, and small enough for every comparator.
PURE_VARIANTS_PIXELS = 1024


@dataclass(frozen=True)
class Case:
    """One operator on one input; layout "bnhd" is a projection's [B, N, H, d] seen as (B, H, N, d)."""

    op: str
    N: int
    H: int
    d: int
    dtype: torch.dtype = torch.float32
    layout: str = "bnhd"
    tied: bool = True

    def inputs(self, *flat: Tensor, device: torch.device) -> dict[str, Tensor]:
        """q, k (unless tied) and v as (1, H, N, d) from q, k, v of shape (N, D)."""
        named = dict(zip("qkv", flat))
        if self.tied:
            del named["k"]
        views = {n: t.to(device, self.dtype).view(1, self.N, self.H, self.d).transpose(1, 2) for n, t in named.items()}
        return views if self.layout == "bnhd" else {n: t.contiguous() for n, t in views.items()}

    def flops(self, direction: str) -> int:
        return roofline.flops(self.op, direction, 1, self.H, self.N, self.d)

    def traffic(self, direction: str) -> int:
        heads = self.H * self.d * self.dtype.itemsize
        return roofline.traffic(self.op, direction, self.tied, self.N * heads, heads)

    @property
    def pixels(self) -> int:
        return round(self.N**0.5) * PATCH

    @property
    def variant(self) -> str:
        layout = "[B,N,H,d]" if self.layout == "bnhd" else "[B,H,N,d]"
        return f"{short(self.dtype)} {layout} {'tied' if self.tied else 'untied'}"


def plan(ops: list[str], sizes: list[int], dtype: torch.dtype) -> list[Case]:
    """Every operator over every size, and its other dtypes and layouts at one size; sorted by size."""
    other = torch.bfloat16 if dtype == torch.float32 else torch.float32
    variants_of_pure = max((p for p in sizes if p <= PURE_VARIANTS_PIXELS), default=min(sizes))
    cases = []
    for pixels in sorted(sizes):
        for op in ops:
            base = Case(op, (pixels // PATCH) ** 2, *HEADS[op], dtype=dtype)
            cases.append(base)
            if op == "linear" and pixels == max(sizes):
                cases += [
                    replace(base, tied=False),
                    replace(base, layout="bhnd"),
                    replace(base, dtype=other),
                    replace(base, dtype=other, layout="bhnd"),
                ]
            if op == "pure" and pixels == variants_of_pure:
                cases += [replace(base, tied=False), replace(base, layout="bhnd"), replace(base, dtype=other)]
    return cases


def short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}[dtype]

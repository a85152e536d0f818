"""Launch configurations as data, each with its reason. tests/gpu/triton_resources.txt holds what each compiles to.

No GPU has measured any of them yet. Linear's were chosen by register count (how many programs one multiprocessor holds) and by
the loads that stay in flight; Pure's as the largest tile that compiles without a spill in every variant, and on Hopper with its
matrix instructions asynchronous: at 128 x 128 under a cap of 128 registers ptxas waits after each of them.
"""

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

# Multiprocessors of the largest GPU of each kind: what is supposed where there is none to ask.
MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "sm_120": 170, "gfx942": 304}


@functools.cache
def arch_of(device: torch.device) -> str:
    """The key of the tables below: the architecture itself or the nearest one with no more shared memory."""
    if device.type != "cuda":
        return "sm_90"  # the interpreter: any will do
    if torch.version.hip:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    if major == 8:
        return "sm_80" if minor == 0 else "sm_120"  # 8.6 and 8.9 have sm_120's 99 KB and its instructions
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_120")


def multiprocessors(device: torch.device) -> int:
    """Of this GPU, or of the part of it that the process has."""
    return _multiprocessors_of(device) if device.type == "cuda" else MULTIPROCESSORS[arch_of(device)]


@functools.cache
def _multiprocessors_of(gpu: torch.device) -> int:
    return torch.cuda.get_device_properties(gpu).multi_processor_count


@dataclass(frozen=True)
class Linear:
    heads: int  # G, heads of one program
    tokens: int  # BT, tokens at a time
    num_warps: int
    programs: int  # that run at once on the whole GPU

    def splits(self, tokens: int, groups: int) -> tuple[int, int]:
        """How many runs of how many tokens a sequence is cut into, by shape alone."""
        steps = triton.cdiv(tokens, self.tokens)
        split_tokens = triton.cdiv(steps, min(max(1, self.programs // groups), steps)) * self.tokens
        return triton.cdiv(tokens, split_tokens), split_tokens

    def folds(self, splits: int, d: int, readers: int) -> bool:
        """Whether one more launch adds up what so many splits leave; else each of ``readers`` programs does."""
        return splits > 1 and readers * splits * self.heads * (d + 1) * 4 > self.programs * PARTS.get()

    def sizes(self, d: int) -> dict[str, int]:
        """What every kernel of Linear is told."""
        D = triton.next_power_of_2(d)
        return {"d": d, "D": D, "G": self.heads, "BT": self.tokens, "num_warps": self.num_warps}


# Longest sequence that one program per head group takes in one launch: at most a few tiles, and a launch costs more.
WHOLE = 512
# Programs below which a short sequence takes one head each instead of a 128-byte line of heads, to fill the GPU.
FEW = 256
# Bytes of partial sums that a program reads itself, where all run that fit. Those of a multiprocessor share its 64 bytes a cycle
# from the L2 cache: 6 that read as much take 2 us, and a launch that adds up for all of them no longer.
PARTS = ContextVar("PARTS", default=32 << 10)


@contextlib.contextmanager
def always_folding() -> Iterator[None]:
    """In this block, and this thread, partial sums are added up by a launch of their own in every call."""
    before = PARTS.set(0)
    try:
        yield
    finally:
        PARTS.reset(before)


# Programs of Linear's kernels over keys that one multiprocessor holds, by their registers: the fewest of each kind in
# triton_resources.txt, of heads up to 64. Those over queries are cut alike though more would fit: a tied Q is then in the L2
# cache where it is read again. (16-bit, float32) each: plain, with a floor, packed, packed with a floor.
RESIDENT = {
    ("sm_80", "forward"): ((4, 5), (4, 6), (4, 4), (4, 5)),
    ("sm_80", "backward"): ((5, 4), (4, 4), (4, 4), (4, 4)),
    ("sm_90", "forward"): ((6, 6), (5, 7), (5, 4), (4, 7)),
    ("sm_90", "backward"): ((5, 4), (5, 3), (5, 4), (4, 4)),
    ("sm_100", "forward"): ((6, 5), (4, 7), (5, 5), (5, 7)),
    ("sm_100", "backward"): ((5, 3), (5, 3), (5, 4), (5, 4)),
    ("sm_120", "forward"): ((6, 4), (4, 7), (6, 4), (4, 6)),
    ("sm_120", "backward"): ((4, 3), (4, 3), (5, 4), (4, 4)),
    ("gfx942", "forward"): ((6, 7), (6, 8), (7, 7), (6, 8)),
    ("gfx942", "backward"): ((7, 7), (6, 6), (7, 6), (6, 7)),
}


def resident(arch: str, direction: str, element_size: int, floored: bool, packed: bool) -> int:
    """Programs of Linear that run at once on a multiprocessor."""
    return RESIDENT[arch, direction][2 * packed + floored][element_size == 4]


def linear(
    q: Tensor, v: Tensor, tokens: int, direction: str, floored: bool = False, samples: int | None = None
) -> Linear:
    """16 elements of each tensor per thread: more cost registers, fewer leave too few loads in flight.

    ``tokens``: of the longest sequence. ``samples``: packed sequences, where q is not a batch of as many.
    ``floored``: with a floor, whose second sum of values makes float32 spill at 16 in the forward pass.
    """
    H, d = q.shape[1], q.shape[3]
    B = q.shape[0] if samples is None else samples
    D = triton.next_power_of_2(max(d, v.shape[3]))
    short = tokens <= WHOLE
    heads = 1
    if q.stride(1) < q.stride(2) and not (short and B * H < 4 * FEW):
        heads = max(1, min(triton.next_power_of_2(H), 128 // (D * q.element_size())))
    # Short sequences wait for memory, not for bandwidth: one large tile.
    num_warps = 8 if short else 4
    programs = 1
    if not short:
        each = resident(arch_of(q.device), direction, q.element_size(), floored, samples is not None)
        programs = multiprocessors(q.device) * each
    elements = 8 if floored and direction == "forward" and q.element_size() == 4 else 16
    return Linear(heads, max(1, num_warps * 32 * elements // (heads * D)), num_warps, programs)


@dataclass(frozen=True)
class Pure:
    block_m: int  # rows of q
    block_n: int  # rows of k and v
    num_warps: int
    num_stages: int
    # Of a thread, at most. For Blackwell ptxas left to itself aims at more programs than there are registers for, and spills.
    registers: int | None = None

    def options(self, q: Tensor) -> dict:
        options = {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "PRECISION": precision(q)}
        options |= {"maxnreg": self.registers} if self.registers else {}
        return options | {"num_warps": self.num_warps, "num_stages": self.num_stages}


def prepare(q: Tensor, few: bool) -> dict:
    """Options of what prepares Pure's backward pass; the bound is as above, where it makes no products."""
    return {"num_warps": 4} | ({"maxnreg": 64} if arch_of(q.device) == "sm_100" and not few else {})


def all_registers(x: Tensor) -> dict:
    """Options of what pools tokens: on Blackwell as many as a thread can have, for the reason above; other kernels then spill."""
    return {"maxnreg": 255} if arch_of(x.device) == "sm_100" else {}


def precision(q: Tensor) -> str:
    """Of products of float32, as torch.matmul takes them; asked of 16-bit input too, whose products have but one."""
    # The getter of torch's older setting raises where a program has used the newer one; this one knows both.
    return "tf32" if q.element_size() == 4 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def stream_rows(q: Tensor, v: Tensor) -> int:
    """Rows of a program of the streaming kernels, rescale and prepare: 32 elements of a tensor per thread of 128."""
    return max(16, 4096 // triton.next_power_of_2(max(16, q.shape[3], v.shape[3])))


# Architectures whose copy engine fetches 16-bit tiles by descriptor, which spares the registers that addresses take. Masked or
# oddly strided input reads through pointers even there.
DESCRIBED = ("sm_90", "sm_100")

# The ptxas of older versions makes Hopper's products wait for one another where 8 warps own 128 rows; with 4 it does not.
SERIAL = tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 9)

# (architecture, how it reads) -> kernel -> largest of d and dv -> tile. Rows own 64-row tiles where two programs of 128 threads
# then share a multiprocessor: one's products hide the other's arithmetic. On sm_90 addresses and masks leave the forward pass no
# room for a second program of 8 warps, but for one of 4 warps that own as many rows.
PURE: dict[tuple[str, str], dict[str, dict[int, Pure]]] = {
    ("sm_90", "descriptors"): {
        "fwd": {64: Pure(128, 64, 4 if SERIAL else 8, 2), 128: Pure(128, 64, 8, 2), 256: Pure(128, 32, 8, 2)},
        "bwd_queries": {64: Pure(128, 64, 8, 2), 128: Pure(128, 64, 8, 2), 256: Pure(64, 32, 8, 2)},
        "bwd_keys": {64: Pure(64, 64, 4, 2), 128: Pure(64, 64, 8, 2), 256: Pure(32, 64, 8, 2)},
        "bwd_tied": {64: Pure(64, 64, 4, 2), 128: Pure(64, 32, 8, 2), 256: Pure(32, 32, 8, 1)},
    },
    ("sm_90", "pointers"): {
        "fwd": {64: Pure(128, 64, 4, 2), 128: Pure(128, 64, 8, 2), 256: Pure(64, 32, 8, 2)},
        "bwd_queries": {64: Pure(128, 64, 8, 2), 128: Pure(128, 64, 8, 2), 256: Pure(64, 32, 8, 2)},
        "bwd_keys": {64: Pure(64, 64, 4, 2), 128: Pure(64, 64, 8, 2), 256: Pure(32, 32, 8, 1)},
        "bwd_tied": {64: Pure(64, 64, 8, 2), 128: Pure(64, 32, 8, 2), 256: Pure(32, 16, 8, 1)},
    },
    ("sm_100", "descriptors"): {
        "fwd": {64: Pure(128, 64, 8, 3), 128: Pure(128, 64, 8, 2), 256: Pure(128, 64, 8, 2)},
        "bwd_queries": {64: Pure(64, 64, 4, 2), 128: Pure(128, 64, 8, 2, 168), 256: Pure(64, 32, 8, 2)},
        "bwd_keys": {64: Pure(64, 64, 4, 2), 128: Pure(64, 64, 8, 2), 256: Pure(32, 64, 8, 2)},
        "bwd_tied": {64: Pure(64, 64, 4, 2, 168), 128: Pure(64, 64, 8, 2), 256: Pure(64, 32, 8, 2)},
    },
    ("sm_80", "pointers"): {
        "fwd": {64: Pure(128, 64, 8, 3), 128: Pure(64, 32, 4, 2), 256: Pure(64, 32, 8, 2)},
        "bwd_queries": {64: Pure(128, 64, 8, 2), 128: Pure(64, 64, 8, 2), 256: Pure(64, 32, 8, 2)},
        "bwd_keys": {64: Pure(64, 64, 8, 2), 128: Pure(64, 64, 8, 2), 256: Pure(32, 32, 8, 1)},
        "bwd_tied": {64: Pure(32, 32, 4, 2), 128: Pure(64, 32, 8, 2), 256: Pure(32, 32, 8, 1)},
    },
    ("sm_120", "pointers"): {
        "fwd": {64: Pure(128, 64, 8, 3), 128: Pure(64, 32, 4, 2), 256: Pure(64, 32, 8, 2)},
        "bwd_queries": {64: Pure(128, 64, 8, 2), 128: Pure(64, 64, 8, 1), 256: Pure(64, 32, 8, 1)},
        "bwd_keys": {64: Pure(64, 64, 8, 2), 128: Pure(64, 64, 8, 2), 256: Pure(32, 32, 8, 1)},
        "bwd_tied": {64: Pure(32, 32, 4, 2), 128: Pure(64, 16, 8, 2), 256: Pure(32, 16, 8, 1)},
    },
    ("gfx942", "pointers"): {
        "fwd": {64: Pure(128, 64, 8, 3), 128: Pure(64, 64, 4, 2), 256: Pure(64, 32, 8, 2)},
        "bwd_queries": {64: Pure(128, 64, 8, 2), 128: Pure(64, 32, 8, 2), 256: Pure(32, 16, 4, 1)},
        "bwd_keys": {64: Pure(64, 64, 4, 2), 128: Pure(64, 32, 4, 1), 256: Pure(32, 16, 8, 1)},
        "bwd_tied": {64: Pure(64, 64, 4, 2), 128: Pure(64, 16, 8, 2), 256: Pure(32, 16, 8, 1)},
    },
}
PURE["sm_100", "pointers"] = PURE["sm_90", "pointers"] | {
    "bwd_tied": PURE["sm_90", "pointers"]["bwd_tied"] | {128: Pure(64, 32, 8, 2, 168)}
}

# IEEE float32 products run without tensor cores, and Triton holds whole operand rows of them in registers: small tiles.
IEEE = {
    "fwd": {64: Pure(32, 32, 8, 1), 256: Pure(16, 16, 8, 1)},
    "bwd_queries": {64: Pure(32, 32, 8, 1), 128: Pure(32, 16, 8, 1), 256: Pure(16, 16, 8, 1)},
    "bwd_keys": {64: Pure(32, 32, 8, 1), 256: Pure(16, 16, 8, 1)},
}


def _tf32(pointers: dict[str, dict[int, Pure]]) -> dict[str, dict[int, Pure]]:
    """TF32 takes the 16-bit tile of twice the head dimension, which has as many bytes."""
    return {kernel: {64: pointers[kernel][128], 128: pointers[kernel][256], 256: IEEE[kernel][256]} for kernel in IEEE}


PURE |= {(arch, "ieee"): IEEE for arch in MULTIPROCESSORS}
PURE |= {(arch, "tf32"): _tf32(PURE[arch, "pointers"]) for arch in MULTIPROCESSORS}
for _arch in ("sm_80", "sm_120"):
    PURE[_arch, "tf32"]["bwd_queries"][64] = PURE[_arch, "tf32"]["bwd_keys"][64] = Pure(64, 32, 4, 2)
PURE["sm_120", "tf32"]["bwd_queries"][128] = Pure(32, 32, 8, 2)
# Four wavefronts may use twice the registers of eight, and tiles of 16 rows of 256 need them.
for _precision, _kernel in (
    ("ieee", "bwd_queries"),
    ("ieee", "bwd_keys"),
    ("tf32", "bwd_queries"),
    ("tf32", "bwd_keys"),
):
    _tiles = PURE["gfx942", _precision]
    PURE["gfx942", _precision] = _tiles | {_kernel: _tiles[_kernel] | {256: Pure(16, 16, 4, 1)}}


# Where sequences are packed, in place of these: the bounds of a sequence take registers that a tile as large has not.
PACKED: dict[tuple[str, str], dict[str, dict[int, Pure]]] = {
    ("sm_80", "ieee"): {"bwd_queries": {64: Pure(32, 16, 8, 1)}},
    ("sm_100", "pointers"): {"bwd_queries": {256: Pure(64, 32, 8, 2, 168)}},
    ("sm_100", "ieee"): {"fwd": {256: Pure(16, 16, 8, 1, 96)}},
    ("sm_100", "tf32"): {"bwd_keys": {128: Pure(32, 32, 8, 1, 144)}},
    ("sm_120", "pointers"): {"bwd_tied": {64: Pure(32, 32, 4, 2, 168)}},
    ("sm_120", "tf32"): {"fwd": {128: Pure(64, 32, 8, 2, 168)}},
    ("gfx942", "pointers"): {"bwd_keys": {256: Pure(32, 16, 4, 1)}},
}


def pure(q: Tensor, v: Tensor, kernel: str, described: bool, packed: bool = False) -> Pure:
    """The tile of the smallest head dimension that holds d and dv."""
    if v.shape[3] > 256:
        raise ValueError(
            f"infsa::pure: v has head dimension {v.shape[3]}, the Triton kernels take up to 256; use the eager backend"
        )
    reads = "descriptors" if described else "pointers"
    if q.element_size() == 4:
        reads = precision(q)
    key = arch_of(q.device), reads
    tiles = PURE[key][kernel] | (PACKED.get(key, {}).get(kernel, {}) if packed else {})
    return next(tile for largest, tile in tiles.items() if max(q.shape[3], v.shape[3]) <= largest)

"""What instructions compute in each lane by itself: a table of patterns. What matches none is an error.

Rounding is IEEE's wherever PTX asks for it. `div.full`, `sqrt.approx` and the other approximations are rounded correctly here,
which a GPU need not do.
"""

import functools
import re
from collections.abc import Callable

import numpy as np

# Types of PTX to numpy's; bits are unsigned. bfloat16 travels as its 16 bits.
TYPES = {f"{kind}{bits}": np.dtype(f"{of}{bits // 8}") for kind, of in (("u", "u"), ("b", "u"), ("s", "i"), ("f", "f"))
         for bits in (8, 16, 32, 64) if (kind, bits) != ("f", 8)}  # fmt: skip
TYPES |= {"pred": np.dtype(bool), "bf16": np.dtype("u2")}


def widened(t: str) -> str:
    return f"{t[0]}{2 * int(t[1:])}"


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (np.asarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def from_bits(bits: np.ndarray, kind: str) -> np.ndarray:
    """float32 of what a matrix product multiplies. Of TF32 it does not see the last 13 bits."""
    if kind == "tf32":
        return (bits & np.uint32(0xFFFFE000)).view(np.float32)
    return from_bf16(bits) if kind == "bf16" else bits.view(np.float16).astype(np.float32)


def to_bf16(x: np.ndarray) -> np.ndarray:
    """Rounded to nearest, ties to even."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


def flushed(x: np.ndarray) -> np.ndarray:
    """Subnormals become 0."""
    return np.where(np.abs(x) < np.finfo(np.float32).smallest_normal, np.copysign(np.float32(0), x), x)


def _fma(x, y, z):
    # The product of two float32 is exact in float64; the kernels multiply nothing longer.
    return (np.multiply(x, y, dtype=np.float64) + z).astype(x.dtype)


def _quotient(x, y):
    """Towards zero, as C has it. By zero it is anything."""
    q = np.abs(x.astype(np.int64)) // np.maximum(np.abs(y.astype(np.int64)), 1)
    return (q * np.sign(x.astype(np.int64)) * np.sign(y.astype(np.int64))).astype(x.dtype)


def _remainder(x, y):
    return (x.astype(np.int64) - _quotient(x, y).astype(np.int64) * y.astype(np.int64)).astype(x.dtype)


def _shift(left: bool):
    def shift(x, by):
        bits = 8 * x.dtype.itemsize
        short = np.minimum(by, bits - 1).astype(x.dtype)
        shifted = x << short if left else x >> short
        # Past the width signed numbers keep their sign; nothing else is left.
        return shifted if x.dtype.kind == "i" else np.where(by >= bits, x.dtype.type(0), shifted)

    return shift


def _bits(x, position, length):
    """bfe for fields inside the register: the only ones that compilers ask for."""
    assert ((position.astype(np.int64) + length <= 32) & (length > 0)).all()
    left, right = (32 - length - position).astype(x.dtype), (32 - length).astype(x.dtype)
    return (x << left) >> right


def _permuted(x, y, chosen):
    """prmt: byte j of the result is the one of y and x (eight, x lowest) that the j-th four bits of `chosen` name."""
    assert (chosen & np.uint32(0x8888) == 0).all(), "prmt that copies signs"
    both = x.astype(np.uint64) | y.astype(np.uint64) << np.uint64(32)
    byte = [(both >> np.uint64(8 * (int(chosen) >> 4 * j & 7))) & np.uint64(255) for j in range(4)]
    return (byte[0] | byte[1] << np.uint64(8) | byte[2] << np.uint64(16) | byte[3] << np.uint64(24)).astype(np.uint32)


def _high(x, y):
    """The upper half of a product, whose 128 bits Python's numbers hold."""
    if x.dtype.itemsize == 8:
        product = (np.asarray(x).astype(object) * np.asarray(y).astype(object)) >> 64
        return np.broadcast_to(product, np.broadcast(x, y).shape).astype(x.dtype)
    return ((x.astype(np.int64) * y.astype(np.int64)) >> 32).astype(x.dtype)


def _inserted(x, y, position, length):
    """bfi: the low bits of x as a field of y."""
    kind = y.dtype.type
    field = (kind(1) << length.astype(y.dtype)) - kind(1) << position.astype(y.dtype)
    return (y & ~field) | (x << position.astype(y.dtype) & field)


def _unordered(x, y):
    return np.isnan(x) | np.isnan(y)


COMPARE: dict[str, Callable] = {
    "eq": np.equal,
    "ne": lambda x, y: (x != y) & ~_unordered(x, y) if x.dtype.kind == "f" else x != y,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "equ": lambda x, y: (x == y) | _unordered(x, y),
    "neu": np.not_equal,
    "ltu": lambda x, y: ~(x >= y),
    "leu": lambda x, y: ~(x > y),
    "gtu": lambda x, y: ~(x <= y),
    "geu": lambda x, y: ~(x < y),
    "num": lambda x, y: ~_unordered(x, y),
    "nan": _unordered,
}
COMPARISONS = "|".join(COMPARE)

INTEGER = "(?P<t>[su](?:16|32|64))"
ANY = "(?P<t>[su](?:16|32|64)|f32|f64)"
FLOAT = "(?P<t>f32|f64)"

# Pattern -> types of the operands, type of the result, function. `t` is the type that the pattern finds.
SAME: dict[str, tuple[int, Callable]] = {
    rf"add\.{ANY}": (2, np.add),
    rf"sub\.{ANY}": (2, np.subtract),
    rf"mul\.{FLOAT}": (2, np.multiply),
    rf"mul\.lo\.{INTEGER}": (2, np.multiply),
    r"mul\.hi\.(?P<t>[su](?:32|64))": (2, _high),
    rf"mad\.lo\.{INTEGER}": (3, lambda x, y, z: x * y + z),
    rf"fma\.rn\.{FLOAT}": (3, _fma),
    rf"div\.{INTEGER}": (2, _quotient),
    rf"rem\.{INTEGER}": (2, _remainder),
    r"div\.(?:full|approx|rn)\.(?P<t>f32)": (2, np.divide),
    rf"min\.{INTEGER}": (2, np.minimum),
    rf"max\.{INTEGER}": (2, np.maximum),
    # The number of (number, NaN), unless NaN is asked for.
    rf"min\.{FLOAT}": (2, np.fmin),
    rf"max\.{FLOAT}": (2, np.fmax),
    rf"min\.NaN\.{FLOAT}": (2, np.minimum),
    rf"max\.NaN\.{FLOAT}": (2, np.maximum),
    rf"abs\.{ANY}": (1, np.abs),
    rf"neg\.{ANY}": (1, np.negative),
    r"rcp\.rn\.(?P<t>f32)": (1, np.reciprocal),
    r"rsqrt\.approx\.ftz\.(?P<t>f32)": (1, lambda x: np.reciprocal(np.sqrt(x, dtype=np.float64)).astype(np.float32)),
    r"sqrt\.(?:approx\.ftz|approx|rn)\.(?P<t>f32)": (1, np.sqrt),
    r"and\.(?P<t>pred|b16|b32|b64)": (2, np.bitwise_and),
    r"or\.(?P<t>pred|b16|b32|b64)": (2, np.bitwise_or),
    r"xor\.(?P<t>pred|b16|b32|b64)": (2, np.bitwise_xor),
    r"prmt\.(?P<t>b32)": (3, _permuted),
    r"not\.(?P<t>pred|b16|b32|b64)": (1, np.invert),
}


def _cvt(result: str, source: str, rounding: str | None) -> Callable | None:
    """cvt<rounding>.<result>.<source>, None where PTX has no such thing or nobody has needed it."""
    if rounding is None and result[0] in "su" and source[0] in "su":
        # By the sign of the source, and cut.
        return lambda x: x.astype(TYPES[result])
    if rounding is None and source == "bf16" and result in ("f32", "f64"):
        return lambda x: from_bf16(x).astype(TYPES[result])
    if rounding is None and (result, source) in (("f32", "f16"), ("f64", "f16"), ("f64", "f32")):
        return lambda x: x.astype(TYPES[result])
    if rounding == ".rn" and (result, source) == ("bf16", "f32"):
        return to_bf16
    if rounding == ".rn" and (result in ("f16", "f32") and (source in ("f32", "f64") or source[0] in "su")):
        return lambda x: x.astype(TYPES[result])
    return None


def _pair(to_half: Callable) -> Callable:
    def pack(high, low):
        return (to_half(high).astype(np.uint32) << np.uint32(16)) | to_half(low)

    return pack


@functools.cache
def operation(opcode: str) -> tuple[list[str], str, Callable] | None:
    """Types of the operands, type of the result and function of an instruction; None if it is none of these."""
    for pattern, (count, compute) in SAME.items():
        if found := re.fullmatch(pattern, opcode):
            if ".ftz" in opcode:
                return [found["t"]], found["t"], lambda x: flushed(compute(flushed(x)))
            return [found["t"]] * count, found["t"], compute
    if found := re.fullmatch(r"(mul|mad)\.wide\.(s16|u16|s32|u32)", opcode):
        narrow, wide = found[2], widened(found[2])

        def product(x, y, *z):
            return np.add(np.multiply(x, y, dtype=TYPES[wide]), *(z or (TYPES[wide].type(0),)))

        return [narrow, narrow] + [wide] * (found[1] == "mad"), wide, product
    if found := re.fullmatch(r"(shl|shr)\.([sub](?:16|32|64))", opcode):
        return [found[2], "u32"], found[2], _shift(found[1] == "shl")
    if found := re.fullmatch(r"bfi\.(b32|b64)", opcode):
        return [found[1], found[1], "u32", "u32"], found[1], _inserted
    if found := re.fullmatch(r"bfe\.(s32|u32)", opcode):
        return [found[1], "u32", "u32"], found[1], _bits
    if found := re.fullmatch(r"selp\.(b16|b32|b64|f32|f64|[su](?:16|32|64))", opcode):
        return [found[1], found[1], "pred"], found[1], lambda x, y, which: np.where(which, x, y)
    if found := re.fullmatch(rf"setp\.({COMPARISONS})\.([sub](?:16|32|64)|f32|f64)", opcode):
        return [found[2], found[2]], "pred", COMPARE[found[1]]
    if re.fullmatch(r"cvt\.rn\.f16x2\.f32", opcode):
        return ["f32", "f32"], "b32", _pair(lambda x: np.asarray(x).astype(np.float16).view(np.uint16))
    if re.fullmatch(r"cvt\.rn\.bf16x2\.f32", opcode):
        return ["f32", "f32"], "b32", _pair(to_bf16)
    if found := re.fullmatch(r"cvt(\.rn)?\.(\w+)\.(\w+)", opcode):
        compute = _cvt(found[2], found[3], found[1])
        return compute and ([found[3]], found[2], compute)
    return None

"""The least time of a pass: its bytes over the bandwidth, its products over the GEMM rate, both measured in the same run."""

from infsa_kernels.ops import linear, pure

OPERATORS = {"linear": linear.operator, "pure": pure.operator}

# The cache that keeps a tied Q between Linear's two passes over it: an H200's, as far as it was seen to.
KEPT_BYTES = 40 << 20


def flops(op: str, direction: str, B: int, H: int, N: int, d: int) -> int:
    """Operations by the operator's registered formula: the paper's N x N products, none saved by symmetry."""
    fwd, bwd = (formula(B, H, N, N, d, d) for formula in OPERATORS[op].flops)
    return {"fwd": fwd, "bwd": bwd, "fwd+bwd": fwd + bwd}[direction]


def traffic(op: str, direction: str, tied: bool, tokens: int, heads: int) -> int:
    """Bytes that must move at least: every input of a pass read once, every result written once.

    Args:
        tokens, heads: bytes of a tensor of all tokens, as q, and of one row per head, as Linear's result.
    """
    out = tokens if op == "pure" else heads
    inputs = tokens * (2 if tied else 3)
    fwd = inputs + out
    # Pure's backward reads out as well as dout: its norm's gradient needs <dout, out>.
    bwd = 2 * inputs + out * (2 if op == "pure" else 1)
    return {"fwd": fwd, "bwd": bwd, "fwd+bwd": fwd + bwd}[direction]


def floor(op: str, direction: str, tied: bool, B: int, H: int, N: int, d: int, itemsize: int, ceilings: dict) -> float:
    """Seconds that a pass takes at least on a machine of these ceilings (bytes/s "read" and "copy", FLOP/s "gemm")."""
    moved = traffic(op, direction, tied, B * N * H * d * itemsize, B * H * d * itemsize)
    memory = moved / ceilings["read" if direction == "fwd" and op == "linear" else "copy"]
    # Linear's few operations per number are no matrix product.
    return max(memory, flops(op, direction, B, H, N, d) / ceilings["gemm"] if op == "pure" else 0.0)


def predict(
    op: str, direction: str, tied: bool, B: int, H: int, N: int, d: int, itemsize: int, ceilings: dict
) -> float:
    """Seconds that the Triton kernels should take: the floor, what they move beyond it, and their launches.

    Beyond it: Linear reads a tied Q again, and backward hands on one float32 per token and head, written and read; Pure
    rescales its output in place, and its untied backward pass computes two of five products twice.
    """
    tokens = B * N * H * d * itemsize
    least = floor(op, direction, tied, B, H, N, d, itemsize, ceilings)
    if op == "pure":
        products = 1.0 if direction == "fwd" or tied else 7 / 5
        return (
            least * products
            + 2 * tokens / ceilings["copy"]
            + (2 if direction == "fwd" or tied else 3) * ceilings["launch"]
        )
    again = max(0, tokens - KEPT_BYTES) if tied or direction == "bwd" else 0
    if direction == "bwd":
        again = tied * (again + 2 * B * N * H * 4)
    launches = 1 if direction == "fwd" and N <= 512 else 2
    return least + again / ceilings["read" if direction == "fwd" else "copy"] + launches * ceilings["launch"]

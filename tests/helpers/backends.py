"""The devices of this machine, and the backends that can run on each."""

import torch

import infsa_kernels

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def backends_of(device: str, op: str = "linear") -> list[str]:
    reasons = infsa_kernels.explain_backend(op, torch.device(device), torch.float32, (1, 1, 16, 16))
    return [name for name, reason in reasons.items() if reason is None]


def multiplies_bfloat16() -> bool:
    """Whether the CPU kernels multiply Pure's scores in bfloat16 where the input is of it (docs/pure.md)."""
    from infsa_kernels import _C

    return _C.cpu_isa.endswith("bf16")

"""The operators themselves, on the backend that the package chooses."""

import torch

from ..cases import EPS, RHO

LABEL = "infsa_kernels"
EXPONENT = {"linear": 1, "pure": 2}
HOLDS_SCORES = False
SAME_FUNCTION = True


def prepare(op: str):
    operator = getattr(torch.ops.infsa, op)
    return lambda q, k, v: operator(q, k, v, EPS, RHO)

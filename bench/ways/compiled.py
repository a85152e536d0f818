"""torch.compile of the eager reference, compiled anew for every case: static shapes are the faster ones."""

import torch

from . import eager

LABEL = "torch.compile"
EXPONENT = eager.EXPONENT
HOLDS_SCORES = eager.HOLDS_SCORES
SAME_FUNCTION = True


def prepare(op: str):
    torch._dynamo.reset()
    return torch.compile(eager.prepare(op), fullgraph=True, dynamic=False)

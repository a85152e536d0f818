"""InfSA of one sequence on several ranks of torch.distributed: operators, and models (docs/distributed.md).

Each rank has a run of the tokens and calls the functions here in the place of those of the same name in infsa_kernels.
"""

from .linear import linear_infsa
from .models import parallelize
from .pooled_linear import pooled_linear_infsa
from .pure import pure_infsa

__all__ = ["linear_infsa", "parallelize", "pooled_linear_infsa", "pure_infsa"]

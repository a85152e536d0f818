"""Fused kernels for Infinite Self-Attention (arXiv:2603.00175): `torch.ops.infsa.linear` and `torch.ops.infsa.pure`."""

from . import onnx as onnx
from .memory import release_memory
from .nn.functional import infsa_attention
from .ops.backends import backend, choose_backend, explain_backend
from .ops.linear import linear_infsa, linear_infsa_scores
from .ops.pooled_linear import pooled_linear_infsa
from .ops.pure import pure_infsa, pure_infsa_scores
from .ops.varlen import linear_infsa_varlen, pure_infsa_varlen

__version__ = "0.2.0"

__all__ = [
    "backend",
    "choose_backend",
    "explain_backend",
    "infsa_attention",
    "linear_infsa",
    "linear_infsa_scores",
    "linear_infsa_varlen",
    "pooled_linear_infsa",
    "pure_infsa",
    "pure_infsa_scores",
    "pure_infsa_varlen",
    "release_memory",
]

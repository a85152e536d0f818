"""Modules and models on top of the operators. They need torch only."""

from .attention import InfSAAttention
from .convert import ConversionReport, convert, replace_attention
from .monitoring import monitor
from .neumann import NeumannSum
from .vit import (
    InfViT,
    infvit_linear_4l,
    infvit_linear_24l,
    infvit_pure_4l,
    infvit_pure_24l,
    infvit_softmax_4l,
    infvit_softmax_24l,
)

__all__ = [
    "ConversionReport",
    "InfSAAttention",
    "InfViT",
    "NeumannSum",
    "convert",
    "infvit_linear_4l",
    "infvit_linear_24l",
    "infvit_pure_4l",
    "infvit_pure_24l",
    "infvit_softmax_4l",
    "infvit_softmax_24l",
    "monitor",
    "replace_attention",
]

"""Modules and models on top of the operators. They need torch only."""

from .attention import InfSAAttention
from .convert import ConversionReport, convert, replace_attention

__all__ = ["ConversionReport", "InfSAAttention", "convert", "replace_attention"]

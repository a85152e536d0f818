"""Modules and models on top of the operators. They need torch only."""

from .attention import InfSAAttention

__all__ = ["InfSAAttention"]

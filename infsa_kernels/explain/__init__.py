"""What a model looks at: attention maps without an N x N matrix, and how much they are worth. Described in docs/explain.md."""

from .adapters import attributions, quantus_explain, reshape_transform
from .layers import attention_graphs
from .maps import attention_maps
from .measures import DeletionCurve, Localisation, deletion_curve, gaussian_maps, localisation, random_maps
from .weights import LinearGraph, SoftmaxGraph

__all__ = [
    "DeletionCurve",
    "LinearGraph",
    "Localisation",
    "SoftmaxGraph",
    "attention_graphs",
    "attention_maps",
    "attributions",
    "deletion_curve",
    "gaussian_maps",
    "localisation",
    "quantus_explain",
    "random_maps",
    "reshape_transform",
]

"""The interface of the authors' package on these kernels: ``import infsa_kernels.compat as infsa``.

Names, order of arguments, defaults and what is returned are those of ``infsa`` 0.1 (github.com/giorgioroffo/
infinite-self-attention), so that code which changes the import runs as before. Where that package computes something other than
it says (causal models as bidirectional ones, masks ignored, weights left random), this raises with the reason.
docs/migration.md lists every difference.
"""

import copy
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from . import nn as _nn
from .nn.functional import infsa_attention
from .nn.rho import rho_of
from .ops.linear import linear_infsa_scores
from .ops.pure import pure_infsa_scores

__all__ = [
    "InfSAAttention",
    "convert",
    "infsa_attention",
    "linear_infsa_scores",
    "pure_infsa_scores",
    "replace_attention",
]


class _Converted(type):
    """Converted modules of timm and transformers stay what they are, and count as instances all the same."""

    def __instancecheck__(cls, module) -> bool:
        return super().__instancecheck__(module) or (isinstance(module, nn.Module) and hasattr(module, "rho_logit"))


class InfSAAttention(_nn.InfSAAttention, metaclass=_Converted):
    """:class:`infsa_kernels.nn.InfSAAttention` with the authors' order of arguments, defaults and initial values.

    Batches come first and the variant is Pure InfSA, unless told otherwise.

    Args:
        embed_dim: size D of a token; a multiple of ``num_heads``.
        num_heads: number of heads H.
        variant: "pure_infsa", O(N^2), or "linear_infsa", O(N).
        dropout: probability of dropping a score, in training.
        bias: whether the four projections have biases.
        batch_first: whether tokens come as (B, N, D) instead of (N, B, D).
        rho_init: rho at the start, between 0 and 1.
        rho_trainable: whether ``rho_logit``, of shape (1,), is a parameter, or a buffer.
        kdim, vdim: sizes of key and value tokens (default: ``embed_dim``).

    Raises:
        ValueError: an argument out of range.

    Example::

        >>> attention = InfSAAttention(512, 8, "linear_infsa")
        >>> out, weights = attention(x, x, x)  # (B, N, 512), None
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        variant: str = "pure_infsa",
        dropout: float = 0.0,
        bias: bool = True,
        batch_first: bool = True,
        rho_init: float = 0.95,
        rho_trainable: bool = True,
        kdim: int | None = None,
        vdim: int | None = None,
    ):
        super().__init__(
            embed_dim,
            num_heads,
            dropout,
            bias,
            kdim=kdim,
            vdim=vdim,
            batch_first=batch_first,
            variant=variant,
            rho_init=rho_init,
            rho_trainable=rho_trainable,
        )

    @property
    def rho(self) -> Tensor:
        """The output scale, (), with its gradient: ``attention.rho.item()`` is the number."""
        return rho_of(self).squeeze()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Uniform by Xavier for all four projections, biases of 0, and rho_init."""
        super().reset_parameters()
        for projection in (*self._input_projections(), self.out_proj):
            nn.init.xavier_uniform_(projection.weight)

    def forward(
        self,
        query: Tensor | None = None,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        hidden_states: Tensor | None = None,
        query_padding_mask: Tensor | None = None,
        norm: nn.Module | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """As :meth:`infsa_kernels.nn.InfSAAttention.forward`; ``hidden_states`` stands for query, key and value.

        Returns:
            The output, laid out as ``query``, and None or the weights: (B, N, M) if pure and (B, M, 1) if linear, averaged over
            the heads, or (B, H, N, M) and (B, H, M, 1).

        Raises:
            NotImplementedError: attn_mask, is_causal, or an argument that the authors' module takes and drops.
        """
        query = hidden_states if query is None else query
        if query is None:
            raise TypeError("InfSAAttention: query is None, expected a Tensor, or hidden_states")
        dropped = [name for name, given in kwargs.items() if given is not None and given is not False]
        if dropped:
            raise NotImplementedError(
                f"InfSAAttention: got {', '.join(dropped)}, which the authors' module takes without any effect; "
                "leave it out, and give padding as key_padding_mask"
            )
        arguments = query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        return super().forward(*arguments, query_padding_mask=query_padding_mask, norm=norm)

    def _finish_weights(self, weights, query, query_padding_mask, average):
        if self.variant != "linear_infsa":
            return super()._finish_weights(weights, query, query_padding_mask, average)
        return super()._finish_weights(weights, query[:, :1], None, average).mT


def convert(
    model: nn.Module,
    variant: str = "pure_infsa",
    rho_init: float = 0.95,
    rho_trainable: bool = True,
    copy_weights: bool = True,
    include_patterns: str | Iterable[str] | None = None,
    exclude_patterns: str | Iterable[str] | None = None,
    target_types: type | Iterable[type] | None = None,
    inplace: bool = False,
    verbose: bool = True,
) -> nn.Module:
    """The model with its attention as InfSA, itself if ``inplace`` or a copy; prints what was converted if ``verbose``.

    Arguments as :func:`infsa_kernels.nn.convert`. Every converted module is an instance of :class:`InfSAAttention`.

    Raises:
        NotImplementedError: some attention cannot be converted exactly (causal, unknown, ...): the message says which and why,
            ``exclude_patterns`` leaves it out, and nothing has changed. ValueError: an argument out of range.
    """
    report = _nn.convert(
        model, variant, rho_init, rho_trainable, copy_weights, include_patterns, exclude_patterns, target_types, inplace, True
    )  # fmt: skip
    if not report.converted:
        warnings.warn("infsa_kernels.compat.convert: no attention was found that could be converted", stacklevel=2)
    elif verbose:
        print(report)
    for name in report.converted:
        _as_theirs(report.model.get_submodule(name), copy_weights)
    return report.model


def replace_attention(
    module: nn.Module,
    variant: str = "pure_infsa",
    rho_init: float = 0.95,
    rho_trainable: bool = True,
    copy_weights: bool = True,
) -> InfSAAttention:
    """A new InfSA module with copies of the weights of one attention module, which stays as it is.

    Raises:
        NotImplementedError: this module cannot be converted; the message says why. ValueError: as :func:`convert`.
    """
    new = _nn.replace_attention(copy.deepcopy(module), variant, rho_init, rho_trainable, copy_weights)
    return _as_theirs(new, copy_weights)


def _as_theirs(module: nn.Module, copy_weights: bool) -> nn.Module:
    if type(module) is _nn.InfSAAttention:
        module.__class__ = InfSAAttention
        if not copy_weights:
            module.reset_parameters()
    return module

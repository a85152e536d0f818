"""timm: attention layers for ``timm.create_model("vit_...", attn_layer=InfSAAttention)``, and InfViT by timm's names."""

import functools

import torch
from timm.layers import Attention
from timm.models import is_model, register_model
from torch import Tensor, nn

from .. import distributed
from ..ops.pooled_linear import pooled_linear_infsa
from .checks import NO_CAUSAL
from .functional import attend, check_score_floor
from .fx import Leaf
from .masks import padding_of_scores_mask, without
from .plain import is_plain
from .rho import attach_rho, rho_of
from .vit import FACTORIES


class InfSAAttention(Leaf, Attention):
    """timm's attention with Linear-InfSA between its projections: same arguments, same parameters, and ``rho_logit``.

    timm calls classes, not functools.partial objects: choose with :class:`PureInfSAAttention`, :class:`MultiHopInfSAAttention`,
    or a subclass that sets ``variant``, ``hops``, ``rho_init``, ``rho_trainable`` or ``score_floor``. State dicts of timm's
    attention load: rho then stays as it is.

    Example::

        >>> model = timm.create_model("vit_base_patch16_224", attn_layer=InfSAAttention)
    """

    variant = "linear_infsa"
    hops: int | None = None
    rho_init = 0.95
    rho_trainable = True
    score_floor = 0.0
    sequence_group: str | None = None  # as in infsa_kernels.nn.InfSAAttention

    def __init__(self, dim: int, num_heads: int = 8, *args, device=None, dtype=None, **kwargs):
        check_score_floor(type(self).__name__, self.variant, self.score_floor)
        super().__init__(dim, num_heads, *args, device=device, dtype=dtype, **kwargs)
        attach_rho(self, self.rho_init, self.rho_trainable)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Attends among the tokens of ``x`` (B, N, dim).

        Args:
            attn_mask: broadcasts to (B, H, N, N), True = attend, or 0 and -inf. It has to remove the same tokens for every
                query; they are removed as queries too, and get an output of 0 before ``proj_drop``.
            is_causal: refused.

        Raises:
            NotImplementedError: is_causal, or a mask that differs between queries or heads.
        """
        if is_causal:
            raise NotImplementedError(f"{type(self).__name__}: is_causal is True: {NO_CAUSAL}")
        B, N, _ = x.shape
        ignore = None
        if attn_mask is not None:
            ignore = padding_of_scores_mask(type(self).__name__, attn_mask, (B, self.num_heads, N, N))
        out = (self._pool if self._pools(x.device) else self._attend)(x, ignore).expand(-1, N, -1)
        # Linear's one row, written out: what comes next may work in place, as timm's LayerScale does.
        return self.proj_drop(without(ignore, out).contiguous())

    def _pools(self, device: torch.device) -> bool:
        """Whether all of this is a call of pooled_linear_infsa: the projections are then only data."""
        return (
            self.variant == "linear_infsa"
            and not (self.training and self.attn_drop.p > 0)
            and getattr(self, "gate", None) is None
            and all(is_plain(part, nn.Linear, device) for part in (self.qkv, self.proj))
            and all(is_plain(part, nn.Identity, device) for part in (self.q_norm, self.k_norm, self.norm))
        )

    def _pool(self, x: Tensor, ignore: Tensor | None) -> Tensor:
        """(B, 1, dim): the row that every token gets."""
        weights = self.qkv.weight.chunk(3)
        biases = [None] * 3 if self.qkv.bias is None else self.qkv.bias.chunk(3)
        pooled = pooled_linear_infsa
        if self.sequence_group is not None:
            pooled = functools.partial(distributed.pooled_linear_infsa, group=self.sequence_group)
        out = pooled(
            x,
            self.num_heads,
            weights[0],
            weights[2],
            self.proj.weight,
            q_bias=biases[0],
            k_weight=weights[1],
            k_bias=biases[1],
            v_bias=biases[2],
            out_bias=self.proj.bias,
            rho=rho_of(self),
            padding_mask=ignore,
            score_floor=self.score_floor,
        )
        return out.unsqueeze(1)

    def _attend(self, x: Tensor, ignore: Tensor | None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        q, k = self.q_norm(q), self.k_norm(k)
        dropout = self.attn_drop.p if self.training else 0.0
        context, _ = attend(
            q, k, v, self.variant, rho_of(self), 1e-6, ignore, ignore, hops=self.hops, score_floor=self.score_floor,
            dropout_p=dropout, group=self.sequence_group,
        )  # fmt: skip
        context = self.norm(context.transpose(1, 2).flatten(2))
        if getattr(self, "gate", None) is not None:
            context = context * self.gate(x).sigmoid()
        return self.proj(context)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        if prefix + "qkv.weight" in state_dict and not self.rho_logit.is_meta:
            state_dict.setdefault(prefix + "rho_logit", self.rho_logit.detach())
        super()._load_from_state_dict(state_dict, prefix, *args)


class LinearInfSAAttention(InfSAAttention):
    """:class:`InfSAAttention` by its full name: O(N)."""


class PureInfSAAttention(InfSAAttention):
    """timm's attention with Pure InfSA between its projections: O(N^2) time, O(N) memory."""

    variant = "pure_infsa"


class MultiHopInfSAAttention(InfSAAttention):
    """timm's attention with multi-hop InfSA between its projections: O(N^2) time a hop, O(N) memory; all hops, or ``hops``."""

    variant = "multi_hop_infsa"


CLASS_OF = {c.variant: c for c in (LinearInfSAAttention, PureInfSAAttention, MultiHopInfSAAttention)}


def register() -> list[str]:
    """Registers the factories of InfViT, for ``timm.create_model("infvit_linear_4l")``; returns their names.

    There are no pretrained weights: asking for them raises.
    """

    def entry(factory):
        def create(pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None, **kwargs):
            if pretrained:
                raise NotImplementedError(
                    f"{factory.__name__}: pretrained is True, expected False: no weights have been published; load a "
                    "checkpoint of your own with checkpoint_path"
                )
            return factory(**kwargs)

        # timm files a model under its function's name and module.
        create.__name__, create.__doc__, create.__module__ = factory.__name__, factory.__doc__, __name__
        return create

    for factory in FACTORIES:
        if not is_model(factory.__name__):
            register_model(entry(factory))
    return [factory.__name__ for factory in FACTORIES]

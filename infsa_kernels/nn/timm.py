"""timm: attention layers for ``timm.create_model("vit_...", attn_layer=InfSAAttention)``."""

import torch
from timm.layers import Attention
from torch import Tensor, nn

from ..ops.attention import infsa_attention
from ..ops.pooled_linear import pooled_linear_infsa
from ._host import Leaf, attach_rho, padding_of_scores_mask
from ._plain import is_plain


class InfSAAttention(Leaf, Attention):
    """timm's attention with Linear-InfSA between its projections: same arguments, same parameters, and ``rho_logit``.

    timm calls classes, not functools.partial objects: choose with :class:`PureInfSAAttention`, or with a subclass that sets
    ``variant``, ``rho_init`` or ``rho_trainable``. State dicts of timm's attention load: rho then stays as it is.

    Example::

        >>> model = timm.create_model("vit_base_patch16_224", attn_layer=InfSAAttention)
    """

    variant = "linear_infsa"
    rho_init = 0.95
    rho_trainable = True

    def __init__(self, dim: int, num_heads: int = 8, *args, device=None, dtype=None, **kwargs):
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
            raise NotImplementedError(
                f"{type(self).__name__}: is_causal is True: InfSA divides by sums over all queries, and a causal form of it does "
                "not exist yet"
            )
        B, N, _ = x.shape
        ignore = None
        if attn_mask is not None:
            ignore = padding_of_scores_mask(type(self).__name__, attn_mask, (B, self.num_heads, N, N))
        out = (self._pool if self._pools(x.device) else self._attend)(x, ignore).expand(-1, N, -1)
        if ignore is not None:
            out = out.masked_fill(ignore[..., None], 0)
        # Linear's one row, written out: what comes next may work in place, as timm's LayerScale does.
        return self.proj_drop(out.contiguous())

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
        out = pooled_linear_infsa(
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
            rho=torch.sigmoid(self.rho_logit),
            padding_mask=ignore,
        )
        return out.unsqueeze(1)

    def _attend(self, x: Tensor, ignore: Tensor | None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        q, k = self.q_norm(q), self.k_norm(k)
        rho, dropout = torch.sigmoid(self.rho_logit), self.attn_drop.p
        masks = dict(key_padding_mask=ignore, query_padding_mask=ignore)
        context = infsa_attention(q, k, v, self.variant, rho, dropout, self.training, **masks)
        if self.variant == "linear_infsa":
            context = context[:, :, :1]  # the same row for every token: one is normalised and projected
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

"""`InfSAAttention`: what nn.MultiheadAttention is for softmax, for InfSA."""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import distributed
from ..ops.pooled_linear import pooled_linear_infsa
from .checks import fraction, integer, number
from .functional import attend, check_activation, check_score_floor, check_variant, refuse_dropout
from .fx import Leaf
from .masks import multihead_padding, refuse_attention_masks
from .plain import is_plain
from .rho import attach_rho, logit, rho_of
from .state import demand_same_keys, multihead_names, take_names


class InfSAAttention(Leaf):
    """Multi-head Infinite Self-Attention between two sets of projections, with the interface of nn.MultiheadAttention.

        out = W_o concat_h InfSA(W_q query, W_k key, W_v value)_h + b_o,     rho = sigmoid(rho_logit)

    Arguments up to ``dtype`` are those of nn.MultiheadAttention, and parameters start as there. What differs:

    * ``need_weights`` defaults to False: other variants than linear would hold N x M weights that nobody reads.
    * Self-attention (``key is query``): ``key_padding_mask`` removes tokens as keys and as queries, because both operators
      sum over the queries. Their output rows are 0.
    * ``attn_mask`` and ``is_causal`` raise NotImplementedError: the sums over all queries have no causal form here.

    Args:
        embed_dim: size D of a token; a multiple of ``num_heads``.
        num_heads: number of heads H.
        dropout: probability of dropping a score, in training. The pure variant then holds its N x M scores.
        bias: whether the four projections have biases.
        add_bias_kv: whether one learned key and value join those given.
        add_zero_attn: whether a key and value of zeros joins. It scores 0, so that without a floor or softplus only the weights
            show it.
        kdim, vdim: sizes of key and value tokens (default: ``embed_dim``).
        batch_first: whether tokens come as (B, N, D) instead of (N, B, D).
        variant: "linear_infsa", O(N); "pure_infsa", O(N^2); or "multi_hop_infsa", O(N^2) a hop: the sum over hops
            t = 1, 2, ... of (rho A)^t v with Pure InfSA's A. rho is the discount that the paper calls gamma, and one hop is Pure
            InfSA. Queries and keys are the same tokens.
        tied: whether keys go through the projection of the queries (the paper's symmetric operator): no ``k_proj`` then.
        hops: of multi_hop_infsa: how many; None for all, ((I - rho A)^-1 - I) v, solved by iteration.
        rho_init: rho at the start, between 0 and 1, where the sigmoid keeps it.
        rho_trainable: whether ``rho_logit`` is a parameter, or a buffer.
        rho_per_head: whether ``rho_logit`` has shape (H,), or (1,).
        eps: added to the operators' denominators.
        score_floor: of linear_infsa: the share of the mean absolute score that every score gains; 0 is the paper's operator.
            What it is for: docs/nn.md, Training.
        activation: of linear_infsa and pure_infsa: "relu", or "gelu", "abs" or "softplus", which run in torch operations.

    Raises:
        ValueError: an argument out of range. TypeError: one of another type. NotImplementedError: what multi_hop_infsa has no
            form of: dropout, add_bias_kv, add_zero_attn, activation.

    Example::

        >>> attention = InfSAAttention(1024, 64, batch_first=True)
        >>> x = torch.randn(1, 4096, 1024)
        >>> attention(x)[0].shape
        torch.Size([1, 4096, 1024])
    """

    # nn.TransformerEncoder and its layers read these to learn whether torch's fused softmax layer may run instead: never.
    _qkv_same_embed_dim = False
    in_proj_weight = None
    in_proj_bias = None

    # The ranks that have the other tokens of a sequence: infsa_kernels.distributed.parallelize.
    sequence_group: str | None = None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device=None,
        dtype=None,
        *,
        variant: str = "linear_infsa",
        tied: bool = False,
        hops: int | None = None,
        rho_init: float = 0.95,
        rho_trainable: bool = True,
        rho_per_head: bool = False,
        eps: float = 1e-6,
        score_floor: float = 0.0,
        activation: str = "relu",
    ):
        super().__init__()
        kdim = embed_dim if kdim is None else kdim
        vdim = embed_dim if vdim is None else vdim
        for name, size in (("embed_dim", embed_dim), ("num_heads", num_heads), ("kdim", kdim), ("vdim", vdim)):
            integer("InfSAAttention", name, size)
        number("InfSAAttention", "dropout", dropout)
        number("InfSAAttention", "eps", eps)
        fraction("InfSAAttention", "rho_init", rho_init)
        if embed_dim % num_heads:
            raise ValueError(
                f"InfSAAttention: embed_dim is {embed_dim}, expected a multiple of num_heads = {num_heads}; "
                "every head takes an equal part"
            )
        check_variant("InfSAAttention", variant, hops)
        check_score_floor("InfSAAttention", variant, score_floor)
        check_activation("InfSAAttention", variant, activation)
        if not 0 <= dropout <= 1:
            raise ValueError(f"InfSAAttention: dropout is {dropout}, expected a probability between 0 and 1")
        if not (math.isfinite(eps) and eps > 0):
            raise ValueError(f"InfSAAttention: eps is {eps}, expected a finite number above 0; the paper's is 1e-6")
        if variant == "multi_hop_infsa":
            refuse_dropout("InfSAAttention", dropout)
            for name, given in (("add_bias_kv", add_bias_kv), ("add_zero_attn", add_zero_attn)):
                if given:
                    raise NotImplementedError(
                        f"InfSAAttention: {name} is True, expected False with variant='multi_hop_infsa': a hop goes on from "
                        "the token that the one before came to, and from this key, which is no query, there is none"
                    )
        if tied and kdim != embed_dim:
            raise ValueError(
                f"InfSAAttention: kdim is {kdim}, expected embed_dim = {embed_dim} with tied=True: "
                "keys go through the projection of the queries; give tied=False"
            )

        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.kdim, self.vdim = kdim, vdim
        self.dropout, self.batch_first, self.add_zero_attn = dropout, batch_first, add_zero_attn
        self.variant, self.tied, self.rho_init, self.rho_per_head = variant, tied, rho_init, rho_per_head
        self.eps, self.hops, self.score_floor = float(eps), None if hops is None else int(hops), float(score_floor)
        self.activation = activation

        factory = {"device": device, "dtype": dtype}
        self.q_proj = nn.Linear(embed_dim, embed_dim, bias, **factory)
        if not tied:
            self.k_proj = nn.Linear(kdim, embed_dim, bias, **factory)
        self.v_proj = nn.Linear(vdim, embed_dim, bias, **factory)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias, **factory)
        for name in ("bias_k", "bias_v"):
            token = nn.Parameter(torch.empty(1, 1, embed_dim, **factory)) if add_bias_kv else None
            self.register_parameter(name, token)
        attach_rho(self, rho_init, rho_trainable, num_heads if rho_per_head else 1, **factory)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The initial values of nn.MultiheadAttention, and rho_init."""
        # There, one matrix of three blocks is drawn if all sizes are equal: its bound is that of the blocks over sqrt(2).
        gain = math.sqrt(0.5) if self.kdim == self.vdim == self.embed_dim else 1.0
        for projection in self._input_projections():
            nn.init.xavier_uniform_(projection.weight, gain)
        self.out_proj.reset_parameters()
        for projection in (*self._input_projections(), self.out_proj):
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)
        if self.bias_k is not None:
            nn.init.xavier_normal_(self.bias_k)
            nn.init.xavier_normal_(self.bias_v)
        self.rho_logit.fill_(logit(self.rho_init))

    @property
    def rho(self) -> Tensor:
        """The output scale, (1,) or (H,), with its gradient."""
        return rho_of(self)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        query_padding_mask: Tensor | None = None,
        norm: nn.Module | None = None,
        expanded: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attends from ``query`` (N, B, D), or (B, N, D) if batch_first, or (N, D), to ``key`` and ``value``.

        Args:
            key: tokens of size kdim, laid out as ``query`` (default: ``query``).
            value: tokens of size vdim, as many as keys (default: ``key``).
            key_padding_mask: (B, M), or (M,) for unbatched tokens; bool, True = ignore; or floating, 0 and -inf.
            need_weights: whether to return the weights too.
            attn_mask, is_causal: refused.
            average_attn_weights: whether weights are averaged over the heads.
            query_padding_mask: (B, N) or (N,), as ``key_padding_mask``: queries that take no part and get an output of 0.
                Default: ``key_padding_mask`` if ``key is query``, else none.
            norm: applied first to the one tensor that is query, key and value; an nn.LayerNorm is fused where the pooled
                layer runs.
            expanded: whether the output of Linear-InfSA may be a view that repeats one row, which costs no memory and must not
                be written to in place. For callers that only add it to something.

        Returns:
            The output, contiguous and laid out as ``query``, and None or the weights: (B, N, M), or (B, H, N, M) if not
            averaged, without B for unbatched tokens. M counts the tokens of add_bias_kv and add_zero_attn.

        Raises:
            NotImplementedError: attn_mask or is_causal. ValueError: wrong sizes. TypeError: a mask of integers.
        """
        refuse_attention_masks(attn_mask, is_causal)
        if key is None and value is not None:
            raise TypeError("InfSAAttention: key is None, expected the Tensor of keys that belong to value; give both")
        key = query if key is None else key
        value = key if value is None else value
        batched = query.dim() == 3
        # What is one tensor must stay one: it decides which tokens a mask removes, and what has to be projected.
        key_is_query, value_is_key = key is query, value is key
        if norm is not None and not (key_is_query and value_is_key):
            raise ValueError(
                "InfSAAttention: norm is a module, expected None where key or value is not query; apply it before"
            )
        query = self._batch_first(query)
        key = query if key_is_query else self._batch_first(key)
        value = key if value_is_key else self._batch_first(value)
        self._check_sizes(query, key, value)
        key_padding_mask = multihead_padding("key_padding_mask", key_padding_mask, key, batched)
        if query_padding_mask is None and key_is_query:
            query_padding_mask = key_padding_mask
        else:
            query_padding_mask = multihead_padding("query_padding_mask", query_padding_mask, query, batched)

        masks = key_padding_mask, query_padding_mask
        out, weights = self._attend(query, key, value, *masks, need_weights, norm)
        out = self._as_given(out.expand(query.shape))
        if query_padding_mask is not None:
            out = out.masked_fill(self._as_given(query_padding_mask[..., None]), 0)
        if not expanded:
            out = out.contiguous()
        if weights is not None:
            weights = self._finish_weights(weights, query, query_padding_mask, average_attn_weights)
        if not batched:
            return out.flatten(0, 1), None if weights is None else weights.squeeze(0)
        return out, weights

    def pooled(self, x: Tensor, norm: nn.Module | None = None, padding_mask: Tensor | None = None) -> Tensor:
        """Linear-InfSA of ``x`` (B, N, D), whatever batch_first is, as the one row (B, D) that every token gets.

        Args:
            norm: applied to ``x`` first. An nn.LayerNorm is fused.
            padding_mask: (B, N) bool, True = remove that token as query and as key.

        Raises:
            NotImplementedError: another variant, whose rows differ.
        """
        if self.variant != "linear_infsa":
            raise NotImplementedError(
                f"InfSAAttention.pooled: variant is {self.variant!r}, expected 'linear_infsa': pure InfSA has a row of its "
                "own for every token, after every hop; call the module"
            )
        self._check_sizes(x, x, x)
        padding_mask = multihead_padding("padding_mask", padding_mask, x, batched=True)
        return self._attend(x, x, x, padding_mask, padding_mask, False, norm)[0].squeeze(1)

    def _pool(self, x: Tensor, norm: nn.Module | None, padding_mask: Tensor | None) -> Tensor | None:
        """The layer of one set of tokens as a call of pooled_linear_infsa, (B, D), where its projections are only data."""
        if (
            self.variant != "linear_infsa"
            or self.activation != "relu"
            or (self.training and self.dropout > 0)
            or self.bias_k is not None
            or not self.kdim == self.vdim == self.embed_dim
            or self._zero_key_counts
        ):
            return None
        device = x.device
        q, v, out = self.q_proj, self.v_proj, self.out_proj
        k = None if self.tied else self.k_proj
        if not all(p is None or is_plain(p, nn.Linear, device) for p in (q, k, v, out)):
            return None
        if norm is not None and not (is_plain(norm, nn.LayerNorm, device) and norm.normalized_shape == x.shape[-1:]):
            x, norm = self._per_token(norm, x), None
        pooled = pooled_linear_infsa
        if self.sequence_group is not None:
            pooled = functools.partial(distributed.pooled_linear_infsa, group=self.sequence_group)
        return pooled(
            x,
            self.num_heads,
            q.weight,
            v.weight,
            out.weight,
            q_bias=q.bias,
            k_weight=None if k is None else k.weight,
            k_bias=None if k is None else k.bias,
            v_bias=v.bias,
            out_bias=out.bias,
            rho=self.rho,
            eps=self.eps,
            norm_weight=None if norm is None else norm.weight,
            norm_bias=None if norm is None else norm.bias,
            norm_eps=None if norm is None else norm.eps,
            padding_mask=padding_mask,
            score_floor=self.score_floor,
        )

    def _attend(self, query, key, value, key_padding_mask, query_padding_mask, need_weights, norm):
        """The output (B, N, D), or (B, 1, D) if linear, and with need_weights the weights (B, H, N or 1, M)."""
        one_set_of_tokens = key is query and value is key and query_padding_mask is key_padding_mask
        if one_set_of_tokens and not need_weights:
            out = self._pool(query, norm, key_padding_mask)
            if out is not None:
                return out.unsqueeze(1), None
        if norm is not None:
            query = key = value = self._per_token(norm, query)

        q = self._heads(self.q_proj, query)
        if not self.tied:
            k = self._heads(self.k_proj, key)
        else:
            k = q if key is query else self._heads(self.q_proj, key)
        v = self._heads(self.v_proj, value)
        if self.bias_k is not None:
            k, v = (
                torch.cat([t, self._split(b).expand(len(t), -1, -1, -1)], 2)
                for t, b in ((k, self.bias_k), (v, self.bias_v))
            )
            key_padding_mask = None if key_padding_mask is None else F.pad(key_padding_mask, (0, 1))

        if self._zero_key_counts:
            k, v = (F.pad(t, (0, 0, 0, 1)) for t in (k, v))
            key_padding_mask = None if key_padding_mask is None else F.pad(key_padding_mask, (0, 1))

        context, weights = attend(
            q, k, v, self.variant, self.rho, self.eps, key_padding_mask, query_padding_mask,
            hops=self.hops, score_floor=self.score_floor, activation=self.activation,
            dropout_p=self.dropout if self.training else 0.0, need_scores=need_weights, group=self.sequence_group,
        )  # fmt: skip
        out = self._per_token(self.out_proj, context.transpose(1, 2).flatten(2))
        return out, weights if need_weights else None

    @property
    def _zero_key_counts(self) -> bool:
        """Whether the key of add_zero_attn changes the output: it scores 0, of which a floor or softplus makes more."""
        return self.add_zero_attn and (self.score_floor > 0 or self.activation == "softplus")

    def _finish_weights(self, weights, query, query_padding_mask, average):
        if self.add_zero_attn and not self._zero_key_counts:
            weights = F.pad(weights, (0, 1))
        weights = weights.mean(1) if average else weights
        weights = weights.expand(*weights.shape[:-2], query.shape[1], -1)
        if query_padding_mask is not None:
            rows = query_padding_mask[:, :, None]
            weights = weights.masked_fill(rows if average else rows[:, None], 0)
        return weights

    def _heads(self, projection: nn.Module, x: Tensor) -> Tensor:
        """The projection of x (B, N, D), by heads: (B, H, N, d)."""
        return self._split(self._per_token(projection, x))

    def _split(self, x: Tensor) -> Tensor:
        """(B, N, D) as (B, H, N, d), a view."""
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _per_token(self, layer: nn.Module, x: Tensor) -> Tensor:
        """``layer`` of x (B, N, D), called on the tokens as they were given, which are contiguous where x is not."""
        return self._as_given(layer(self._as_given(x)))

    def _as_given(self, x: Tensor) -> Tensor:
        """(B, N, D) in the layout of this module's input, or back: a view."""
        return x if self.batch_first else x.transpose(0, 1)

    def _batch_first(self, x: Tensor) -> Tensor:
        if x.is_nested:
            raise NotImplementedError(
                "InfSAAttention: got a nested tensor, expected a dense one; pad it with .to_padded_tensor(0) and give "
                "key_padding_mask"
            )
        if x.dim() == 2:
            return x.unsqueeze(0)
        return x if self.batch_first or x.dim() != 3 else x.transpose(0, 1)

    def _check_sizes(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        for name, t, size in (("query", query, self.embed_dim), ("key", key, self.kdim), ("value", value, self.vdim)):
            if t.dim() != 3 or t.shape[-1] != size:
                layout = "(B, L, D)" if self.batch_first else "(L, B, D)"
                raise ValueError(
                    f"InfSAAttention: {name} has shape {list(t.shape)} (batch first), expected {layout} or (L, D) "
                    f"with D = {size}"
                )
        if key.shape[0] != query.shape[0]:
            raise ValueError(
                f"InfSAAttention: key has batch size {key.shape[0]}, expected {query.shape[0]}, that of query "
                f"(batch_first is {self.batch_first})"
            )
        if value.shape[:2] != key.shape[:2]:
            raise ValueError(
                f"InfSAAttention: value has {list(value.shape[:2])} batches and tokens, expected those of key, "
                f"{list(key.shape[:2])}"
            )

    def _input_projections(self) -> list[nn.Linear]:
        return [self.q_proj, self.v_proj] if self.tied else [self.q_proj, self.k_proj, self.v_proj]

    def multihead_state_dict(self) -> dict[str, Tensor]:
        """The parameters but rho_logit under the names of an nn.MultiheadAttention of the same sizes, which can load them.

        A tied module's query projection counts as its key projection.

        Raises:
            ValueError: a projection computes more than its weight and bias say (an adapter), or holds them elsewhere.
        """
        return multihead_names(self)

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):
        """As nn.Module's; strict, a checkpoint that is tied where the module is not, or the other way round, says so."""
        demand_same_keys(self, state_dict, strict)
        return super().load_state_dict(state_dict, strict, assign)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """Takes the keys of nn.MultiheadAttention too, which has no rho: this module's stays."""
        take_names(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        text = f"{self.embed_dim}, {self.num_heads}, variant={self.variant!r}, tied={self.tied}"
        shown = {
            "hops": self.hops,
            "dropout": self.dropout,
            "kdim": self.kdim if self.kdim != self.embed_dim else None,
            "vdim": self.vdim if self.vdim != self.embed_dim else None,
            "add_bias_kv": self.bias_k is not None,
            "add_zero_attn": self.add_zero_attn,
            "batch_first": self.batch_first,
            "rho_per_head": self.rho_per_head,
            "score_floor": self.score_floor,
            "activation": self.activation if self.activation != "relu" else None,
        }
        return ", ".join([text, *(f"{name}={value}" for name, value in shown.items() if value)])

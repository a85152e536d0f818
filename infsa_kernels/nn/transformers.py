"""Hugging Face transformers: ``attn_implementation="infsa_pure"`` or another name of VARIANT_OF after :func:`register`.

The models keep their own projections, rotary embeddings, grouped keys and caches; what they hand to attention is honoured or
refused, never dropped. Written for transformers 4.57 and 5.
"""

import functools
import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils

from ..ops.varlen import linear_infsa_varlen, pure_infsa_varlen
from .checks import LEAVE_OUT, NO_CAUSAL, class_path, require
from .functional import attend, check_score_floor
from .masks import padding_of_kept, padding_of_scores_mask, without
from .rho import rho_of

VARIANT_OF = {"infsa_linear": "linear_infsa", "infsa_pure": "pure_infsa", "infsa_multi_hop": "multi_hop_infsa"}
NAME_OF = {variant: name for name, variant in VARIANT_OF.items()}

RHO = 0.95

# transformers 5 makes bidirectional masks, and hands config.is_causal to every attention function.
_BIDIRECTIONAL = getattr(masking_utils, "bidirectional_mask_function", None)
CONFIG_SAYS_CAUSAL = _BIDIRECTIONAL is not None

# Arguments on which no result here depends. Whatever else a model hands to attention is refused, known or not: names change from
# one version of transformers to the next, and what is not understood cannot be honoured.
_HARMLESS = {
    "position_ids",  # rotary embeddings have applied them; sequences that are packed by them are found by _packing
    "cache_position",  # where this call's tokens go in a cache: keys of earlier calls show in their number
    "use_cache",  # the same
    "output_hidden_states",  # what the model returns
    "output_router_logits",  # the same
    "return_dict",  # the same
    "num_items_in_batch",  # the divisor of the loss
    "deterministic",  # asks flash attention for the same bits in every backward; these are always the same
}

# Why InfSA cannot do what is asked most often.
_REFUSED = {
    "softcap": "caps scores before a softmax",
    "s_aux": "are attention sinks, a term of a softmax's denominator",
    "sinks": "are attention sinks, a term of a softmax's denominator",
    "sliding_window": "gives every query keys of its own",
    "position_bias": "is added to the scores of a softmax",
    "indices": "gives every query keys of its own",
    "block_indices": "gives every query keys of its own",
    "head_mask": "scales single heads; set rho_logit, one per head, instead",
    "layer_head_mask": "scales single heads; set rho_logit, one per head, instead",
    "cache": "holds keys of earlier calls, whose queries are gone; use_cache=False",
    "seq_idx": "packs several sequences into one; give cu_seq_lens_q and cu_seq_lens_k",
}

# How flash attention is told of packed sequences.
_PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
_VARLEN = {"linear_infsa": linear_infsa_varlen, "pure_infsa": pure_infsa_varlen}

# Parameters of attention modules that are no second sequence of tokens.
_NO_TOKENS = {
    *("attention_mask", "mask", "causal_attention_mask", "head_mask", "layer_head_mask", "position_mask"),
    *("cache", "past_key_value", "past_key_values", "layer_past", "cache_position", "use_cache", "output_attentions"),
    *("position_ids", "position_embeddings", "query_position_embeddings", "relative_position_embeddings", "position_bias"),
    *("rotary_pos_emb", "freqs_ci"),
    *("cu_seqlens", "max_seqlen", "height", "width", "layer_idx"),
}  # fmt: skip


def register() -> None:
    """Registers "infsa_linear", "infsa_pure" and "infsa_multi_hop" as attention implementations and makers of their masks.

    rho is ``sigmoid(module.rho_logit)`` where the attention module has such a tensor of shape (1,) or (H,), as after
    :func:`infsa_kernels.nn.convert`, and 0.95 elsewhere. ``module.score_floor`` is the floor of Linear, by
    default 0.

    Honoured: padding (``attention_mask``, 1 = keep: those tokens are removed as keys and as queries and get an output of 0),
    packed sequences (``cu_seq_lens_q`` and its like, or ``position_ids`` (1, N) that start anew at 0) by Linear and Pure,
    grouped-query attention, rotary embeddings, dropout, ``output_attentions``. The scale of the scores has no effect: all
    variants divide it out. Refused with NotImplementedError when the model is run: causal attention, a cache of keys, sliding
    windows, masks that differ between queries, position biases, soft-capping, attention sinks, head masks, dropout by
    multi-hop, dropout and weights of packed sequences, and every argument that is not known.

    Cross-attention is computed where it removes no token, and where the module says what it is by ``is_cross_attention = True``
    if there are more keys than queries: as many could come from a cache.

    Example::

        >>> register()
        >>> model = transformers.ViTModel(transformers.ViTConfig(attn_implementation="infsa_linear"))
    """
    for name in VARIANT_OF:
        AttentionInterface.register(name, attention_function(name))
        AttentionMaskInterface.register(name, padding_mask)


def attention_function(name: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """What :func:`register` registers by a name of VARIANT_OF, and transformers by itself from a kernel of the hub."""
    return functools.partial(_attend, VARIANT_OF[name])


def padding_mask(*, mask_function, attention_mask: Tensor | None = None, kv_length: int, kv_offset: int = 0, **kwargs):
    """The mask that a transformers model makes for its layers: (B, M) bool, True = keep, or None.

    A causal or windowed one is made as for sdpa, (B, 1, N, M): a model may make masks that none of its layers use, and
    attention refuses it where it differs between queries.
    """
    lengths = dict(kv_length=kv_length, kv_offset=kv_offset)
    if mask_function is not _BIDIRECTIONAL:
        kwargs |= dict(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
        return masking_utils.sdpa_mask(mask_function=mask_function, attention_mask=attention_mask, **lengths, **kwargs)
    if attention_mask is not None and attention_mask.shape[-1] != kv_length + kv_offset:
        _refuse(
            f"attention_mask covers {attention_mask.shape[-1]} tokens of {kv_length + kv_offset}",
            "masks over cached tokens are not implemented",
        )
    return attention_mask


def _attend(
    variant: str,
    module: nn.Module,
    query: Tensor,  # (B, H, N, d)
    key: Tensor,  # (B, H_kv, M, d)
    value: Tensor,  # (B, H_kv, M, dv)
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    output_attentions: bool | None = False,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """The output (B, N, H, dv), and with output_attentions the weights (B, H, N, M)."""
    is_causal = getattr(module, "is_causal", None) if is_causal is None else is_causal
    if is_causal is None:
        _refuse("it does not say whether it is causal", "if it is not, set its is_causal = False", module)
    if is_causal:
        _refuse("it is causal", NO_CAUSAL, module)
    if scaling is not None and not scaling > 0:
        _refuse(f"scaling is {scaling}", "InfSA divides out the scale of the scores, so it has to be above 0", module)
    for name, given in kwargs.items():
        if given is not None and given is not False and name not in _HARMLESS and name not in _PACKING:
            _refuse(
                f"{name} is given", f"it {_REFUSED.get(name, 'is not known here, so it cannot be honoured')}", module
            )

    B, H, N, _ = query.shape
    M = key.shape[2]
    if key.shape[1] != H:
        key, value = (t.repeat_interleave(H // t.shape[1], dim=1) for t in (key, value))
    # Fewer keys than queries cannot hold those of earlier calls beside this call's own.
    if M > N and not getattr(module, "is_cross_attention", False):
        _refuse(
            f"there are {N} queries and {M} keys",
            "with a cache of keys the sums over queries would miss the earlier ones: run the whole sequence, use_cache=False; "
            "if this is cross-attention from all queries, set its is_cross_attention = True",
            module,
        )
    rho = rho_of(module) if hasattr(module, "rho_logit") else RHO
    floor = getattr(module, "score_floor", 0.0)
    check_score_floor(f"infsa attention in {class_path(module)}", variant, floor)
    sequences = _packing(attention_mask, query, module, **{n: kwargs.get(n) for n in ("position_ids", *_PACKING)})
    if sequences is not None:
        varlen = _VARLEN.get(variant)
        for what, given in (
            ("multi-hop", varlen is None),
            ("dropout", dropout > 0),
            ("its weights", output_attentions),
            ("tokens on several ranks", getattr(module, "sequence_group", None) is not None),
        ):
            if given:
                _refuse(
                    f"{what} of packed sequences",
                    "packed operators have none; give a padded batch and its mask",
                    module,
                )
        tokens = (t.transpose(1, 2).flatten(0, 1) for t in (query, key, value))
        more = {"score_floor": floor} if floor else {}
        return varlen(*tokens, *sequences, rho, **more).unflatten(0, (B, N)), None
    ignore = None
    if attention_mask is not None:
        ignore = _ignored_tokens(attention_mask, (B, H, N, M), module)
        if N != M or is_cross_attention(module) is not False:
            why = "it removes keys and does not say which queries are padding"
            require(~ignore.any(), _refusal("a mask in what may be cross-attention", f"{why}; {SAY_SELF}", module))
            ignore = None

    out, weights = attend(
        query, key, value, variant, rho, 1e-6, ignore, ignore, hops=getattr(module, "hops", None),
        score_floor=floor, dropout_p=dropout, need_scores=output_attentions,
        group=getattr(module, "sequence_group", None),
    )  # fmt: skip
    out, weights = (
        None if t is None else without(ignore, t.expand(*query.shape[:3], t.shape[3])) for t in (out, weights)
    )
    return out.transpose(1, 2).contiguous(), weights if output_attentions else None


def _packing(
    attention_mask, query, module, position_ids, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k
) -> tuple[Tensor, Tensor, int, int] | None:
    """cu_seqlens and longest of packed sequences, in the order of varlen functions; None where nothing is packed.

    As for flash attention they lie one behind another in all rows of the batch. ``position_ids`` without a mask tell of them in
    a batch of one row: 0 begins a sequence.
    """
    B, _, N, _ = query.shape
    if cu_seq_lens_q is not None:
        if attention_mask is not None:
            _refuse("cu_seq_lens_q and a mask are given", "packed sequences have no padding; drop one of them", module)
        keys = cu_seq_lens_q if cu_seq_lens_k is None else cu_seq_lens_k
        # A length that is a tensor would be waited for: all tokens are a bound too.
        longest = (n if isinstance(n, int) else B * N for n in (max_length_q, max_length_k))
        return cu_seq_lens_q, keys, *longest
    if attention_mask is not None or position_ids is None or position_ids.dim() != 2 or position_ids.shape[1] != N:
        return None
    falls = position_ids.diff() < 0
    if B > 1 or torch.compiler.is_compiling():
        why = "this packs several sequences into one; give cu_seq_lens_q, or a padded batch and its attention_mask"
        require(~falls.any(), _refusal("position_ids start anew within a row", why, module))
        return None
    begins = position_ids[0] == 0
    starts = begins.nonzero().flatten()
    if starts.numel() < 2 and not falls.any():
        return None
    if not begins[0] or (falls[0] & ~begins[1:]).any():
        _refuse("position_ids start anew, and not at 0", "packed sequences begin at 0; give cu_seq_lens_q", module)
    cu_seqlens = torch.nn.functional.pad(starts, (0, 1), value=N)
    return cu_seqlens, cu_seqlens, N, N


def _ignored_tokens(mask: Tensor, scores: tuple[int, int, int, int], module: nn.Module) -> Tensor:
    """A mask of this module's, of flash attention's or over scores as (B, M) bool, True = ignore."""
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return padding_of_kept("infsa", mask, (scores[0], scores[3]))
    return padding_of_scores_mask(f"infsa attention in {class_path(module)}", mask, scores)


def is_cross_attention(module: nn.Module) -> bool | None:
    """Whether the keys of a module are other tokens than its queries. None: nothing tells, as its function sees tensors only."""
    says = getattr(module, "is_cross_attention", None)
    if says is not None:
        return bool(says)
    # What takes a second sequence (BART's) gets one in decoders only, where it has such an attribute.
    return False if getattr(module, "is_decoder", None) is False or not other_tokens(type(module)) else None


@torch.compiler.assume_constant_result
@functools.cache
def other_tokens(attention: type[nn.Module]) -> tuple[str, ...]:
    """The parameters of a class of attention modules that may be tokens beside those of its first one."""
    parameters = list(inspect.signature(attention.forward).parameters.values())[2:]
    return tuple(p.name for p in parameters if p.kind is not p.VAR_KEYWORD and p.name not in _NO_TOKENS)


SAY_SELF = "if its keys are the tokens of its queries, set its is_cross_attention = False"


def _refuse(what: str, why: str, module: nn.Module | None = None):
    raise NotImplementedError(_refusal(what, why, module))


def _refusal(what: str, why: str, module: nn.Module | None) -> str:
    where = "" if module is None else f" in {class_path(module)}"
    return f"infsa attention{where}: {what}: {why}{LEAVE_OUT if hasattr(module, 'rho_logit') else ''}"

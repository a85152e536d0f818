"""Tiny models of other libraries at random weights, and what each must compute once its attention is InfSA.

The truth is the original model itself, in float64, while torch's softmax attention is replaced by the reference: projections,
rotary embeddings, grouped keys and norms are the library's own, on the original weights.
"""

import contextlib
from unittest import mock

import timm
import torch
import torchvision
import transformers
from torch import nn

from infsa_kernels import reference

VARIANTS = ("linear_infsa", "pure_infsa", "multi_hop_infsa")
RHO = 0.9
TEXT = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=50)
IMAGES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4)
SPECIAL_TOKENS = dict(bos_token_id=0, cls_token_id=0, eos_token_id=1, sep_token_id=1, pad_token_id=2)
GROUPED = dict(**TEXT, num_key_value_heads=2, head_dim=12, attn_implementation="sdpa")


@contextlib.contextmanager
def reference_instead_of_softmax(variant: str, rho: float = RHO):
    """Inside, torch's scaled_dot_product_attention computes InfSA by the reference."""

    def attend(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        assert dropout_p == 0 and not is_causal
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        keys = queries = None
        if attn_mask is not None:
            keep = attn_mask if attn_mask.dtype == torch.bool else attn_mask == 0
            keys = ~keep.expand(*q.shape[:3], k.shape[2])[:, 0, 0]
            queries = keys if q.shape[2] == k.shape[2] else None
        if variant != "linear_infsa":
            formula = reference.pure if variant == "pure_infsa" else reference.multi_hop
            return formula(q, k, v, rho, 1e-6, keys, queries)
        context = reference.linear(q, k, v, rho, 1e-6, keys, queries)
        return context.unsqueeze(2).expand(*q.shape[:3], -1)

    with mock.patch("torch.nn.functional.scaled_dot_product_attention", attend):
        yield


def bidirectional(config):
    config.is_causal = False
    return config


BUILD = {
    "torchvision ViT": lambda: _torchvision_vit(),
    "timm ViT": lambda: timm.create_model("vit_tiny_patch16_224", embed_dim=32, num_heads=4, depth=2, img_size=32),
    "timm ViT, qk_norm": lambda: timm.create_model(
        "vit_tiny_patch16_224", embed_dim=32, num_heads=4, depth=2, img_size=32, qk_norm=True, scale_attn_norm=True
    ),
    "transformers ViT": lambda: transformers.ViTModel(transformers.ViTConfig(**IMAGES, intermediate_size=48)),
    "transformers DINOv2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**IMAGES)),
    "transformers BERT": lambda: transformers.BertModel(transformers.BertConfig(**TEXT)),
    "transformers ModernBERT": lambda: transformers.ModernBertModel(
        # All layers global: a mask for local ones is made all the same.
        transformers.ModernBertConfig(**TEXT, global_attn_every_n_layers=1, local_attention=4, **SPECIAL_TOKENS)
    ),
    "transformers Llama": lambda: transformers.LlamaModel(bidirectional(transformers.LlamaConfig(**GROUPED))),
    "transformers Qwen3": lambda: transformers.Qwen3Model(bidirectional(transformers.Qwen3Config(**GROUPED))),
}


def _torchvision_vit():
    model = torchvision.models.VisionTransformer(
        image_size=16, patch_size=4, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=48, num_classes=10
    )
    nn.init.normal_(model.heads.head.weight)  # zeros at first
    return model


def build(name: str) -> nn.Module:
    model = BUILD[name]().eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 0.5, 0.2)  # biases that matter
    return model


def inputs_of(model: nn.Module, dtype: torch.dtype = torch.float32) -> dict:
    if hasattr(model, "get_input_embeddings") and isinstance(model.get_input_embeddings(), nn.Embedding):
        return {"input_ids": torch.arange(18).reshape(2, 9) * 7 % 50, "use_cache": False}
    name = "pixel_values" if hasattr(model, "config") else "x"
    size = 32 if type(model).__module__.startswith("timm") else 16
    images = torch.linspace(-2, 2, 2 * 3 * size * size).sin().reshape(2, 3, size, size) * 3
    return {name: images.to(dtype)}


def run(model: nn.Module, inputs: dict) -> torch.Tensor:
    out = model(*inputs.values()) if "x" in inputs else model(**inputs)
    return getattr(out, "last_hidden_state", out)

"""Outputs of linear attention behave like those of softmax attention: views, in-place operations, timm's LayerScale."""

import pytest
import timm
import torch
from torch import nn
from torch.testing import assert_close

from infsa_kernels.nn import InfSAAttention, InfViT, convert
from infsa_kernels.nn.timm import LinearInfSAAttention, PureInfSAAttention

N, B, D, H = 9, 2, 32, 4
VARIANTS = ("linear_infsa", "pure_infsa")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("form", ["self", "cross", "masked", "weights", "dropout", "unbatched", "no grad"])
def test_views_and_writes_in_place(variant, batch_first, form):
    attention = InfSAAttention(D, H, dropout=0.1 * (form == "dropout"), batch_first=batch_first, variant=variant)
    shape = (N, D) if form == "unbatched" else (B, N, D) if batch_first else (N, B, D)
    x = torch.randn(shape)
    mask = torch.arange(N) >= torch.tensor([[5], [9]]) if form == "masked" else None
    with torch.set_grad_enabled(form != "no grad"):
        key = x.clone() if form == "cross" else x
        out = attention(x, key, key, key_padding_mask=mask, need_weights=form == "weights")[0]
        assert out.view(-1, D).shape == (x.numel() // D, D)
        expected = out.detach() * 2 + x
        out.mul_(2).add_(x)
        assert_close(out.detach(), expected)
        first = out.select(-2, 0)
        first += 1  # one token's row, not all
        assert_close(out.detach().select(-2, 1), expected.select(-2, 1))
    if form != "no grad":
        out.sum().backward()
        assert attention.v_proj.weight.grad.isfinite().all()


@pytest.mark.parametrize("batch_first", [False, True])
def test_projections_see_tokens_as_they_were_given(batch_first):
    """Contiguous: no copy of them is made, whichever dimension comes first."""
    seen = []
    attention = InfSAAttention(D, H, batch_first=batch_first, variant="pure_infsa")
    for part in (attention.q_proj, attention.k_proj, attention.v_proj):
        part.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x = torch.randn(N, B, D)
    attention(x)
    assert len(seen) == 3 and all(t.shape == x.shape and t.is_contiguous() for t in seen)


@pytest.mark.parametrize("layer", [LinearInfSAAttention, PureInfSAAttention])
def test_timms_layer_scale_in_place(layer):
    block = timm.models.vision_transformer.Block(D, H, init_values=0.5, attn_layer=layer).eval()
    x = torch.randn(B, N, D)
    expected = block(x)
    block.ls1.inplace = block.ls2.inplace = True
    with torch.no_grad():
        assert_close(block(x), expected)
    block(x).sum().backward()
    attention = block.attn
    for mask in (None, torch.ones(B, 1, 1, N, dtype=torch.bool)):
        attention(x, attn_mask=mask).view(-1).add_(1)


def test_a_converted_encoder_that_adds_in_place():
    encoder = nn.TransformerEncoderLayer(D, H, 64, 0.0)
    attention = convert(encoder).model.self_attn
    x = torch.randn(N, B, D)
    out = attention(x, x, x)[0]
    assert_close(out.view(N * B, D), out.reshape(N * B, D))
    out += x


def test_the_models_own_layers_write_no_row_twice():
    """InfViT only adds the row to its tokens, so there it stays one row."""
    model, strides = InfViT(16, 4, 3, 5, D, 2, H, pool="mean"), []
    for block in model.blocks:
        block.attn.register_forward_hook(lambda _, args, out: strides.append(out[0].stride(1)))
    model(torch.randn(B, 3, 16, 16))
    assert strides == [0, 0]
    attention, x = model.blocks[0].attn, torch.randn(B, N, D)
    assert_close(attention(x, expanded=True)[0], attention(x)[0])

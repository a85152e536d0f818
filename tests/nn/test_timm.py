"""The attention layers for timm's attn_layer argument."""

import pytest
import timm
import torch
from helpers.host_models import RHO, VARIANTS, inputs_of, reference_instead_of_softmax
from safetensors.torch import load_file, save_file
from timm.layers import Attention, LayerNorm

from infsa_kernels.nn.timm import InfSAAttention, LinearInfSAAttention, MultiHopInfSAAttention, PureInfSAAttention

LAYERS = dict(zip(VARIANTS, (LinearInfSAAttention, PureInfSAAttention, MultiHopInfSAAttention)))
TINY = dict(embed_dim=32, num_heads=4, depth=2, img_size=32)


def vit(attn_layer=Attention, name="vit_tiny_patch16_224", **kwargs):
    return timm.create_model(name, **TINY, attn_layer=attn_layer, **kwargs)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "kwargs", [{}, {"qk_norm": True, "scale_attn_norm": True, "qkv_bias": False, "init_values": 0.5}]
)
def test_model_with_timms_weights(variant, kwargs):
    theirs = vit(**kwargs).double().eval()
    ours = vit(LAYERS[variant], **kwargs).double().eval()
    ours.load_state_dict(theirs.state_dict())  # strict: the same keys, rho_logit as it was
    x = inputs_of(theirs, torch.float64)["x"]
    with reference_instead_of_softmax(variant, rho=ours.blocks[0].attn.rho_logit.sigmoid().item()):
        truth = theirs(x)
    out = ours(x)
    torch.testing.assert_close(out, truth, rtol=1e-10, atol=1e-10)
    out.square().sum().backward()
    assert all(block.attn.rho_logit.grad.isfinite() for block in ours.blocks)
    assert set(ours.state_dict()) - set(theirs.state_dict()) == {f"blocks.{i}.attn.rho_logit" for i in range(2)}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kwargs", [{"gated": True}, {"attn_head_dim": 5, "dim_out": 12}])
def test_layer_arguments(variant, kwargs):
    theirs = Attention(32, 4, qkv_bias=True, **kwargs).double()
    ours = LAYERS[variant](32, 4, qkv_bias=True, **kwargs).double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 9, 32).double()
    with reference_instead_of_softmax(variant, rho=ours.rho_logit.sigmoid().item()):
        truth = theirs(x)
    torch.testing.assert_close(ours(x), truth, rtol=1e-11, atol=1e-12)


def test_hooks_of_the_projections_are_called():
    """The pooled layer reads their weights only, so it stays away."""
    attention, x = InfSAAttention(32, 4, qkv_bias=True).double(), torch.randn(2, 9, 32).double()
    pooled, calls = attention(x), []
    attention.qkv.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(attention(x), pooled, rtol=1e-11, atol=1e-12)
    assert calls


def test_variant_and_rho_by_subclass():
    class Frozen(PureInfSAAttention):
        rho_init = RHO
        rho_trainable = False

    model = vit(Frozen)
    assert model.blocks[1].attn.variant == "pure_infsa" and "blocks.1.attn.rho_logit" in dict(model.named_buffers())
    assert model.blocks[1].attn.rho_logit.sigmoid().item() == pytest.approx(RHO)
    assert InfSAAttention.variant == LinearInfSAAttention.variant == "linear_infsa"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "form", ["(B,1,1,N) bool", "(B,1,N,N) bool", "(B,1,N,N) bool, both ways", "(B,1,1,N) float", "(B,H,N,N) float"]
)
def test_padded_batch_equals_single_images(variant, form):
    attention = LAYERS[variant](32, 4, qkv_bias=True).double()
    x = torch.randn(2, 9, 32).double()
    keep = torch.ones(2, 1, 1, 9, dtype=torch.bool)  # SDPA's convention: True = attend
    keep[1, ..., 6:] = False
    mask = keep if "float" not in form else torch.zeros(keep.shape).double().masked_fill(~keep, -torch.inf)
    if "both ways" in form:
        mask = mask & mask.mT
    mask = mask.expand(2, 4 if "H" in form else 1, 9 if "N,N" in form else 1, 9)
    out = attention(x, attn_mask=mask)
    torch.testing.assert_close(out[1, :6], attention(x[1:, :6])[0], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(out[0], attention(x[:1])[0], rtol=1e-11, atol=1e-12)
    assert (out[1, 6:] == 0).all()


def test_what_is_refused():
    attention, x = InfSAAttention(32, 4), torch.randn(2, 9, 32)
    with pytest.raises(NotImplementedError, match="is_causal"):
        attention(x, is_causal=True)
    causal = torch.ones(9, 9, dtype=torch.bool).tril()
    with pytest.raises(NotImplementedError, match="differs between queries"):
        attention(x, attn_mask=causal)
    hidden = torch.ones(9, 9, dtype=torch.bool)
    hidden[2] = False  # a token that is a key but no query
    with pytest.raises(NotImplementedError, match="differs between queries"):
        attention(x, attn_mask=hidden)
    with pytest.raises(NotImplementedError, match="adds values"):
        attention(x, attn_mask=torch.randn(1, 1, 1, 9))
    with pytest.raises(TypeError, match=r"torch\.int64"):
        attention(x, attn_mask=torch.ones(2, 1, 1, 9, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"broadcasts to \[2, 4, 9, 9\]"):
        attention(x, attn_mask=torch.ones(3, 1, 1, 9, dtype=torch.bool))
    with pytest.raises(NotImplementedError, match="tells heads or queries apart"):
        attention(x, attn_mask=torch.ones(1, 4, 1, 1, dtype=torch.bool))


@pytest.mark.parametrize("symbolic", [False, True])
def test_masks_under_compile(symbolic):
    attention, x = InfSAAttention(32, 4), torch.randn(2, 9, 32)
    if symbolic:  # as torch makes of a size that changed before; the mask's may stay a number
        torch._dynamo.maybe_mark_dynamic(x, 1)
    padding = torch.ones(2, 1, 9, 9, dtype=torch.bool)
    padding[1, ..., 6:] = False
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, attn_mask=padding), attention(x, attn_mask=padding))
        with pytest.raises(RuntimeError, match="differs between queries"):
            compiled(x, attn_mask=torch.ones(2, 1, 9, 9, dtype=torch.bool).tril())


@pytest.mark.parametrize("variant", VARIANTS)
def test_dropout(variant):
    attention = LAYERS[variant](32, 4, attn_drop=1.0).train()
    x = torch.randn(2, 9, 32)
    if variant == "multi_hop_infsa":
        with pytest.raises(NotImplementedError, match=r"dropout is 1\.0, expected 0"):
            attention(x)
        return
    torch.testing.assert_close(attention(x), attention.proj.bias.expand(2, 9, -1))
    attention.eval()
    assert torch.equal(attention(x), attention(x)) and not torch.allclose(attention(x)[0, 0], attention.proj.bias)
    attention = LAYERS[variant](32, 4, proj_drop=0.5, norm_layer=LayerNorm).train()
    assert ((attention(x) == 0).float().mean() - 0.5).abs() < 0.15


def test_training_step_safetensors_and_compile(tmp_path):
    model = vit(InfSAAttention, num_classes=5)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    x = inputs_of(model)["x"]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    before = model.blocks[0].attn.rho_logit.item()
    torch.nn.functional.cross_entropy(compiled(x), torch.tensor([1, 3])).backward()
    optimizer.step()
    assert model.blocks[0].attn.rho_logit.item() != before
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    other = vit(InfSAAttention, num_classes=5)
    other.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    with torch.no_grad():
        assert torch.equal(model.eval()(x), other.eval()(x))


def test_images_of_different_sizes_in_one_batch():
    """NaFlexVit pads its batches, and gives attention a mask."""
    model = vit(InfSAAttention, "naflexvit_base_patch16_gap", class_token=False).double().eval()
    patches = torch.randn(2, 6, 16 * 16 * 3).double()
    coord = torch.cartesian_prod(torch.arange(2), torch.arange(3)).expand(2, -1, -1).clone()
    valid = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    coord[1] = torch.nn.functional.pad(torch.cartesian_prod(torch.arange(2), torch.arange(2)), (0, 0, 0, 2))
    out = model({"patches": patches, "patch_coord": coord, "patch_valid": valid})
    alone = model({"patches": patches[1:, :4], "patch_coord": coord[1:, :4], "patch_valid": valid[1:, :4]})
    torch.testing.assert_close(out[1:], alone, rtol=1e-10, atol=1e-10)

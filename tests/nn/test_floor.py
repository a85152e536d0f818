"""score_floor in modules, models, converted models and their adapters, attention maps and ONNX; which InfViT is tied."""

import copy
import pickle

import pytest
import timm
import torch
import transformers
from torch import nn
from torch.testing import assert_close

from infsa_kernels import reference
from infsa_kernels.explain import attention_graphs, attention_maps
from infsa_kernels.nn import InfSAAttention, InfViT, convert, replace_attention
from infsa_kernels.nn.functional import infsa_attention
from infsa_kernels.nn.timm import InfSAAttention as TimmAttention
from infsa_kernels.nn.timm import PureInfSAAttention

B, N, D, H, FLOOR = 2, 11, 24, 3, 0.3


def tokens():
    return torch.randn(B, N, D, dtype=torch.float64)


def attention(**arguments):
    made = InfSAAttention(D, H, batch_first=True, dtype=torch.float64, **{"score_floor": FLOOR} | arguments)
    for name, p in made.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(p, std=0.5)
    return made.eval()


def by_reference(module, x, mask=None, floor=FLOOR):
    def heads(projection):
        return projection(x).unflatten(-1, (H, -1)).transpose(1, 2)

    q, v = heads(module.q_proj), heads(module.v_proj)
    k = q if module.tied else heads(module.k_proj)
    z = reference.linear(q, k, v, module.rho.expand(H), module.eps, mask, mask, floor)
    out = module.out_proj(z.flatten(1))[:, None].expand(x.shape)
    return out if mask is None else out.masked_fill(mask[..., None], 0)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_module_is_the_reference(tied, masked):
    module, x = attention(tied=tied), tokens()
    mask = torch.arange(N) >= torch.tensor([[N], [7]]) if masked else None
    out, weights = module(x, key_padding_mask=mask, need_weights=True)
    assert_close(module(x, key_padding_mask=mask)[0], by_reference(module, x, mask))  # the pooled layer
    assert_close(out, by_reference(module, x, mask))  # with the weights
    kept = torch.ones(B, N, dtype=torch.bool) if mask is None else ~mask
    assert ((weights > 0) == (kept[:, :, None] & kept[:, None])).all()
    assert not torch.allclose(out, by_reference(module, x, mask, 0.0))


def test_a_key_of_zeros_has_its_share():
    """add_zero_attn changes the output where there is a floor: its key scores 0, and gets the floor."""
    module, x = attention(add_zero_attn=True), tokens()
    out, weights = module(x, need_weights=True, average_attn_weights=False)
    assert_close(module(x)[0], out)
    assert weights.shape == (B, H, N, N + 1) and (weights[..., -1] > 0).all()
    plain = attention()
    plain.load_state_dict(module.state_dict())
    assert not torch.allclose(plain(x)[0], out)
    without = attention(add_zero_attn=True, score_floor=0.0)
    without.load_state_dict(module.state_dict())
    assert_close(without(x)[0], by_reference(module, x, floor=0.0))


def test_dropout_is_on_the_scores_with_the_floor():
    module, x = attention(dropout=0.5), tokens()
    assert_close(module(x)[0], by_reference(module, x))
    _, weights = module.train()(x, need_weights=True, average_attn_weights=False)
    _, whole = module.eval()(x, need_weights=True, average_attn_weights=False)
    assert ((weights == 0) | torch.isclose(weights, 2 * whole)).all() and (weights == 0).any()


def test_the_floor_goes_with_a_module():
    module, x = attention(), tokens()
    assert f"score_floor={FLOOR}" in repr(module) and "score_floor" not in repr(attention(score_floor=0.0))
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(copied(x)[0], module(x)[0])
    assert not any("floor" in name for name in module.state_dict())  # it is no weight: as eps and the heads, not saved


def test_compiled():
    module, x = attention(), tokens()
    assert_close(torch.compile(module, backend="aot_eager", fullgraph=True)(x)[0], module(x)[0])


@pytest.mark.parametrize("variant", ["pure_infsa", "multi_hop_infsa"])
def test_other_variants_refuse_it(variant):
    words = f"score_floor is 0.1, expected 0 with variant='{variant}'"
    mha = nn.MultiheadAttention(8, 2)
    q = torch.randn(1, 1, 4, 4)
    for call in (
        lambda: InfSAAttention(8, 2, variant=variant, score_floor=0.1),
        lambda: InfViT(8, 4, 3, 5, 8, 1, 2, variant=variant, score_floor=0.1),
        lambda: convert(mha, variant, score_floor=0.1),
        lambda: replace_attention(mha, variant, score_floor=0.1),
        lambda: infsa_attention(q, q, q, variant, score_floor=0.1),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(ValueError, match="expected 0 with variant='softmax'"):
        InfViT(8, 4, 3, 5, 8, 1, 2, variant="softmax", score_floor=0.1)


@pytest.mark.parametrize("wrong", [-0.1, float("nan"), float("inf")], ids=str)
def test_out_of_range(wrong):
    for name, call in (
        ("InfSAAttention", lambda: InfSAAttention(8, 2, score_floor=wrong)),
        ("InfViT", lambda: InfViT(8, 4, 3, 5, 8, 1, 2, score_floor=wrong)),
        ("convert", lambda: convert(nn.MultiheadAttention(8, 2), score_floor=wrong)),
    ):
        with pytest.raises(
            ValueError, match=f"^{name}: score_floor is {wrong}, expected a finite number of at least 0"
        ):
            call()


def test_convert_takes_it_and_says_which_to_train_with():
    layer, x = nn.TransformerEncoderLayer(D, H, batch_first=True).double().eval(), tokens()
    plain, floored = convert(layer), convert(layer, score_floor=FLOOR)
    assert "score_floor=0.1" in plain.advice and plain.advice in str(plain)
    assert not floored.advice and "advice" not in str(floored)
    assert not convert(layer, "pure_infsa").advice and not convert(nn.Linear(2, 2)).advice
    module = floored.model.self_attn
    assert module.score_floor == FLOOR and not module.tied
    assert_close(module(x)[0], by_reference(module, x))
    assert replace_attention(layer.self_attn, score_floor=FLOOR).score_floor == FLOOR


def test_timm():
    class Floored(TimmAttention):
        score_floor = FLOOR

    def model(layer):
        made = timm.create_model(
            "vit_tiny_patch16_224", attn_layer=layer, depth=1, embed_dim=D, num_heads=H, img_size=32, num_classes=3
        )
        return made.double().eval()

    made, images = model(Floored), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    plain = model(timm.layers.Attention)
    plain.load_state_dict(made.state_dict(), strict=False)
    converted = convert(plain, score_floor=FLOOR).model
    assert_close(converted(images), made(images))
    assert not torch.allclose(convert(plain).model(images), made(images))
    x, inner = tokens(), made.blocks[0].attn
    assert_close(inner(x), inner._attend(x, None).expand(-1, N, -1))  # with the pooled layer and without

    class Wrong(PureInfSAAttention):
        score_floor = FLOOR

    with pytest.raises(ValueError, match=r"Wrong: score_floor is 0\.3, expected 0 with variant='pure_infsa'"):
        model(Wrong)


def test_transformers():
    config = transformers.ViTConfig(hidden_size=D, num_hidden_layers=1, num_attention_heads=H, intermediate_size=8,
                                    image_size=16, patch_size=4)  # fmt: skip
    model, images = transformers.ViTModel(config).double().eval(), torch.randn(2, 3, 16, 16, dtype=torch.float64)
    floored, plain = (convert(model, score_floor=floor).model for floor in (FLOOR, 0.0))
    out = floored(images).last_hidden_state
    assert not torch.allclose(out, plain(images).last_hidden_state)
    for module in plain.modules():
        if hasattr(module, "rho_logit"):
            module.score_floor = FLOOR
    assert_close(plain(images).last_hidden_state, out)


@pytest.mark.parametrize("tied", [False, True])
def test_maps_show_the_weights_with_the_floor(tied):
    """The pooled layer and the plain one; every patch has some weight, as with softmax."""
    model = InfViT(16, 4, 3, 5, D, 2, H, tied=tied, score_floor=FLOOR).double().eval()
    nn.init.normal_(model.pos_embed)
    images = torch.randn(1, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        graphs = attention_graphs(model, images)
        block, x = model.blocks[0], model._embed(images)
        weights = block.attn(block.norm1(x), need_weights=True, average_attn_weights=False)[1][:, :, :1]
    assert_close(graphs[0].scores([0]), weights / block.attn.rho)
    assert (attention_maps(model, images, layer=0) > 0).all()


def test_infvit_is_tied_as_the_paper_has_it():
    for variant, tied in (("linear_infsa", True), ("pure_infsa", False), ("multi_hop_infsa", False)):
        model = InfViT(8, 4, 3, 5, 8, 2, 2, variant=variant)
        assert all(block.attn.tied is tied for block in model.blocks)
        assert all(
            block.attn.tied is not tied for block in InfViT(8, 4, 3, 5, 8, 1, 2, variant=variant, tied=not tied).blocks
        )
    model = InfViT(8, 4, 3, 5, 8, 2, 2, score_floor=FLOOR)
    assert all(block.attn.score_floor == FLOOR for block in model.blocks)


def test_a_checkpoint_of_the_other_kind_says_so():
    tied, untied = (InfViT(8, 4, 3, 5, 8, 2, 2, tied=tied) for tied in (True, False))
    words = (
        r"InfViT\.load_state_dict: blocks\.0\.attn has tied=True, and the checkpoint a projection .*with tied=False$"
    )
    with pytest.raises(RuntimeError, match=words):
        tied.load_state_dict(untied.state_dict())
    with pytest.raises(RuntimeError, match=r"attn has tied=False, and the checkpoint no projection .*with tied=True$"):
        untied.load_state_dict(tied.state_dict())
    assert tied.load_state_dict(untied.state_dict(), strict=False).unexpected_keys
    assert untied.load_state_dict(tied.state_dict(), strict=False).missing_keys
    module = tied.blocks[0].attn
    with pytest.raises(RuntimeError, match=r"^InfSAAttention\.load_state_dict: the module has tied=True"):
        module.load_state_dict(nn.MultiheadAttention(8, 2).state_dict())

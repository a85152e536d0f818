"""activation in modules and models."""

import pytest
import torch
from torch.testing import assert_close

from infsa_kernels import linear_infsa, pure_infsa
from infsa_kernels.explain import attention_graphs
from infsa_kernels.nn import InfSAAttention, InfViT
from infsa_kernels.nn.functional import attend, infsa_attention

B, N, D, H = 2, 9, 12, 3
FUNCTIONS = {"linear_infsa": linear_infsa, "pure_infsa": pure_infsa}


def attention(**arguments):
    return InfSAAttention(D, H, batch_first=True, dtype=torch.float64, **arguments).eval()


@pytest.mark.parametrize("activation", ["gelu", "abs", "softplus"])
@pytest.mark.parametrize("variant", FUNCTIONS)
def test_module_is_the_function_between_its_projections(variant, activation):
    module, x = attention(variant=variant, activation=activation), torch.randn(B, N, D, dtype=torch.float64)
    mask = torch.arange(N) >= torch.tensor([[N], [6]])
    q, k, v = (p(x).unflatten(-1, (H, -1)).transpose(1, 2) for p in (module.q_proj, module.k_proj, module.v_proj))
    z = FUNCTIONS[variant](q, k, v, module.rho.expand(H), module.eps, mask, mask, activation=activation)
    expected = module.out_proj(z.transpose(1, 2).flatten(2)).masked_fill(mask[..., None], 0)
    assert_close(module(x, key_padding_mask=mask)[0], expected)
    assert_close(module(x, key_padding_mask=mask, need_weights=True)[0], expected)
    if variant == "linear_infsa":
        assert_close(module.pooled(x, padding_mask=mask), expected[:, 0])
    z = infsa_attention(q, k, v, variant, 1.0, 0.9, True, activation=activation)  # drops scores
    assert not torch.allclose(z, infsa_attention(q, k, v, variant, 1.0, activation=activation))


@pytest.mark.parametrize("variant", FUNCTIONS)
def test_a_key_of_zeros_counts_where_0_becomes_more(variant):
    x = torch.randn(B, N, D, dtype=torch.float64)
    for activation in ("gelu", "abs", "softplus"):
        torch.manual_seed(0)
        module = attention(variant=variant, activation=activation)
        torch.manual_seed(0)
        with_zero = attention(variant=variant, activation=activation, add_zero_attn=True)
        out, weights = with_zero(x, need_weights=True)
        assert weights.shape == (B, N, N + 1)
        assert (weights[..., -1] > 0).all() == (activation == "softplus")
        assert_close(out, with_zero(x)[0])
        assert torch.allclose(out, module(x)[0]) == (activation != "softplus")


@pytest.mark.parametrize("variant", FUNCTIONS)
def test_models_train(variant):
    model = InfViT(8, 4, 1, 3, 8, 2, 2, variant=variant, activation="gelu", neumann="layer")
    torch.nn.init.normal_(model.head.weight)
    model(torch.randn(2, 1, 8, 12)).square().sum().backward()
    assert all(block.attn.activation == "gelu" for block in model.blocks)
    assert all(p.grad.isfinite().all() and p.grad.any() for n, p in model.named_parameters() if "q_proj.weight" in n)
    with pytest.raises(NotImplementedError, match=r"explain: .* activation 'gelu', expected 'relu'"):
        attention_graphs(model, torch.randn(1, 1, 8, 8))


def test_errors():
    sizes = dict(img_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=2)
    q = torch.randn(1, 2, 3, 4)
    made = {
        "InfViT": lambda **given: InfViT(**sizes, **given),
        "InfSAAttention": lambda **given: InfSAAttention(8, 2, **given),
        "infsa_attention": lambda **given: infsa_attention(q, q, q, **given),
    }
    for name, make in made.items():
        with pytest.raises(
            ValueError, match=f"{name}: activation is 'silu', expected 'relu', 'gelu', 'abs' or 'softplus'"
        ):
            make(activation="silu")
        with pytest.raises(
            NotImplementedError, match=f"{name}: activation is 'abs', expected 'relu' with variant='multi_"
        ):
            make(variant="multi_hop_infsa", activation="abs")
    with pytest.raises(NotImplementedError, match="expected 'relu' with variant='softmax'"):
        InfViT(**sizes, variant="softmax", activation="abs")
    with pytest.raises(NotImplementedError, match="sequence-parallel InfSA: activation is 'abs', not 'relu'"):
        attend(q, q, q, "pure_infsa", 1.0, 1e-6, None, None, activation="abs", group="0")

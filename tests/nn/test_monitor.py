"""`monitor` beside scores that are written out, whoever calls the operators and however."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from infsa_kernels import backend, linear_infsa_scores
from infsa_kernels.nn import InfSAAttention, InfViT, convert, monitor

B, N, D, H = 5, 7, 12, 4


def attention(**arguments):
    torch.manual_seed(1)
    module = InfSAAttention(D, H, batch_first=True, **arguments).double()
    return module, torch.randn(B, N, D, dtype=torch.float64) + 1


def score_sums(module, x):
    """Of Linear-InfSA, written out: (B, H)."""
    q, k = (p(x).unflatten(-1, (H, -1)).transpose(1, 2) for p in (module.q_proj, module.k_proj))
    u = q * q.shape[-1] ** -0.5
    energy = u.norm(dim=-1, keepdim=True)
    central_query = (energy * u).sum(2, keepdim=True) / (energy.sum(2, keepdim=True) + 1e-6)
    return (central_query @ k.mT * q.shape[-1] ** -0.5).relu().sum((-1, -2))


@pytest.mark.parametrize("fused", [True, False], ids=["pooled layer", "operator"])
def test_linear_beside_scores_written_out(fused):
    module, x = attention()
    if not fused:
        module.q_proj.register_forward_hook(lambda *_: None)
    with monitor(module) as found:
        module(x)[0].square().sum().backward()
    expected = score_sums(module, x)
    dead = expected == 0
    assert 0 < dead.sum() < dead.numel(), "the test needs some of both"
    assert_close(found["dead_pairs/"], dead.double().mean().item())
    assert_close(found["dead_heads/"], dead.all(0).double().mean().item())
    assert_close(found["score_sum/"], expected[~dead].median().item(), rtol=1e-5, atol=0)
    assert_close(found["least_score_sum/"], expected[~dead].min().item(), rtol=1e-5, atol=0)
    assert_close(found["rho/"], 0.95, rtol=1e-5, atol=0)
    norm = torch.cat([p.grad.flatten() for p in module.parameters()]).norm().item()
    assert_close([found["gradient_norm/"], found["gradient_norm/model"]], [norm, norm], rtol=1e-5, atol=0)
    assert not module._forward_hooks and not module._forward_pre_hooks


def test_the_share_is_that_of_the_scores():
    """The definition in docs: a pair is dead where all its weights are 0."""
    module, x = attention()
    with torch.no_grad(), monitor(module) as found:
        module(x)
    q, k = (p(x).unflatten(-1, (H, -1)).transpose(1, 2) for p in (module.q_proj, module.k_proj))
    assert_close(found["dead_pairs/"], (linear_infsa_scores(q, k).sum((-1, -2)) == 0).double().mean().item())
    assert "gradient_norm/" not in found and "gradient_norm/model" not in found


@pytest.mark.parametrize("arguments", [dict(variant="pure_infsa"), dict(variant="multi_hop_infsa", hops=3),
                                       dict(variant="multi_hop_infsa")], ids=["pure", "3 hops", "all hops"])  # fmt: skip
def test_pure_has_a_norm(arguments):
    module, x = attention(**arguments)
    with monitor(module) as found:
        module(x)
    q, k = (p(x).unflatten(-1, (H, -1)).transpose(1, 2) for p in (module.q_proj, module.k_proj))
    scores = (q @ k.mT / q.shape[-1]).relu()
    assert_close(found["score_norm/"], scores.norm(dim=(-2, -1)).flatten().median().item(), rtol=1e-5, atol=0)
    assert found["dead_pairs/"] == 0 and "score_sum/" not in found


def test_a_head_that_never_has_a_positive_score():
    module, x = attention()
    with torch.no_grad():
        for projection, bias in ((module.q_proj, 1.0), (module.k_proj, -1.0)):
            projection.weight[:3] = 0
            projection.bias[:3] = bias
    with monitor(module) as found:
        module(x[:2])
        module(x[2:])
    assert found["dead_heads/"] >= 1 / H
    with monitor(module) as first:
        module(x)
    assert first == found, "two small batches are one large one"


def test_only_dead_heads_have_no_score():
    module, x = attention()
    with torch.no_grad():
        module.q_proj.weight.zero_(), module.q_proj.bias.fill_(1.0)
        module.k_proj.weight.zero_(), module.k_proj.bias.fill_(-1.0)
    with monitor(module) as found:
        module(x)
    assert found["dead_pairs/"] == found["dead_heads/"] == 1
    assert math.isnan(found["score_sum/"]) and math.isnan(found["least_score_sum/"])


@pytest.mark.parametrize("how", ["grad", "no_grad", "inference_mode", "autocast", "checkpoint", "eager"])
def test_however_the_model_runs(how):
    torch.manual_seed(0)
    model = InfViT(8, 2, 1, 3, D, 2, H)
    nn.init.normal_(model.head.weight)
    x = torch.randn(B, 1, 8, 8)
    with torch.no_grad(), monitor(model) as expected:
        out = model(x)
    if how == "checkpoint":
        model.set_grad_checkpointing()
    context = {
        "no_grad": torch.no_grad, "inference_mode": torch.inference_mode, "eager": lambda: backend("eager"),
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    }.get(how, torch.enable_grad)  # fmt: skip
    with context(), monitor(model) as found:
        again = model(x)
        if again.requires_grad:
            again.sum().backward()
    size = out.abs().max().item()
    assert_close(again.float(), out, rtol=0, atol=(0.1 if how == "autocast" else 1e-5) * size)
    assert {f"dead_pairs/blocks.{i}.attn" for i in (0, 1)} <= found.keys()
    for tag, value in expected.items():
        assert_close(found[tag], value, rtol=0.1, atol=0.1) if how == "autocast" else assert_close(
            found[tag], value, rtol=1e-4, atol=0
        )


def test_the_model_computes_the_same_bits():
    torch.manual_seed(0)
    model = InfViT(8, 2, 1, 3, D, 2, H)
    nn.init.normal_(model.head.weight)
    x = torch.randn(B, 1, 8, 8)

    def gradients():
        model.zero_grad()
        model(x).square().sum().backward()
        return [p.grad for p in model.parameters()]

    plain = gradients()
    with monitor(model):
        watched = gradients()
    assert all(a.equal(b) for a, b in zip(plain, watched))


def test_a_converted_model_has_its_own_names():
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(D, H, 16, dropout=0.0, batch_first=True), 2, enable_nested_tensor=False
    )
    model = convert(encoder, "linear_infsa").model
    with monitor(model) as found:
        model(torch.randn(B, N, D))
    assert {"dead_pairs/layers.0.self_attn", "dead_pairs/layers.1.self_attn"} <= found.keys()


def test_a_compiled_model_is_seen():
    module, x = attention()
    compiled = torch.compile(module, backend="aot_eager")
    compiled(x)
    with monitor(module) as expected:
        module(x)
    with monitor(compiled) as found:
        compiled(x)
    assert found["dead_pairs/_orig_mod"] == expected["dead_pairs/"]


def test_a_layer_that_did_not_run_is_left_out_and_an_error_goes_through():
    model = nn.ModuleList([attention()[0], attention()[0]])
    x = torch.randn(B, N, D, dtype=torch.float64)
    with monitor(model) as found:
        model[0](x)
    assert "dead_pairs/0" in found and "dead_pairs/1" not in found and "rho/1" in found
    with pytest.raises(ValueError, match="query has shape"), monitor(model) as found:
        model[0](x[..., :3])
    assert found == {} and not any(module._forward_hooks for module in model)


def test_a_model_without_infsa_is_refused():
    with (
        pytest.raises(
            ValueError, match="monitor: model is a Linear without a layer that has rho_logit, expected one with"
        ),
        monitor(nn.Linear(2, 2)),
    ):
        pass


@pytest.mark.parametrize("fused", [True, False], ids=["pooled layer", "operator"])
def test_a_floor_does_not_change_what_is_counted(fused):
    """Scores above 0, before the floor; a dead pair is mean pooling then."""
    counts = []
    for floor in (0.0, 0.1):
        module, x = attention(score_floor=floor)
        if not fused:
            module.q_proj.register_forward_hook(lambda *_: None)
        with monitor(module) as found:
            module(x)
        counts.append({tag: value for tag, value in found.items() if "rho" not in tag})
    assert_close(*counts, rtol=1e-5, atol=0)
    assert counts[1]["dead_pairs/"] > 0

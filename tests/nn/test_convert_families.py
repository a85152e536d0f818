"""convert() on real architectures of torchvision, timm and transformers: exact, or refused with the reason."""

import copy

import pytest
import torch
import transformers
from helpers.host_models import (
    BUILD,
    RHO,
    TEXT,
    VARIANTS,
    bidirectional,
    build,
    inputs_of,
    reference_instead_of_softmax,
    run,
)
from safetensors.torch import load_file, save_file
from torch import nn

from infsa_kernels.nn import convert

TRANSFORMERS = [name for name in BUILD if name.startswith("transformers")]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", BUILD)
def test_converted_model_computes_infsa_with_the_original_weights(name, variant):
    model = build(name).double()
    inputs = inputs_of(model, torch.float64)
    with reference_instead_of_softmax(variant):
        truth = run(model, inputs)
        expected = split_like_converted(gradients_of(model, truth))
    report = convert(model, variant, rho_init=RHO, inplace=True)
    assert report.model is model and len(report.converted) == 2 and not report.refused, report
    out = run(model, inputs)
    torch.testing.assert_close(out, truth, rtol=1e-10, atol=1e-10)
    assert out.std() > 0.01
    gradients = gradients_of(model, out)
    assert set(gradients) - set(expected) == {f"{name}.rho_logit" for name in report.converted}
    for key, gradient in gradients.items():
        assert gradient.isfinite().all()
        if key in expected:
            torch.testing.assert_close(gradient, expected[key], rtol=1e-7, atol=1e-9, msg=key)
        else:
            assert gradient != 0


def gradients_of(model, out):
    names, parameters = zip(*model.named_parameters())
    gradients = torch.autograd.grad(out.square().sum(), parameters, allow_unused=True)
    return {name: gradient for name, gradient in zip(names, gradients) if gradient is not None}


def split_like_converted(gradients):
    """nn.MultiheadAttention's gradients under the names of three projections; the others as they are."""
    split = {}
    for name, gradient in gradients.items():
        prefix, fused, kind = name.partition("in_proj_")
        parts = zip("qkv", gradient.chunk(3)) if fused else ()
        split |= {f"{prefix}{p}_proj.{kind}": part for p, part in parts} if fused else {name: gradient}
    return split


@pytest.mark.parametrize("name", BUILD)
def test_conversion_keeps_dtype_mode_freezing_and_the_original(name):
    model = build(name).bfloat16().train()
    for parameter in list(model.parameters())[::2]:
        parameter.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    modules = dict(model.named_modules())
    new = convert(model, "pure_infsa").model
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    assert all(p.dtype == torch.bfloat16 for p in new.parameters())
    assert all(m.training for m in new.modules())
    frozen = {key: p.requires_grad for key, p in model.named_parameters()}
    for key, p in new.named_parameters():
        assert p.requires_grad == frozen.get(key, p.requires_grad), key
        if key in before:
            assert torch.equal(p, before[key])
    assert run(new, inputs_of(new, torch.bfloat16)).isfinite().all()


@pytest.mark.parametrize("name", BUILD)
def test_converted_model_trains_and_survives_safetensors(name, tmp_path):
    model = convert(build(name), "linear_infsa", inplace=True).model.train()
    inputs = inputs_of(model)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    before = {key: p.clone() for key, p in model.named_parameters()}
    run(model, inputs).square().mean().backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    changed = {key for key, p in model.named_parameters() if not torch.equal(p, before[key])}
    assert {key for key in before if "rho_logit" in key} <= changed
    assert any("mlp" in key or "feed_forward" in key or "intermediate" in key for key in changed)

    save_file({key: t.contiguous() for key, t in model.state_dict().items()}, tmp_path / "weights.safetensors")
    other = convert(build(name), "linear_infsa", inplace=True).model
    other.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    model.eval()
    assert torch.equal(run(model, inputs), run(other, inputs))


@pytest.mark.parametrize("name", ["torchvision ViT", "timm ViT", "transformers ViT", "transformers BERT"])
@pytest.mark.one_in(2)
def test_converted_model_compiles_without_a_graph_break(name):
    model = convert(build(name), "linear_infsa", inplace=True).model
    inputs = inputs_of(model)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(run(compiled, inputs), run(model, inputs))


def causal_models():
    yield (
        transformers.GPT2Model(
            transformers.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=50, bos_token_id=0, eos_token_id=0)
        ),
        "it is causal",
    )
    yield transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT)), "it is causal"
    yield transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**TEXT)), "it is causal"
    yield transformers.BertModel(transformers.BertConfig(**TEXT, is_decoder=True)), "it belongs to a decoder"
    yield (
        transformers.T5Model(
            transformers.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, vocab_size=50)
        ),
        "position biases",
    )
    yield (
        transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT, bos_token_id=0, eos_token_id=1)),
        "it is causal",
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_causal_models_are_refused_and_left_as_they_are(variant):
    for model, reason in causal_models():
        modules, state = list(model.modules()), set(model.state_dict())
        implementation = model.config._attn_implementation
        report = convert(model, variant, inplace=True)
        assert not report.converted and report.refused
        assert all(reason in why for why in report.refused.values()), report
        assert list(model.modules()) == modules and set(model.state_dict()) == state
        assert model.config._attn_implementation == implementation


def test_encoder_of_a_causal_decoder_converts_alone():
    sizes = dict(encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4)
    config = transformers.BartConfig(d_model=32, encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=50, **sizes)
    model = transformers.BartModel(config).eval().double()
    tokens = {"input_ids": torch.arange(14).reshape(2, 7), "attention_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3])}
    with reference_instead_of_softmax("pure_infsa"):
        truth = model.encoder(**tokens).last_hidden_state
    report = convert(model, "pure_infsa", rho_init=RHO, inplace=True)
    assert list(report.converted) == ["encoder.layers.0.self_attn"] and len(report.refused) == 2
    out = model.encoder(**tokens).last_hidden_state
    keep = tokens["attention_mask"].bool()
    torch.testing.assert_close(out[keep], truth[keep], rtol=1e-10, atol=1e-10)
    assert model(**tokens, decoder_input_ids=tokens["input_ids"]).last_hidden_state.isfinite().all()


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_part_of_a_transformers_model(name):
    model = build(name).double()
    implementation = model.config._attn_implementation
    report = convert(model, "pure_infsa", rho_init=RHO, include_patterns=r"\.1\.", inplace=True)
    assert len(report.converted) == 1 and not report.refused
    assert model.config._attn_implementation == implementation != report.model.get_submodule(*report.converted).config
    assert run(model, inputs_of(model, torch.float64)).isfinite().all()


def test_part_of_a_padded_model():
    """The other layer is softmax, so the mask is over scores."""
    model = convert(build("transformers BERT"), "linear_infsa", include_patterns=r"\.1\.", inplace=True).model
    ids, mask = torch.arange(18).reshape(2, 9), torch.tensor([[1] * 9, [1] * 6 + [0] * 3])
    out = model(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(out[1:, :6], model(input_ids=ids[1:, :6]).last_hidden_state)
    causal = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril()
    with pytest.raises(NotImplementedError, match="differs between queries"):
        model(input_ids=ids, attention_mask=causal)


@pytest.mark.parametrize("name", ["torchvision ViT", "timm ViT", "transformers ViT", "transformers BERT"])
def test_new_weights_on_request(name):
    model = build(name)
    report = convert(model, copy_weights=False)
    old = model.state_dict()
    for key, t in report.model.state_dict().items():
        drawn = any(key.startswith(module) for module in report.converted)
        assert key not in old or torch.equal(t, old[key]) != drawn, key


def test_new_weights_that_nobody_can_draw():
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=50, bos_token_id=0, eos_token_id=0)
    report = convert(transformers.GPT2Model(bidirectional(config)), copy_weights=False)
    assert "pytorch_utils.Conv1D has no reset_parameters" in report.refused["h.0.attn"]


def test_forward_replaced_on_the_object():
    model = build("timm ViT")
    attention = model.blocks[0].attn
    attention._hf_hook, attention.forward = object(), attention.forward  # as accelerate does
    report = convert(model, inplace=True)
    assert list(report.converted) == ["blocks.1.attn"] and "forward was replaced" in report.refused["blocks.0.attn"]


def test_attention_that_nobody_knows_is_reported():
    report = convert(transformers.ViTModel(transformers.ViTConfig(num_hidden_layers=0)))
    assert str(report) == "no attention found"

    class WindowAttention(nn.Module):
        pass

    model = nn.Sequential(WindowAttention())
    where = f"{__name__}.test_attention_that_nobody_knows_is_reported.<locals>.WindowAttention"
    assert convert(model).refused == {"0": f"{where} is none of the classes that convert() knows"}

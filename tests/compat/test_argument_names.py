"""Names of a library's arguments change from version to version: what decides is what attention is given, in real models."""

import inspect

import pytest
import torch
import transformers
from helpers.host_models import GROUPED, IMAGES, RHO, TEXT, VARIANTS, bidirectional, reference_instead_of_softmax
from torch.testing import assert_close

from infsa_kernels import reference
from infsa_kernels.nn import convert
from infsa_kernels.nn import transformers as integration
from infsa_kernels.nn.transformers import NAME_OF, register

IDS = torch.arange(6)[None]
ENDS = dict(bos_token_id=0, eos_token_id=1, pad_token_id=2)
GPT2 = dict(n_embd=32, n_layer=2, n_head=4, vocab_size=50, **ENDS)
DECODERS = {
    "Llama": lambda: transformers.LlamaForCausalLM(bidirectional(transformers.LlamaConfig(**GROUPED))),
    "Qwen2": lambda: transformers.Qwen2ForCausalLM(
        bidirectional(transformers.Qwen2Config(**TEXT, num_key_value_heads=2))
    ),
    "GPT-2": lambda: transformers.GPT2LMHeadModel(bidirectional(transformers.GPT2Config(**GPT2))),
    "OPT": lambda: transformers.OPTForCausalLM(
        bidirectional(transformers.OPTConfig(**TEXT, ffn_dim=48, word_embed_proj_dim=32))
    ),
}
BART = dict(d_model=32, encoder_layers=2, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4)
ENCODERS = {
    "BERT": lambda: transformers.BertModel(transformers.BertConfig(**TEXT)),
    "RoBERTa": lambda: transformers.RobertaModel(transformers.RobertaConfig(**TEXT)),
    "BART": lambda: transformers.BartModel(
        transformers.BartConfig(**BART, encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=50)
    ).encoder,
    "Llama": lambda: transformers.LlamaModel(bidirectional(transformers.LlamaConfig(**GROUPED))),
    "CLIP's vision": lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**IMAGES, intermediate_size=48)),
    "Whisper": lambda: transformers.WhisperModel(
        transformers.WhisperConfig(
            **BART, encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=50, num_mel_bins=8, max_source_positions=10, **ENDS
        )
    ).encoder,
    "SegFormer": lambda: transformers.SegformerModel(  # fewer keys than queries
        transformers.SegformerConfig(
            num_encoder_blocks=1, depths=[2], sr_ratios=[2], hidden_sizes=[32], num_attention_heads=[4],
            patch_sizes=[3], strides=[2], mlp_ratios=[2],
        )
    ),
}  # fmt: skip


def inputs_of(model, dtype):
    if model.main_input_name == "input_ids":
        return {"input_ids": torch.arange(18).reshape(2, 9) * 7 % 50}
    shape = (2, 8, 20) if model.main_input_name == "input_features" else (2, 3, 16, 16)
    return {model.main_input_name: torch.randn(shape, dtype=dtype)}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("how", ["register", "convert"])
@pytest.mark.parametrize("name", DECODERS)
def test_decoding_with_a_cache_is_refused_and_prefill_is_right(name, how, variant):
    torch.manual_seed(0)
    model = DECODERS[name]().double().eval()
    if how == "register":
        register()
        model.set_attn_implementation(NAME_OF[variant])
    else:
        assert len(convert(model, variant, inplace=True).converted) == 2
    prefill = model(input_ids=IDS, use_cache=True)
    assert_close(prefill.logits, model(input_ids=IDS, use_cache=False).logits, rtol=1e-10, atol=1e-10)
    called = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    for later in (IDS[:, :1], IDS):  # a step, a chunk
        with pytest.raises(NotImplementedError, match="use_cache=False"):
            model(input_ids=later, **{called: prefill.past_key_values})
    for cache in ({}, {"cache_implementation": "static"}):
        with pytest.raises(NotImplementedError, match="cache"):
            model.generate(IDS, max_new_tokens=3, do_sample=False, **cache)

    # Told, or the token that pads would be taken for padding.
    mask = torch.ones_like(IDS)
    tokens = model.generate(
        IDS, attention_mask=mask, max_new_tokens=3, do_sample=False, use_cache=False, eos_token_id=-1
    )
    expected = IDS
    for _ in range(3):
        expected = torch.cat([expected, model(input_ids=expected).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(tokens, expected)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_compute_the_reference_and_padding_as_each_sample_alone(name, variant):
    torch.manual_seed(0)
    model = ENCODERS[name]().double().eval()
    inputs = inputs_of(model, torch.float64)
    if (name, variant) == ("SegFormer", "multi_hop_infsa"):
        convert(model, variant, inplace=True)
        with pytest.raises(ValueError, match="64 queries and 16 keys"):  # its keys are fewer: there is no second hop
            model(**inputs)
        return
    with reference_instead_of_softmax(variant):
        truth = model(**inputs).last_hidden_state
    report = convert(model, variant, rho_init=RHO, inplace=True)
    assert len(report.converted) == 2 and not report.refused, report
    assert_close(model(**inputs).last_hidden_state, truth, rtol=1e-10, atol=1e-10)
    if "input_ids" in inputs:
        mask = torch.tensor([[1] * 9, [1] * 6 + [0] * 3])
        out = model(**inputs, attention_mask=mask).last_hidden_state
        alone = model(input_ids=inputs["input_ids"][1:, :6]).last_hidden_state
        assert_close(out[1:, :6], alone, rtol=1e-10, atol=1e-10)


def test_packed_sequences_by_the_positions_of_a_batch_are_refused():
    """Flash attention looks for them in a batch of one row only."""
    model = convert(DECODERS["Llama"]().eval(), inplace=True).model
    ids, packed = IDS.expand(2, -1), torch.tensor([[0, 1, 2, 0, 1, 2]]).expand(2, -1)
    with pytest.raises(NotImplementedError, match="packs several sequences"):
        model(input_ids=ids, position_ids=packed)
    model(input_ids=ids, position_ids=packed.sort().values)


def bart_attention(**kwargs):
    config = transformers.BartConfig(**BART, attn_implementation="infsa_pure")
    return transformers.models.bart.modeling_bart.BartAttention(32, 4, config=config, **kwargs).double().eval()


def test_cross_attention_that_does_not_say_so():
    """BART's class serves as either: more keys could be a cache's, and a mask does not say which queries are padding."""
    register()
    cross = bart_attention(is_decoder=True)
    queries, keys = torch.randn(2, 5, 32).double(), torch.randn(2, 7, 32).double()
    with pytest.raises(NotImplementedError, match="is_cross_attention = True"):
        cross(queries, key_value_states=keys)
    for given in (keys[:, :5], keys[:, :3]):
        keep = torch.ones(2, given.shape[1], dtype=torch.bool)
        out = cross(queries, key_value_states=given)[0]
        assert_close(cross(queries, key_value_states=given, attention_mask=keep)[0], out)
        keep[1, 2:] = False
        with pytest.raises(NotImplementedError, match="which queries are padding"):
            cross(queries, key_value_states=given, attention_mask=keep)

    cross.is_cross_attention = True
    q, k, v = (
        project(x).view(2, -1, 4, 8).transpose(1, 2)
        for project, x in ((cross.q_proj, queries), (cross.k_proj, keys), (cross.v_proj, keys))
    )
    truth = cross.out_proj(reference.pure(q, k, v, integration.RHO).transpose(1, 2).flatten(2))
    assert_close(cross(queries, key_value_states=keys)[0], truth)


def test_convert_asks_when_a_module_may_be_cross_attention():
    class Unsaid(transformers.models.bart.modeling_bart.BartAttention):
        """A bidirectional model's, with nothing that tells a decoder's from an encoder's."""

    attention = bart_attention()
    attention.__class__ = Unsaid
    assert convert(attention).converted
    del attention.is_decoder
    assert "takes key_value_states, so it may be cross-attention" in convert(attention).refused[""]
    attention.is_cross_attention = True
    assert "it is cross-attention" in convert(attention).refused[""]
    attention.is_cross_attention = False
    assert convert(attention).converted


def test_refusals_of_converted_modules_say_how_to_leave_them_out():
    model = convert(DECODERS["Llama"]().eval(), inplace=True).model
    with pytest.raises(NotImplementedError, match=r"modeling_llama\.LlamaAttention: .*convert\(exclude_patterns="):
        model(input_ids=IDS, is_causal=True)

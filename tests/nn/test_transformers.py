"""attn_implementation="infsa_linear", "infsa_pure", "infsa_multi_hop" in transformers, by register() alone: rho is 0.95."""

import pytest
import torch
import transformers
from helpers.host_models import GROUPED, IMAGES, TEXT, bidirectional, inputs_of, reference_instead_of_softmax, run
from torch import nn

from infsa_kernels import reference
from infsa_kernels.nn import transformers as integration
from infsa_kernels.nn.transformers import VARIANT_OF, register

NAMES = tuple(VARIANT_OF)


@pytest.fixture(autouse=True)
def _registered():
    register()


def bert(name, **kwargs) -> transformers.BertModel:
    torch.manual_seed(0)
    config = transformers.BertConfig(**TEXT, attn_implementation=name, **kwargs)
    return transformers.BertModel(config).double().eval()


class Module(nn.Module):
    """What an attention function sees of the module that calls it. Its arguments say nothing of a cache."""

    def __init__(self, **attributes):
        super().__init__()
        self.__dict__.update({"is_causal": False, **attributes})

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        raise AssertionError


def attend(name, module, q, k, v, mask=None, **kwargs):
    return transformers.AttentionInterface()[name](module, q, k, v, mask, **kwargs)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("build", [
    lambda n: transformers.ViTModel(transformers.ViTConfig(**IMAGES, intermediate_size=48, attn_implementation=n)),
    lambda n: bert(n),
    lambda n: transformers.Qwen3Model(bidirectional(transformers.Qwen3Config(**GROUPED | {"attn_implementation": n}))),
])  # fmt: skip
def test_model_computes_the_reference(build, name):
    torch.manual_seed(0)
    theirs = build("sdpa").double().eval()
    ours = build(name).double().eval()
    ours.load_state_dict(theirs.state_dict())
    inputs = inputs_of(ours, torch.float64)
    with reference_instead_of_softmax(VARIANT_OF[name], rho=0.95):
        truth = run(theirs, inputs)
    torch.testing.assert_close(run(ours, inputs), truth, rtol=1e-10, atol=1e-10)
    theirs.set_attn_implementation(name)
    assert torch.equal(run(theirs, inputs), run(ours, inputs))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.one_in(3)
def test_padded_batch_equals_single_texts(name, side):
    model = bert(name)
    ids = torch.arange(18).reshape(2, 9) * 5 % 50
    kept = slice(0, 6) if side == "right" else slice(3, 9)
    mask = torch.zeros(2, 9, dtype=torch.long)  # 1 = keep
    mask[0], mask[1, kept] = 1, 1
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    out = model(input_ids=ids, attention_mask=mask, position_ids=position_ids).last_hidden_state
    alone = model(input_ids=ids[1:, kept]).last_hidden_state
    torch.testing.assert_close(out[1:, kept], alone, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(out[:1], model(input_ids=ids[:1]).last_hidden_state, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(out[1, kept], model(input_ids=ids).last_hidden_state[1, kept], atol=1e-3)
    four = mask[:, None, None, :].bool()
    for custom in (four.expand(2, 1, 9, 9), torch.zeros(2, 1, 9, 9).double().masked_fill(~four, -torch.inf)):
        again = model(input_ids=ids, attention_mask=custom, position_ids=position_ids).last_hidden_state
        torch.testing.assert_close(again[1:, kept], alone, rtol=1e-10, atol=1e-10)
    if side == "left":
        return  # compiled, both are one graph
    with torch.no_grad():
        # All hops are found by iteration, whose end no graph knows.
        compiled = torch.compile(model, fullgraph=name != "infsa_multi_hop", backend="aot_eager")
        again = compiled(input_ids=ids, attention_mask=mask, position_ids=position_ids).last_hidden_state
    torch.testing.assert_close(again, out)


@pytest.mark.parametrize("name", NAMES)
def test_output_attentions_are_the_weights(name):
    out = bert(name)(**inputs_of(bert(name)), output_attentions=True)
    assert len(out.attentions) == 2 and out.attentions[0].shape == (2, 4, 9, 9)
    q, k, v = torch.randn(3, 2, 4, 9, 8).double().unbind()
    plain, none = attend(name, Module(), q, k, v)
    result, weights = attend(name, Module(), q, k, v, output_attentions=True)
    assert none is None
    torch.testing.assert_close(result, plain)
    torch.testing.assert_close((weights @ v).transpose(1, 2), plain)


@pytest.mark.parametrize("name", NAMES)
def test_grouped_keys_wide_values_and_rho_of_the_module(name):
    q, k, v = torch.randn(2, 4, 9, 8).double(), torch.randn(2, 2, 9, 8).double(), torch.randn(2, 2, 9, 5).double()
    module = Module(rho_logit=torch.randn(4).double().requires_grad_())
    out, _ = attend(name, module, q, k, v, scaling=0.2)
    k, v = (t[:, [0, 0, 1, 1]] for t in (k, v))
    rho = module.rho_logit.sigmoid()
    formula = {"infsa_linear": reference.linear, "infsa_pure": reference.pure, "infsa_multi_hop": reference.multi_hop}
    truth = formula[name](q, k, v, rho)
    if name == "infsa_linear":
        truth = truth.unsqueeze(2).expand(2, 4, 9, 5)
    torch.testing.assert_close(out, truth.transpose(1, 2))
    out.sum().backward()
    assert module.rho_logit.grad.abs().min() > 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_padding_gets_an_output_of_zero(name, dtype):
    q, k, v = torch.randn(3, 2, 4, 9, 8).unbind()
    keep = torch.tensor([[1] * 9, [1] * 6 + [0] * 3]).to(dtype)
    out, _ = attend(name, Module(), q, k, v, keep)
    again, weights = attend(name, Module(), q, k, v, keep, output_attentions=True)
    assert (out[1, 6:] == 0).all() and (out[1, :6] != 0).any() and (out[0] != 0).any()
    assert (weights[1, :, 6:] == 0).all() and (weights[1, :, :, 6:] == 0).all()
    torch.testing.assert_close(again, out)


@pytest.mark.parametrize("name", NAMES)
def test_dropout_is_on_the_scores(name):
    q, k, v = torch.randn(3, 2, 4, 9, 8).unbind()
    if name == "infsa_multi_hop":
        with pytest.raises(NotImplementedError, match=r"dropout is 1\.0, expected 0"):
            attend(name, Module(), q, k, v, dropout=1.0)
        return
    assert (attend(name, Module(), q, k, v, dropout=1.0)[0] == 0).all()
    model = bert(name, attention_probs_dropout_prob=0.5).train()
    inputs = inputs_of(model)
    assert not torch.equal(run(model, inputs), run(model, inputs))


REFUSED_CALLS = {
    "causal by the module": (dict(is_causal=True), {}, "is causal"),
    "silence": (dict(is_causal=None), {}, "does not say whether it is causal"),
    "causal by the call": ({}, dict(is_causal=True), "is causal"),
    "a cache": ({}, dict(keys=12), "cache of keys"),
    "negative scale": ({}, dict(scaling=-1.0), "scaling is -1.0"),
    "mask in cross-attention": (
        dict(is_cross_attention=True),
        dict(mask=torch.arange(18).reshape(2, 9) < 17),
        "cross-att",
    ),
    "causal mask": ({}, dict(mask=torch.ones(1, 1, 9, 9, dtype=torch.bool).tril()), "differs between queries"),
    "additive bias": ({}, dict(mask=torch.randn(1, 4, 9, 9)), "adds values"),
    "head mask in place of a mask": ({}, dict(mask=torch.ones(1, 4, 1, 1)), "tells heads or queries apart"),
    "no mask we know": ({}, dict(mask=object()), "expected a Tensor"),
    "an argument of a later version": ({}, dict(keys_to_come=torch.ones(1)), "keys_to_come is given: it is not known"),
    **{key: ({}, {key: torch.ones(1)}, f"{key} is given") for key in integration._REFUSED},
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", REFUSED_CALLS)
def test_what_attention_is_asked_and_cannot_do_is_refused(case, name):
    attributes, kwargs, reason = REFUSED_CALLS[case]
    kwargs = dict(kwargs)
    q, k = torch.randn(2, 4, 9, 8), torch.randn(2, 4, kwargs.pop("keys", 9), 8)
    with pytest.raises(NotImplementedError, match=reason):
        attend(name, Module(**attributes), q, k, k, **kwargs)


@pytest.mark.parametrize("name", NAMES)
def test_arguments_without_an_effect_are_taken(name):
    q = torch.randn(2, 4, 9, 8)
    harmless = dict.fromkeys(integration._HARMLESS, True) | {"position_ids": torch.arange(9)[None]}
    out, _ = attend(name, Module(), q, q, q, **harmless, softcap=None, head_mask=None)
    assert torch.equal(out, attend(name, Module(), q, q, q)[0])


def packed_qwen(name, **kwargs):
    torch.manual_seed(0)
    config = bidirectional(transformers.Qwen3Config(**GROUPED | {"attn_implementation": name}, **kwargs))
    return transformers.Qwen3Model(config).double().eval()


PACKED = {"cu_seq_lens_q": [0, 4, 4, 9, 12], "max_length_q": 5}
POSITIONS = torch.tensor([[*range(4), *range(5), *range(3)]])


@pytest.mark.parametrize("name", NAMES[:2])
def test_packed_input_equals_single_texts(name):
    """By offsets and by positions, and both in a model: what flash attention is given reaches the packed operators."""
    model = packed_qwen(name)
    ids = torch.arange(12)[None] * 5 % 50
    alone = [model(input_ids=ids[:, part]).last_hidden_state for part in (slice(0, 4), slice(4, 9), slice(9, 12))]
    offsets = torch.tensor(PACKED["cu_seq_lens_q"], dtype=torch.int32)
    told = dict(cu_seq_lens_q=offsets, cu_seq_lens_k=offsets, max_length_q=5, max_length_k=5)
    for kwargs in ({}, told, {"cu_seq_lens_q": offsets}):
        out = model(input_ids=ids, position_ids=POSITIONS, **kwargs).last_hidden_state
        torch.testing.assert_close(out, torch.cat(alone, 1), rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        again = compiled(input_ids=ids, position_ids=POSITIONS, **told).last_hidden_state
    torch.testing.assert_close(again, out)


@pytest.mark.parametrize(("name", "floor"), [("infsa_linear", 0.0), ("infsa_linear", 0.3), ("infsa_pure", 0.0)])
def test_packed_batches_lie_one_behind_another(name, floor):
    q, k, v = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 5)
    offsets = torch.tensor([0, 5, 12])  # the second sequence begins in the first row of the batch
    module = Module(rho_logit=torch.zeros(4), score_floor=floor)
    out, weights = attend(name, module, q, k, v, cu_seq_lens_q=offsets)
    assert weights is None and out.shape == (2, 6, 4, 5)
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (q, k[:, [0, 0, 1, 1]], v[:, [0, 0, 1, 1]]))
    for part in (slice(0, 5), slice(5, 12)):
        one = (t[part].transpose(0, 1)[None] for t in (q, k, v))
        truth, _ = attend(name, module, *one)
        torch.testing.assert_close(out.flatten(0, 1)[part], truth[0])


@pytest.mark.parametrize("packed", [{}, {"cu_seq_lens_q": torch.tensor([0, 5, 12])}], ids=["batch", "packed"])
def test_a_floor_is_of_linear(packed):
    q = torch.randn(1, 4, 12, 8)
    with pytest.raises(ValueError, match=r"Module: score_floor is 0\.3, expected 0 with variant='pure_infsa'"):
        attend("infsa_pure", Module(score_floor=0.3), q, q, q, **packed)


@pytest.mark.parametrize(("name", "module", "kwargs", "reason"), [
    ("infsa_multi_hop", {}, {}, "multi-hop of packed sequences"),
    ("infsa_pure", {"sequence_group": "0"}, {}, "tokens on several ranks of packed sequences"),
    ("infsa_pure", {}, {"dropout": 0.1}, "dropout of packed sequences"),
    ("infsa_linear", {}, {"output_attentions": True}, "its weights of packed sequences"),
    ("infsa_pure", {}, {"mask": torch.ones(1, 12, dtype=torch.long)}, "cu_seq_lens_q and a mask are given"),
    ("infsa_pure", {}, {"cu_seq_lens_q": None, "position_ids": POSITIONS + 1}, "start anew, and not at 0"),
])  # fmt: skip
def test_packed_input_that_is_refused(name, module, kwargs, reason):
    q = torch.randn(1, 4, 12, 8)
    with pytest.raises(NotImplementedError, match=reason):
        attend(name, Module(**module), q, q, q, **{"cu_seq_lens_q": torch.tensor(PACKED["cu_seq_lens_q"])} | kwargs)


def test_wrong_masks():
    q = torch.randn(2, 4, 9, 8)
    with pytest.raises(TypeError, match=r"dtype torch\.float32, expected bool or integers, 1 = keep"):
        attend("infsa_pure", Module(), q, q, q, torch.ones(2, 9))
    with pytest.raises(ValueError, match=r"expected \(B, M\) = \[2, 9\]"):
        attend("infsa_pure", Module(), q, q, q, torch.ones(2, 8, dtype=torch.bool))


def causal_models(name):
    text = TEXT | {"attn_implementation": name}
    ends = dict(bos_token_id=0, eos_token_id=1)
    yield transformers.LlamaForCausalLM(transformers.LlamaConfig(**text))
    yield transformers.GPT2Model(
        transformers.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=50, attn_implementation=name)
    )
    yield transformers.BertModel(transformers.BertConfig(**text, is_decoder=True))
    yield transformers.CLIPTextModel(transformers.CLIPTextConfig(**text, **ends))
    yield transformers.ModernBertModel(transformers.ModernBertConfig(**text, pad_token_id=0, **ends))  # sliding windows
    yield transformers.T5EncoderModel(
        transformers.T5Config(
            d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, vocab_size=50, attn_implementation=name
        )
    )


@pytest.mark.parametrize("name", NAMES)
def test_causal_and_local_models_are_refused_when_run(name):
    for model in causal_models(name):
        with pytest.raises(NotImplementedError, match="infsa"):
            model(input_ids=torch.arange(6)[None])
        with pytest.raises(NotImplementedError, match="infsa"):
            model(input_ids=torch.arange(6)[None], attention_mask=torch.ones(1, 6, dtype=torch.long))

"""convert() and replace_attention() on nn.MultiheadAttention and torch's own Transformer layers."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.utils import parametrizations

from infsa_kernels import reference
from infsa_kernels.nn import InfSAAttention, convert, replace_attention

VARIANTS = ("linear_infsa", "pure_infsa")
KINDS = {
    "plain": {},
    "batch_first": dict(batch_first=True),
    "no bias": dict(bias=False),
    "kdim, vdim": dict(kdim=12, vdim=20, batch_first=True),
    "bias_kv": dict(add_bias_kv=True),
    "zero_attn": dict(add_zero_attn=True, batch_first=True),
}


def multihead(**kwargs) -> nn.MultiheadAttention:
    attention = nn.MultiheadAttention(16, 4, **kwargs)
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.3)
    return attention


def plain_attention(old: nn.MultiheadAttention, variant, query, key, value, key_ignored, query_ignored, rho):
    """What ``old`` computes with InfSA in place of its softmax, on (B, L, D) tokens."""
    if old.in_proj_weight is not None:
        weights = old.in_proj_weight.chunk(3)
    else:
        weights = old.q_proj_weight, old.k_proj_weight, old.v_proj_weight
    biases = [None] * 3 if old.in_proj_bias is None else old.in_proj_bias.chunk(3)
    q, k, v = (nn.functional.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases))
    if old.bias_k is not None:
        k = torch.cat([k, old.bias_k.expand(len(k), 1, -1)], 1)
        v = torch.cat([v, old.bias_v.expand(len(v), 1, -1)], 1)
        key_ignored = nn.functional.pad(key_ignored, (0, 1))
    q, k, v = (x.unflatten(-1, (4, 4)).transpose(1, 2) for x in (q, k, v))
    scores_of = reference.linear_scores if variant == "linear_infsa" else reference.pure_scores
    scores = scores_of(q, k, rho, 1e-6, key_ignored, query_ignored)
    if variant == "linear_infsa":
        scores = scores.unsqueeze(2).expand(*q.shape[:3], -1)
    return old.out_proj((scores @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_converted_root_computes_infsa_with_the_original_weights(kind, variant):
    old = multihead(**KINDS[kind]).double()
    report = convert(old, variant, rho_init=0.8)
    assert report.converted == {"": "MultiheadAttention"} and isinstance(report.model, InfSAAttention)
    query = torch.randn(2, 5, 16).double()
    key, value = torch.randn(2, 7, old.kdim).double(), torch.randn(2, 7, old.vdim).double()
    ignored = torch.tensor([[False] * 7, [False] * 4 + [True] * 3])
    truth = plain_attention(old, variant, query, key, value, ignored, None, 0.8)
    tokens = [t if old.batch_first else t.transpose(0, 1) for t in (query, key, value)]
    out, weights = report.model(*tokens, key_padding_mask=ignored)
    assert weights is None
    torch.testing.assert_close(out if old.batch_first else out.transpose(0, 1), truth, rtol=1e-11, atol=1e-12)


def test_weights_are_copied_or_shared_and_flags_kept():
    old = multihead(dropout=0.2, batch_first=True).bfloat16().eval()
    old.in_proj_bias.requires_grad_(False)
    old.out_proj.weight.requires_grad_(False)
    random_numbers = torch.get_rng_state()
    new = replace_attention(old, rho_init=0.7)
    assert torch.equal(torch.get_rng_state(), random_numbers)
    for parameter in ("weight", "bias"):
        fused = torch.cat([getattr(p, parameter) for p in (new.q_proj, new.k_proj, new.v_proj)])
        assert torch.equal(fused, getattr(old, f"in_proj_{parameter}"))
        assert getattr(new.out_proj, parameter) is getattr(old.out_proj, parameter)
    assert new.q_proj.weight.requires_grad and not new.v_proj.bias.requires_grad
    assert not new.out_proj.weight.requires_grad and new.rho_logit.requires_grad
    assert {p.dtype for p in new.parameters()} == {torch.bfloat16}
    assert not any(m.training for m in new.modules()) and new.dropout == 0.2 and new.batch_first
    assert new.rho.item() == pytest.approx(0.7, abs=0.01)
    assert list(dict(replace_attention(old, rho_trainable=False).named_buffers())) == ["rho_logit"]


def test_new_weights_on_request():
    old = multihead(kdim=12)
    new = replace_attention(old, copy_weights=False)
    assert not torch.equal(new.k_proj.weight, old.k_proj_weight) and new.out_proj.weight is not old.out_proj.weight
    assert new.k_proj.weight.shape == old.k_proj_weight.shape


def test_meta_device():
    with torch.device("meta"):
        new = replace_attention(nn.MultiheadAttention(16, 4))
    assert all(p.is_meta for p in new.parameters())


def test_shared_module_is_converted_once_and_stays_shared():
    shared = multihead()
    model = nn.ModuleDict({"a": shared, "b": nn.ModuleList([shared, multihead()])})
    report = convert(model)
    assert set(report.converted) == {"a", "b.0", "b.1"}
    new = report.model
    assert new["a"] is new["b"][0] is not new["b"][1] and isinstance(new["a"], InfSAAttention)
    assert model["a"] is shared and shared is model["b"][0]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mode", ["train", "eval", "eval, no_grad"])
def test_transformer_encoder_on_a_padded_batch(mode, variant):
    layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).double().train(mode == "train")
    assert model.use_nested_tensor  # the fast path that must not run
    report = convert(model, variant, inplace=True)
    assert report.model is model and len(report.converted) == 2
    x = torch.randn(2, 6, 16).double()
    padding = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    with torch.set_grad_enabled(mode != "eval, no_grad"):
        out = model(x, src_key_padding_mask=padding)
        alone = model(x[1:, :4])
        softmax = nn.TransformerEncoder(layer, 2).double().eval()(x)
    torch.testing.assert_close(out[1, :4], alone[0], rtol=1e-11, atol=1e-12)
    assert not torch.allclose(out[0], softmax[0], atol=1e-3)
    causal = nn.Transformer.generate_square_subsequent_mask(6).double()
    with pytest.raises(NotImplementedError, match="attn_mask"):
        model(x, mask=causal)


def test_one_layer_of_an_encoder_gets_dense_tokens():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 24, batch_first=True), 2).eval()
    convert(model, include_patterns="layers.1", inplace=True)
    padding = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    with torch.no_grad():
        assert model(torch.randn(2, 6, 16), src_key_padding_mask=padding).shape == (2, 6, 16)


@pytest.mark.parametrize("variant", VARIANTS)
def test_transformer_decoder_layer(variant):
    layer = nn.TransformerDecoderLayer(16, 4, 24, dropout=0.0, batch_first=True).double()
    assert len(convert(layer, variant, inplace=True).converted) == 2
    target, memory = torch.randn(2, 5, 16).double(), torch.randn(2, 7, 16).double()
    padding = torch.tensor([[False] * 7, [False] * 4 + [True] * 3])
    for training in (True, False):
        out = layer.train(training)(target, memory, memory_key_padding_mask=padding)
        torch.testing.assert_close(out[1:], layer(target[1:], memory[1:, :4]), rtol=1e-11, atol=1e-12)
    out.square().sum().backward()
    assert layer.self_attn.rho_logit.grad.isfinite()
    with pytest.raises(NotImplementedError, match="causal"):
        layer(target, memory, tgt_mask=nn.Transformer.generate_square_subsequent_mask(5), tgt_is_causal=True)


def refused_models():
    class Relative(nn.MultiheadAttention):
        pass

    hooked = multihead()
    hooked.out_proj.register_forward_hook(print)
    tied = nn.ModuleList([multihead(), multihead()])
    tied[1].in_proj_weight = tied[0].in_proj_weight
    special = multihead()
    special.out_proj = nn.Sequential()
    return {
        "target_types": Relative(16, 4),
        "hooks": hooked,
        "parametrizations": parametrizations.weight_norm(multihead(), "in_proj_weight"),
        "would not share": tied,
        "out_proj is a torch.nn.modules.container.Sequential, expected a torch.nn.Linear": special,
        "InfSA already": InfSAAttention(16, 4),
    }


@pytest.mark.parametrize("reason", refused_models())
def test_refused_modules_stay_as_they_are(reason):
    attention = refused_models()[reason]
    model = nn.Sequential(attention, nn.Linear(4, 4))
    modules, state = list(model.modules()), copy.deepcopy(model.state_dict())
    report = convert(model, inplace=True)
    assert not report.converted and all(reason in why for why in report.refused.values()), report
    assert list(model.modules()) == modules
    assert all(torch.equal(t, state[key]) for key, t in model.state_dict().items())
    if reason != "would not share":
        with pytest.raises(NotImplementedError, match=reason):
            replace_attention(attention)


def test_sharded_parameters_are_refused():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = multihead()
        mesh = init_device_mesh("cpu", (1,))
        model.in_proj_weight = nn.Parameter(distribute_tensor(model.in_proj_weight.detach(), mesh, [Shard(0)]))
        assert "convert first, then shard" in convert(model, inplace=True).refused[""]
    finally:
        dist.destroy_process_group()


def test_patterns_and_types_choose():
    class Checked(nn.MultiheadAttention):
        pass

    model = nn.ModuleDict({"encoder": multihead(), "decoder": multihead(), "other": Checked(16, 4)})
    assert set(convert(model, include_patterns="coder").converted) == {"encoder", "decoder"}
    assert set(convert(model, exclude_patterns=["^en", "other"]).converted) == {"decoder"}
    assert set(convert(model, target_types=Checked).converted) == {"other"}
    assert not convert(model, target_types=[nn.Linear]).converted


def test_bad_arguments():
    model = multihead()
    with pytest.raises(ValueError, match="variant is 'softmax'"):
        convert(model, "softmax")
    with pytest.raises(ValueError, match="rho_init is 1"):
        convert(model, rho_init=1)
    with pytest.raises(ValueError, match=r"include_patterns is \['\('\]"):
        convert(model, include_patterns="(")
    with pytest.raises(NotImplementedError, match="no attention"):
        replace_attention(nn.Linear(4, 4))
    wrapped = nn.Module()
    wrapped.inner = type("DistributedDataParallel", (nn.Module,), {})()
    with pytest.raises(ValueError, match="convert first"):
        convert(wrapped)


class Block(nn.Module):
    """As in OpenAI's CLIP, whose blocks hold their mask, or as in open_clip's, which are given the tower's."""

    def __init__(self, attn_mask=None):
        super().__init__()
        self.attn, self.attn_mask = multihead(), attn_mask

    def forward(self, x, attn_mask=None):
        mask = self.attn_mask if attn_mask is None else attn_mask
        return self.attn(x, x, x, need_weights=False, attn_mask=mask)[0]


def test_causal_text_towers_are_refused_or_noted():
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    clip = nn.ModuleDict({"visual": Block(), "text": Block(causal)})
    report = convert(clip)
    assert list(report.converted) == ["visual.attn"] and not report.notes
    assert "Block around it holds an attn_mask" in report.refused["text.attn"]
    x = torch.randn(5, 2, 16)
    report.model["text"](x), report.model["visual"](x)

    tower = nn.Sequential(Block())
    tower.register_buffer("attn_mask", causal, persistent=False)
    report = convert(tower)
    assert list(report.converted) == list(report.notes) == ["0.attn"]
    assert "given torch.nn.modules.container.Sequential's attn_mask; convert(exclude_patterns=" in str(report)
    with pytest.raises(NotImplementedError, match=r"attn_mask is a Tensor.*convert\(exclude_patterns="):
        report.model[0](x, tower.attn_mask)

    notes = convert(nn.TransformerDecoderLayer(16, 4, 24)).notes
    assert list(notes) == ["self_attn"] and "tgt_mask" in notes["self_attn"]


def test_strict_changes_nothing_where_something_is_refused():
    model = nn.ModuleDict({"right": multihead(), "left": Block(torch.zeros(2, 2))})
    modules = list(model.modules())
    with pytest.raises(NotImplementedError, match=r"exclude_patterns=(.|\n)*left\.attn: the .*holds an attn_mask"):
        convert(model, inplace=True, strict=True)
    assert list(model.modules()) == modules
    convert(model, exclude_patterns="left", inplace=True, strict=True)
    assert not convert(model["right"], inplace=True, strict=True).converted  # InfSA already: nothing to do

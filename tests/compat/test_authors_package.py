"""Code of the authors' package `infsa` 0.1 runs when only its import changes, or is refused where that package is wrong.

The facts (signatures, shapes, initial values, keys of a checkpoint) are those of its source at commit c937ce8.
"""

import copy
import inspect
import math
import pickle

import pytest
import timm
import torch
import torchvision
import transformers
from helpers.host_models import IMAGES, TEXT
from torch import nn
from torch.testing import assert_close

import infsa_kernels.compat as infsa
from infsa_kernels import nn as ours
from infsa_kernels import reference

VARIANTS = ("linear_infsa", "pure_infsa")
B, N, D, H = 2, 10, 64, 4
SIGNATURES = {
    "InfSAAttention": [
        ("embed_dim", ...), ("num_heads", ...), ("variant", "pure_infsa"), ("dropout", 0.0), ("bias", True),
        ("batch_first", True), ("rho_init", 0.95), ("rho_trainable", True), ("kdim", None), ("vdim", None),
    ],
    "convert": [
        ("model", ...), ("variant", "pure_infsa"), ("rho_init", 0.95), ("rho_trainable", True), ("copy_weights", True),
        ("include_patterns", None), ("exclude_patterns", None), ("target_types", None), ("inplace", False), ("verbose", True),
    ],
    "replace_attention": [
        ("module", ...), ("variant", "pure_infsa"), ("rho_init", 0.95), ("rho_trainable", True), ("copy_weights", True),
    ],
    "infsa_attention": [
        ("q", ...), ("k", ...), ("v", ...), ("variant", "pure_infsa"), ("rho", 0.95), ("dropout_p", 0.0), ("training", False),
        ("eps", 1e-6),
    ],
    "pure_infsa_scores": [("q", ...), ("k", ...), ("rho", 0.95), ("eps", 1e-6)],
    "linear_infsa_scores": [("q", ...), ("k", ...), ("rho", 0.95), ("eps", 1e-6)],
}  # fmt: skip
FORWARD = [
    ("query", None), ("key", None), ("value", None), ("key_padding_mask", None), ("need_weights", False),
    ("attn_mask", None), ("average_attn_weights", True), ("is_causal", False),
]  # fmt: skip


def arguments_of(function):
    parameters = inspect.signature(function).parameters.values()
    return [(p.name, ... if p.default is p.empty else p.default) for p in parameters]


def test_names_order_and_defaults():
    assert set(infsa.__all__) == set(SIGNATURES)
    for name, expected in SIGNATURES.items():
        assert arguments_of(getattr(infsa, name))[: len(expected)] == expected, name
    assert arguments_of(infsa.InfSAAttention.forward)[1 : 1 + len(FORWARD)] == FORWARD


@pytest.mark.parametrize("heads", [(B, H), (B * H,)], ids=["4-D", "3-D"])
def test_functions_return_their_shapes(heads):
    q, k, v = torch.randn(3, *heads, N, 16).unbind()
    assert infsa.pure_infsa_scores(q, k, 0.9).shape == (*heads, N, N)
    assert infsa.linear_infsa_scores(q, k, 0.9).shape == (*heads, N, 1)
    for variant in VARIANTS:
        assert infsa.infsa_attention(q, k, v, variant, 0.9, 0.0, False, 1e-6).shape == v.shape
    with pytest.raises(ValueError, match="variant is 'invalid'"):
        infsa.infsa_attention(q, k, v, variant="invalid")


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_module_computes_the_paper_and_returns_their_weights(variant, batch_first):
    attention = infsa.InfSAAttention(D, H, variant, 0.0, True, batch_first, 0.9).double()
    x = torch.randn(B, N, D).double()
    q, k, v = (p(x).view(B, N, H, -1).transpose(1, 2) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    if variant == "pure_infsa":
        context, scores = reference.pure(q, k, v, 0.9), infsa.pure_infsa_scores(q, k, 0.9)
    else:
        context = reference.linear(q, k, v, 0.9).unsqueeze(2).expand(v.shape)
        scores = infsa.linear_infsa_scores(q, k, 0.9)
    truth = attention.out_proj(context.transpose(1, 2).flatten(2))
    given = x if batch_first else x.transpose(0, 1)
    out, none = attention(given, given, given)
    assert none is None and out.shape == given.shape
    assert_close(out if batch_first else out.transpose(0, 1), truth)
    assert torch.equal(attention(hidden_states=given)[0], out)
    assert_close(attention(given, given, given, None, True)[1], scores.mean(1))
    assert_close(attention(given, need_weights=True, average_attn_weights=False)[1], scores)


def test_linear_weights_of_a_padded_batch():
    attention, x = infsa.InfSAAttention(D, H, "linear_infsa"), torch.randn(B, N, D)
    padding = torch.arange(N) < torch.tensor([[0], [3]])  # on the left
    weights = attention(x, x, x, padding, need_weights=True)[1]
    alone = attention(x[1:, 3:], need_weights=True)[1]
    assert weights.shape == (B, N, 1) and (weights[1, :3] == 0).all()
    assert_close(weights[1:, 3:], alone)


def test_rho_reads_like_their_number_and_learns():
    attention = infsa.InfSAAttention(D, H, rho_init=0.8)
    assert (
        abs(attention.rho - 0.8) < 1e-6
        and attention.rho.item() == pytest.approx(0.8)
        and f"{attention.rho:.2f}" == "0.80"
    )
    attention(torch.randn(B, N, D))[0].square().sum().backward()
    assert attention.rho_logit.grad.abs() > 0
    frozen = infsa.InfSAAttention(D, H, rho_trainable=False)
    assert "rho_logit" in dict(frozen.named_buffers())


def test_initial_values_are_theirs():
    attention = infsa.InfSAAttention(256, H, kdim=128)
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj):
        bound = math.sqrt(6 / sum(projection.weight.shape))
        assert 0.99 * bound < projection.weight.abs().max() <= bound
        assert (projection.bias == 0).all()
    new = infsa.replace_attention(nn.MultiheadAttention(256, H), copy_weights=False)
    assert_close(new.out_proj.weight.abs().max(), torch.tensor(math.sqrt(6 / 512)), rtol=0.01, atol=0)


def checkpoint(prefix="", width=D):
    names = [f"{prefix}{p}_proj.{kind}" for p in ("q", "k", "v", "out") for kind in ("weight", "bias")]
    state = {name: torch.randn(width, width) if "weight" in name else torch.randn(width) for name in names}
    return state | {f"{prefix}rho_logit": torch.tensor(0.7)}


def test_their_checkpoints_load():
    state = checkpoint()
    attention = infsa.InfSAAttention(D, H)
    attention.load_state_dict(state)
    assert attention.rho_logit.item() == pytest.approx(0.7)
    assert all(torch.equal(attention.state_dict()[name].view(t.shape), t) for name, t in state.items())

    theirs = nn.MultiheadAttention(D, H)
    attention.load_state_dict(theirs.state_dict())
    assert torch.equal(attention.k_proj.weight, theirs.in_proj_weight[D : 2 * D])

    model = infsa.convert(torchvision.models.VisionTransformer(16, 8, 1, 4, D, 64), verbose=False)
    prefix = "encoder.layers.encoder_layer_0.self_attention."
    state = model.state_dict() | checkpoint(prefix)
    model.load_state_dict(state)
    assert torch.equal(model.state_dict()[f"{prefix}v_proj.weight"], state[f"{prefix}v_proj.weight"])


CONVERTIBLE = {
    "nn.TransformerEncoder": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(D, H, 64, batch_first=True), 2),
    "torchvision": lambda: torchvision.models.VisionTransformer(16, 8, 2, 4, D, 64),
    "timm": lambda: timm.create_model("vit_tiny_patch16_224", embed_dim=32, num_heads=4, depth=2, img_size=32),
    "transformers": lambda: transformers.ViTModel(transformers.ViTConfig(**IMAGES, intermediate_size=48)),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", CONVERTIBLE)
def test_convert_returns_a_model_of_their_modules_and_prints(name, variant, capsys):
    torch.manual_seed(0)
    model = CONVERTIBLE[name]().eval()
    before = copy.deepcopy(model.state_dict())
    converted = infsa.convert(model, variant, 0.9)
    assert isinstance(converted, type(model)) and converted is not model
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    found = {key for key, m in converted.named_modules() if isinstance(m, infsa.InfSAAttention)}
    assert len(found) == 2 and not any(isinstance(m, infsa.InfSAAttention) for m in model.modules())
    assert all(f"converted {key}" in capsys.readouterr().out for key in list(found)[:1])
    expected = ours.convert(model, variant, 0.9).model.state_dict()
    assert converted.state_dict().keys() == expected.keys()
    assert all(torch.equal(t, expected[key]) for key, t in converted.state_dict().items())

    assert infsa.convert(model, variant, inplace=True, verbose=False) is model
    with pytest.warns(UserWarning, match="no attention was found"):
        infsa.convert(model, verbose=False)  # nothing is left to convert
    assert capsys.readouterr().out == ""


def test_converted_modules_are_of_their_class_where_the_authors_are():
    model = infsa.convert(nn.TransformerEncoderLayer(D, H, 64, batch_first=True), "linear_infsa", verbose=False)
    assert type(model.self_attn) is infsa.InfSAAttention
    assert model.self_attn(torch.randn(B, N, D), need_weights=True)[1].shape == (B, N, 1)
    twin = pickle.loads(pickle.dumps(model.eval()))
    x = torch.randn(B, N, D)
    assert torch.equal(twin(x), model(x))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), model(x))


def test_replace_attention_returns_a_module_of_its_own():
    theirs = nn.MultiheadAttention(D, H, batch_first=True)
    new = infsa.replace_attention(theirs)
    assert type(new) is infsa.InfSAAttention and new.variant == "pure_infsa" and new.batch_first
    assert torch.equal(new.q_proj.weight, theirs.in_proj_weight[:D])
    assert new.out_proj.weight is not theirs.out_proj.weight


def gpt2():
    return transformers.GPT2Model(
        transformers.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=50, bos_token_id=0, eos_token_id=0)
    )


REFUSED = {
    "a causal model, which theirs runs as a bidirectional one": (gpt2, "it is causal"),
    "grouped keys, whose weights theirs leaves random": (
        lambda: transformers.LlamaModel(transformers.LlamaConfig(**TEXT, num_key_value_heads=2)),
        "it is causal",
    ),
    "an unknown class, whose weights theirs leaves random": (
        lambda: nn.Sequential(type("FusedAttention", (nn.Module,), {})()),
        "none of the classes",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_theirs_converts_wrongly_is_refused_with_the_reason(case):
    build, reason = REFUSED[case]
    model = build()
    modules, state = list(model.modules()), list(model.state_dict())
    with pytest.raises(NotImplementedError, match=rf"exclude_patterns(.|\n)*{reason}"):
        infsa.convert(model, inplace=True, verbose=False)
    assert list(model.modules()) == modules and list(model.state_dict()) == state


def test_masks_that_theirs_ignores_are_honoured_or_refused():
    attention, x = infsa.InfSAAttention(D, H), torch.randn(B, N, D)
    padding = torch.arange(N) >= torch.tensor([[N], [6]])
    assert_close(attention(x, x, x, key_padding_mask=padding)[0][1:, :6], attention(x[1:, :6])[0])
    for dropped in ({"attn_mask": torch.ones(N, N).tril()}, {"is_causal": True}, {"attention_mask": padding}):
        with pytest.raises(NotImplementedError, match=next(iter(dropped))):
            attention(x, x, x, **dropped)
    attention(x, x, x, attention_mask=None, output_attentions=False)
    with pytest.raises(TypeError, match="query is None"):
        attention()

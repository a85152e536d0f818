"""torch.fx, by torch itself, torchvision and timm: our modules and functions are nodes of a graph, as torch's own are."""

import copy
import pickle

import pytest
import timm
import torch
import torchvision
from timm.layers import create_feature_extractor as timm_feature_extractor
from torch import fx, nn
from torch.testing import assert_close
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import infsa_kernels
from infsa_kernels.nn import InfSAAttention, InfViT, NeumannSum, convert, vit

VARIANTS = ("linear_infsa", "pure_infsa")
B, H, N, D = 2, 4, 9, 8


class Function(nn.Module):
    """A module around a function, as a user writes it."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.rho = nn.Parameter(torch.full((H,), 0.5))

    def forward(self, q, k, v, mask):
        return self.function(self, q, k, v, mask) + 1


OPS = torch.ops.infsa
FUNCTIONS = {
    "linear_infsa": lambda m, q, k, v, mask: infsa_kernels.linear_infsa(q, k, v),
    "pure_infsa": lambda m, q, k, v, mask: infsa_kernels.pure_infsa(q, k, v, m.rho, key_padding_mask=mask),
    "tied": lambda m, q, k, v, mask: infsa_kernels.pure_infsa(q, q, v, 0.5),
    "infsa_attention": lambda m, q, k, v, mask: infsa_kernels.infsa_attention(q, k, v, "linear_infsa", rho=m.rho),
    "linear_scores": lambda m, q, k, v, mask: infsa_kernels.linear_infsa_scores(q, k),
    "pure_scores": lambda m, q, k, v, mask: infsa_kernels.pure_infsa_scores(q, k, eps=1e-3),
    "layer": lambda m, q, k, v, mask: infsa_kernels.pooled_linear_infsa(
        q[:, 0], 2, v[0, 0, :D], v[1, 0, :D], v[0, 1, :D]
    ),
    "constant_queries": lambda m, q, k, v, mask: infsa_kernels.linear_infsa(torch.ones(B, H, N, D), k, v),
    "operator": lambda m, q, k, v, mask: OPS.linear(q, k, v, 1e-6, m.rho, mask),
    "operator_of_a_number": lambda m, q, k, v, mask: OPS.pure(q, k, v, 1e-6, 0.5),
    "overload": lambda m, q, k, v, mask: OPS.pure.default(q, k, v),
}


def tokens(length=N):
    q, k, v = torch.randn(3, B, H, length, D).unbind()
    return q, k, v, torch.arange(length).expand(B, length) < 2


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_call_with_a_proxy_is_one_node(name):
    made = Function(FUNCTIONS[name])
    traced = fx.symbolic_trace(made)
    assert sum("infsa" in str(node.target) for node in traced.graph.nodes) == 1
    for length in (N, 13) if name != "constant_queries" else (N,):
        arguments = tokens(length)
        assert_close(traced(*arguments), made(*arguments))
    arguments = tokens()
    assert_close(pickle.loads(pickle.dumps(traced))(*arguments), made(*arguments))


def test_nodes_are_found_by_the_functions_that_a_user_imports():
    traced = fx.symbolic_trace(Function(FUNCTIONS["linear_infsa"]))
    assert any(node.target is infsa_kernels.linear_infsa for node in traced.graph.nodes)


def test_tracing_under_a_backend():
    """A mode sees the operator inside the function, and a Proxy the function: neither takes the other's call."""
    made, arguments = Function(FUNCTIONS["pure_infsa"]), tokens()
    with infsa_kernels.backend("eager"):
        traced = fx.symbolic_trace(made)
        assert_close(traced(*arguments), made(*arguments))
    with infsa_kernels.backend("cuda"), pytest.raises(RuntimeError, match="'cuda' cannot run"):
        traced(*arguments)


class Net(nn.Module):
    def __init__(self, variant):
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.attention = InfSAAttention(32, 4, batch_first=True, variant=variant)
        self.sum = NeumannSum(2, 4)

    def forward(self, x, mask):
        y, weights = self.attention(x, x, x, mask, need_weights=True)
        z, _ = self.attention(x + y, key_padding_mask=mask, norm=self.norm)
        return self.sum([y, z]), weights


@pytest.mark.parametrize("variant", VARIANTS)
def test_attention_is_a_leaf(variant):
    made, mask = Net(variant).eval(), torch.arange(N).expand(B, N) < 2
    traced, x = fx.symbolic_trace(made), torch.randn(B, N, 32)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["attention"] * 2
    assert_close(traced(x, mask), made(x, mask))


def test_hooks_of_a_leaf_run_once():
    made = nn.Sequential(InfSAAttention(32, 4, batch_first=True))
    made[0].register_forward_hook(lambda module, args, out: (2 * out[0], None))
    made[0].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    traced, x = fx.symbolic_trace(made), torch.randn(B, N, 32)
    assert_close(traced(x), made(x))


def torchvision_vit():
    return torchvision.models.VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=5).eval()


@pytest.mark.parametrize("variant", VARIANTS)
def test_torchvision_extracts_features_of_a_converted_model(variant):
    original = torchvision_vit()
    made, x = convert(original, variant).model, torch.randn(2, 3, 32, 32)
    nn.init.normal_(made.heads.head.weight)
    assert get_graph_node_names(made) == get_graph_node_names(original)
    nodes = ["encoder.layers.encoder_layer_0.self_attention", "encoder.layers.encoder_layer_1", "heads"]
    kept = {}
    for name in nodes:
        made.get_submodule(name).register_forward_hook(lambda m, args, out, name=name: kept.update({name: out}))
    features = create_feature_extractor(copy.deepcopy(made), nodes)(x)
    kept.clear()
    made(x)
    assert_close(features, kept)


@pytest.mark.parametrize("variant", VARIANTS)
def test_timm_extracts_features_of_a_converted_model(variant):
    original = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2).eval()
    made, x = convert(original, variant).model, torch.randn(2, 3, 32, 32)
    kept = {}
    for name in ("blocks.0.attn", "blocks.1"):
        made.get_submodule(name).register_forward_hook(lambda m, args, out, name=name: kept.update({name: out}))
    for extractor in (timm_feature_extractor, create_feature_extractor):
        features = extractor(copy.deepcopy(made), ["blocks.0.attn", "blocks.1", "head"])(x)
        expected = made(x)
        assert_close(features.pop("head"), expected)
        assert_close(features, kept)


@pytest.mark.parametrize(
    "arguments", [{}, {"pool": "mean", "neumann": "head"}, {"neumann": "layer", "pos_embed": False}]
)
@pytest.mark.parametrize("variant", [*VARIANTS, "softmax"])
def test_infvit_is_traced_for_all_sizes(variant, arguments, monkeypatch):
    """As the root and inside another module, down to its blocks' parts."""
    made = InfViT(16, 4, 3, 5, 32, 2, 4, variant=variant, **arguments).eval()
    nn.init.normal_(made.head.weight)
    extractor = create_feature_extractor(made, ["patch_embed", "blocks.0", "blocks.1.attn", "head"])
    graphs = fx.symbolic_trace(made), fx.symbolic_trace(nn.Sequential(made)), lambda x: extractor(x)["head"]
    kept = []
    made.blocks[0].register_forward_hook(lambda module, args, out: kept.append(out[0]))
    monkeypatch.setattr(vit, "CHUNK_TOKENS", 20)
    for height, width in ((16, 16), (18, 25), (7, 40)):
        x = torch.randn(2, 3, height, width)
        with torch.no_grad():
            expected = made(x)
            for graph in graphs:
                assert_close(graph(x), expected, rtol=1e-4, atol=1e-4)
            assert_close(extractor(x)["blocks.0"], kept[-1], rtol=1e-4, atol=1e-4)

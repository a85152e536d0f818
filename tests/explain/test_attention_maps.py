"""Attention maps of every family of models, against the dense matrices that the families themselves compute, in float64."""

import math

import numpy as np
import pytest
import timm
import torch
import torchvision
import transformers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import infsa_kernels
from infsa_kernels import reference
from infsa_kernels.explain import attention_graphs, attention_maps, weights
from infsa_kernels.explain.maps import KINDS
from infsa_kernels.graph import multi_hop_infsa
from infsa_kernels.nn import InfSAAttention, InfViT, convert

SIDE, PATCH, GRID = 32, 8, (4, 4)
VARIANTS = ("linear_infsa", "pure_infsa", "multi_hop_infsa", "softmax")


def infvit(variant="linear_infsa", **kwargs):
    sizes = dict(img_size=SIDE, patch_size=PATCH, embed_dim=32, depth=3, num_heads=4, num_classes=5)
    return InfViT(**sizes | kwargs, variant=variant)


def timm_vit(**kwargs):
    sizes = dict(embed_dim=32, num_heads=4, depth=3, img_size=SIDE, patch_size=PATCH)
    return timm.create_model("vit_tiny_patch16_224", **sizes | kwargs)


def transformers_config(kind):
    sizes = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, image_size=SIDE, patch_size=PATCH)
    return kind(**sizes, **({"intermediate_size": 48} if kind is transformers.ViTConfig else {}))


HOSTS = {
    "torchvision": lambda: torchvision.models.VisionTransformer(SIDE, PATCH, 3, 4, 32, 48, num_classes=5),
    "timm": timm_vit,
    "timm with qk_norm, registers": lambda: timm_vit(qk_norm=True, reg_tokens=2),
    "transformers ViT": lambda: transformers.ViTModel(transformers_config(transformers.ViTConfig)),
    "transformers DINOv2": lambda: transformers.Dinov2Model(transformers_config(transformers.Dinov2Config)),
}


def build(name, variant):
    if name.startswith("InfViT"):
        model = infvit(variant, tied="tied" in name)
    else:
        model = HOSTS[name]()
        if variant != "softmax":
            model = convert(model, variant, strict=True).model
    for parameter in model.parameters():
        # Biases above 0: without them the graph of a head may have no cycle, and so no eigenvector.
        nn.init.normal_(parameter, *((0.4, 0.2) if parameter.dim() == 1 else (0, 0.25)))
    return model.double().eval()


def pictures(number=2):
    return torch.randn(number, 3, SIDE, SIDE, dtype=torch.float64)


def dense_weights(model, images, variant):
    """The weights of all layers, (B, H, N, N) each: from what an attention module is given, by its own projections."""
    given = []
    handles = [
        module.register_forward_pre_hook(
            lambda module, args, kwargs: given.append((module, args, kwargs)), with_kwargs=True
        )
        for module in model.modules()
        if type(module).__name__.endswith(("Attention", "SelfAttention")) and not list_of_attention(module)
    ]
    with torch.no_grad():
        getattr(model, "forward_features", model)(images)
    for handle in handles:
        handle.remove()
    return [of_module(module, args, kwargs, variant).detach() for module, args, kwargs in given]


def list_of_attention(module):
    return any("Attention" in type(part).__name__ for part in list(module.modules())[1:])


@torch.no_grad()
def of_module(module, args, kwargs, variant):
    x = args[0] if args else kwargs.get("query", kwargs.get("hidden_states"))
    if isinstance(module, nn.MultiheadAttention):
        return module(x, x, x, need_weights=True, average_attn_weights=False)[1]
    if hasattr(module, "qkv"):  # timm
        q, k, _ = module.qkv(x).unflatten(-1, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = module.q_norm(q), module.k_norm(k)
    else:
        x = x if kwargs.get("norm") is None else kwargs["norm"](x)
        names = next(n for n in (("q_proj", "k_proj"), ("query", "key")) if hasattr(module, n[0]))
        key = getattr(module, names[1] if hasattr(module, names[1]) else names[0])  # tied
        heads = getattr(module, "num_heads", None) or module.num_attention_heads
        q, k = (p(x).unflatten(-1, (heads, -1)).transpose(1, 2) for p in (getattr(module, names[0]), key))
    if variant == "softmax":
        return torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), -1)
    if variant in ("pure_infsa", "multi_hop_infsa"):
        return reference.pure_scores(q, k)
    return reference.linear_scores(q, k).unsqueeze(2).expand(-1, -1, q.shape[2], -1)


def dense_values(matrices, layer, kind, gamma=0.9):
    """(B, H, N), or (B, 1, N) of a rollout, by dense algebra."""
    W = matrices[layer]
    eye = torch.eye(W.shape[-1], dtype=W.dtype)
    if kind == "rollout":
        row = eye[:1]
        for one in reversed(matrices[: layer % len(matrices) + 1]):
            mean = one.mean(1)
            row = row @ (0.5 * mean / mean.sum(-1, keepdim=True) + 0.5 * eye)
        return row
    if kind == "class_token":
        return W[:, :, 0]
    if kind in ("in", "out"):
        return W.sum(-2 if kind == "in" else -1)
    if kind == "katz":
        return torch.linalg.inv(eye - gamma * W).sum(-2)
    values, vectors = np.linalg.eig(W.mT.numpy())
    chosen = np.take_along_axis(vectors, values.real.argmax(-1)[..., None, None], -1)[..., 0].real
    equal = torch.full_like(W[..., 0], W.shape[-1] ** -0.5)
    return torch.where(W.sum((-2, -1))[..., None] > 0, torch.from_numpy(np.abs(chosen)), equal)


def close(got, expected, rtol=1e-9):
    torch.testing.assert_close(got, expected, rtol=rtol, atol=rtol * float(expected.abs().max()))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["InfViT", "InfViT, tied", *HOSTS])
@pytest.mark.one_in(3)
def test_every_kind_of_every_family_is_that_of_the_dense_matrix(name, variant):
    if variant == "softmax" and "tied" in name:
        return
    model, images = build(name, variant), pictures()
    matrices = dense_weights(model, images, variant)
    assert len(matrices) == 3
    extra = matrices[0].shape[-1] - math.prod(GRID)
    assert extra == (3 if "registers" in name else 1)
    # A small residual of an eigenvector is a larger error where the next eigenvalue is near.
    rtols = {"katz": 1e-5, "eigenvector": 1e-3}
    for kind in KINDS:
        rtol = rtols.get(kind, 1e-9)
        for layer in (-1, 1):
            expected = dense_values(matrices, layer, kind)[..., extra:].unflatten(-1, GRID)
            close(attention_maps(model, images, layer, kind), expected.mean(1), rtol)
            if kind != "rollout":
                close(attention_maps(model, images, layer, kind, heads=None), expected, rtol)
                close(attention_maps(model, images, layer, kind, heads=2), expected[:, 2], rtol)


def test_graphs_are_those_of_the_layers():
    for variant in VARIANTS:
        model, images = build("InfViT", variant), pictures()
        graphs, matrices = attention_graphs(model, images), dense_weights(model, images, variant)
        for graph, W in zip(graphs, matrices, strict=True):
            x = torch.randn(*W.shape[:3], 3, dtype=W.dtype)
            assert graph.shape == W.shape
            close(graph.matmul(x), W @ x)
            close(graph.rmatmul(x), W.mT @ x)
            close(graph.T.matmul(x), W.mT @ x)
            close(graph.scores([3, 0]), W[:, :, [3, 0]])
            close(graph.row_sums(), W.sum(-1))
            close(graph.column_sums(), W.sum(-2))
            assert graph.q.shape == (2, 4, 17, 8)


class Toy(nn.Module):
    """Tokens are pixels, and attention is whatever a function of them does: no projections, so that numbers stay small."""

    def __init__(self, *layers):
        super().__init__()
        self.patches, self.layers = nn.Conv2d(1, 1, 1, 1, bias=False, dtype=torch.float64), layers
        nn.init.ones_(self.patches.weight)

    def forward(self, images):
        x = self.patches(images).flatten(2)[..., None]  # (B, 1, N, 1)
        for layer in self.layers:
            layer(x)
        return x


ONE_TWO = torch.tensor([[[[1.0, 2.0]]]], dtype=torch.float64)


def toy_map(layer, kind, **kwargs):
    return attention_maps(Toy(layer), ONE_TWO, kind=kind, **kwargs).flatten().tolist()


def test_pure_by_hand():
    """q = k = (1, 2): scores (1 2; 2 4), whose Frobenius norm is 5, so W = u u^T with u = (1, 2) / sqrt 5."""

    def pure(x):
        infsa_kernels.pure_infsa(x, x, x, eps=1e-15)

    assert toy_map(pure, "in") == toy_map(pure, "out") == pytest.approx([0.6, 1.2])
    assert toy_map(pure, "eigenvector") == pytest.approx([0.2**0.5, 0.8**0.5])
    assert toy_map(pure, "katz", gamma=0.5) == pytest.approx([1.6, 2.2])
    # W' has rows (1/3, 2/3): the mean row of (I + W') / 2.
    assert toy_map(pure, "rollout") == pytest.approx([0.25 + 1 / 6, 0.25 + 1 / 3])


def test_linear_by_hand():
    """Energies (1, 2), central query 5/3, scores (5/3, 10/3): a = (1/3, 2/3)."""

    def linear(x):
        infsa_kernels.linear_infsa(x, x, x, eps=1e-15)

    assert toy_map(linear, "in") == pytest.approx([2 / 3, 4 / 3])
    assert toy_map(linear, "out") == pytest.approx([1, 1])
    assert toy_map(linear, "katz", gamma=0.5) == pytest.approx([1 + 2 / 3, 1 + 4 / 3], rel=1e-5)
    assert toy_map(linear, "eigenvector") == pytest.approx([0.2**0.5, 0.8**0.5])


def test_softmax_by_hand():
    """Queries 0: equal weights. With a scale of log 3 and keys (0, 1): weights 1/4 and 3/4."""
    keys = ONE_TWO.reshape(1, 1, 2, 1) - 1

    def softmax(x):
        nn.functional.scaled_dot_product_attention(torch.ones_like(x), keys, x, scale=math.log(3))

    assert toy_map(softmax, "in") == pytest.approx([0.5, 1.5])
    assert toy_map(softmax, "katz", gamma=0.5) == pytest.approx([1.5, 2.5], rel=1e-5)
    assert toy_map(softmax, "eigenvector") == pytest.approx([0.1**0.5, 0.9**0.5])


@pytest.mark.parametrize("hops", [1, 3, None])
def test_all_hops_of_a_layer_are_one_layer(hops):
    def walk(x):
        multi_hop_infsa(x, x, x, hops=hops)

    def another(x):
        multi_hop_infsa(x + 0, x + 0, x, hops=hops)

    graphs = attention_graphs(Toy(walk, another, walk), ONE_TWO)
    assert len(graphs) == 3
    torch.testing.assert_close(graphs[1].dense().flatten().tolist(), [0.2, 0.4, 0.4, 0.8], rtol=1e-5, atol=0)


def test_heads_without_a_positive_score():
    def dead(x):
        infsa_kernels.linear_infsa(x, -x, x)

    def dead_pure(x):
        infsa_kernels.pure_infsa(x, -x, x)

    for layer in (dead, dead_pure):
        assert toy_map(layer, "in") == toy_map(layer, "out") == [0, 0]
        assert toy_map(layer, "katz") == [1, 1]
        assert toy_map(layer, "eigenvector") == pytest.approx([0.5**0.5] * 2)
        assert toy_map(layer, "rollout") == [0.5, 0.5]


@pytest.mark.parametrize("rho", [0.9, torch.tensor(0.9, dtype=torch.float64)], ids=["number", "tensor"])
def test_operators_called_by_their_names_are_seen(rho):
    def layers(x):
        torch.ops.infsa.pure(x, x, x, rho=rho)
        torch.ops.infsa.linear(x, x, x, rho=rho)
        torch.ops.infsa.linear.default(x, x + 0, x)
        one = x.new_ones(1, 1)
        torch.ops.infsa.pooled_linear(x[:, 0], one, one, one, 1, rho=rho)

    kinds = [type(graph).__name__ for graph in attention_graphs(Toy(layers), ONE_TWO)]
    assert kinds == ["TokenGraph", "LinearGraph", "LinearGraph", "LinearGraph"]


def test_tokens_without_heads():
    x = torch.randn(1, 2, 3, dtype=torch.float64)

    def single(_):
        nn.functional.scaled_dot_product_attention(x, x, x)
        infsa_kernels.pure_infsa(x, x, x)
        infsa_kernels.linear_infsa(x, x, x)

    softmax, pure, linear = attention_graphs(Toy(single), ONE_TWO)
    close(softmax.scores([0, 1])[:, 0], torch.softmax(x @ x.mT / math.sqrt(3), -1))
    close(pure.dense()[:, 0], reference.pure_scores(x, x))
    close(linear.scores([0])[:, 0, 0], reference.linear_scores(x, x))
    assert pure.tied


def test_grouped_keys_and_other_scales_are_honoured():
    q, k = torch.randn(1, 4, 2, 3, dtype=torch.float64), torch.randn(1, 2, 2, 3, dtype=torch.float64)

    def grouped(x):
        nn.functional.scaled_dot_product_attention(q, k, k, scale=0.7, enable_gqa=True)

    expected = torch.softmax(0.7 * q @ k.repeat_interleave(2, 1).mT, -1)
    close(attention_maps(Toy(grouped), ONE_TWO, kind="in", heads=None)[:, :, 0], expected.sum(-2))


def test_the_model_is_left_as_it_was():
    model = build("torchvision", "linear_infsa").train()
    model.encoder.layers[1].eval()
    was = [module.training for module in model.modules()]
    attention_maps(model, pictures())
    assert [module.training for module in model.modules()] == was
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with pytest.raises(RuntimeError, match="a bad day"):
        attention_maps(Toy(fails), ONE_TWO, kind="in")
    assert torch.is_grad_enabled()


def fails(x):
    raise RuntimeError("a bad day")


def test_dropout_is_off():
    model = infvit("pure_infsa").double().train()
    for module in model.modules():
        if isinstance(module, InfSAAttention):
            module.dropout = 0.5
    images = pictures()
    close(attention_maps(model, images, kind="in"), attention_maps(model.eval(), images, kind="in"))


@pytest.mark.parametrize("name", ["InfViT", "timm"])
def test_compiled_models_have_the_same_maps(name):
    model, images = build(name, "pure_infsa"), pictures()
    expected = attention_maps(model, images, kind="in")
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(images)
    close(attention_maps(compiled, images, kind="in"), expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_low_precision_gives_maps_of_float32(variant):
    model, images = build("InfViT", variant), pictures()
    expected = attention_maps(model, images, kind="in")
    found = attention_maps(model.bfloat16(), images.bfloat16(), kind="in")
    assert found.dtype == torch.float32
    close(found.double(), expected, 0.2)


def test_pictures_of_other_sizes_and_a_model_without_a_class_token():
    model = infvit("pure_infsa", pool="mean").double()
    images = torch.randn(1, 3, 37, 64, dtype=torch.float64)  # 37 rows of pixels are padded to 40
    assert attention_maps(model, images, kind="in").shape == (1, 5, 8)
    assert attention_maps(model, images, kind="rollout").sum().item() == pytest.approx(1)
    assert attention_maps(model, images, kind="in", grid=(8, 5)).shape == (1, 8, 5)


class Largest(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
        return out


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_no_tensor_is_of_n_by_n(variant, kind, monkeypatch):
    tokens = 1025
    monkeypatch.setattr(weights, "BLOCK", 16 * tokens)
    model = infvit(variant, embed_dim=16, num_heads=2, depth=2)
    with Largest() as largest:
        attention_maps(model, torch.randn(1, 3, 256, 256), kind=kind, gamma=0.3)
    assert largest.numel <= 256 * tokens < tokens**2


def cross(x):
    infsa_kernels.pure_infsa(x, x[:, :, :1], x[:, :, :1])


def masked(x):
    nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)


BAD = [
    (dict(kind="attention"), ValueError, "kind is 'attention', expected one of 'class_token', 'in'"),
    (dict(layer=3), ValueError, "layer is 3, expected -3 to 2: 3 attention layers ran"),
    (dict(layer=-4), ValueError, "layer is -4, expected -3 to 2: 3 attention layers ran"),
    (dict(layer=3, kind="rollout"), ValueError, "layer is 3, expected -3 to 2: 3 attention layers ran"),
    (dict(layer=1.0), TypeError, "layer is 1.0, expected an int"),
    (dict(heads=4), ValueError, "heads is 4, expected -4 to 3, 'mean' or None: the layer has 4"),
    (dict(heads="max"), ValueError, "heads is 'max', expected 'mean', the index of a head or None"),
    (dict(heads=0, kind="rollout"), ValueError, "heads is 0, expected 'mean' with kind='rollout'"),
    (dict(gamma=1.0), ValueError, "gamma is 1.0, expected between 0 and 1"),
    (dict(grid=(4, 5)), ValueError, "the layer has 17 tokens, expected at least h x w = 4 x 5; give the grid"),
    (dict(grid=(4, 0)), ValueError, r"grid is \(4, 0\), expected \(h, w\)"),
    (dict(images=torch.randn(3, 32, 32)), ValueError, r"images is \[3, 32, 32\], expected a Tensor \(B, C, height, width\)"),
    (dict(model=nn.Sequential(nn.Conv2d(3, 4, 8, 8))), ValueError, "model made no call of InfSA, .* with attention"),
    (dict(model=nn.Linear(3, 3)), ValueError, "does not cut its picture into patches.*give grid"),
    (dict(model=infvit(pool="mean")), ValueError, "kind is 'class_token', expected another one"),
    (dict(model=Toy(cross), images=ONE_TWO, kind="in"), ValueError, "2 queries and 1 x 1 keys.* windows and cross-attention"),
    (dict(model=Toy(masked), images=ONE_TWO, kind="in"), NotImplementedError, "scaled_dot_product_attention a mask"),
]  # fmt: skip


@pytest.mark.parametrize("change, error, message", BAD, ids=[message[:40] for *_, message in BAD])
def test_bad_input_is_named(change, error, message):
    call = dict(model=infvit(), images=torch.randn(1, 3, SIDE, SIDE)) | change
    with pytest.raises(error, match="(attention_maps|explain): .*" + message):
        attention_maps(**call)

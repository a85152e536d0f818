"""InfViT: parameter counts, resolutions, and that the memory-saving forms compute the same."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from infsa_kernels.nn import InfSAAttention, InfViT, vit
from infsa_kernels.testing import FORWARD, assert_close_to_reference

VARIANTS = ("linear_infsa", "pure_infsa", "softmax")
D, PATCH = 32, 4


def model(variant="linear_infsa", **arguments):
    """Small, in float64, with no parameter at 0."""
    made = InfViT(16, PATCH, 3, 5, D, 3, 4, variant=variant, **arguments).double()
    for p in made.parameters():
        if p.dim() < 2 or p is made.head.weight:
            nn.init.normal_(p, std=0.5)
    return made


def images(height=16, width=16, B=2):
    return torch.randn(B, 3, height, width, dtype=torch.float64)


def parameters(depth, D, per_layer, classes=1000, pixels=3 * 16**2, positions=197):
    """Patches, cls token, positions, layers, last norm and head."""
    return (pixels + 1) * D + D + positions * D + depth * per_layer + 2 * D + (D + 1) * classes


@pytest.mark.parametrize("factory", vit.FACTORIES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("tied", [False, True])
def test_parameter_counts(factory, tied):
    D, depth = 1024, int(factory.__name__.split("_")[2][:-1])
    softmax = "softmax" in factory.__name__
    if softmax and tied:
        with pytest.raises(ValueError, match="tied is True"):
            factory(tied=True, device="meta")
        return
    made = factory(device="meta", **({} if softmax else {"tied": tied}))
    assert made.num_heads == (64 if "linear" in factory.__name__ else 16) and len(made.blocks) == depth
    layer = 12 * D**2 + 13 * D - tied * (D**2 + D)
    count = parameters(depth, D, layer + (not softmax))  # and rho
    assert sum(p.numel() for p in made.parameters()) == count

    # The two readings of the published counts, in millions: a plain ViT without and with a pooler; and one with a pooler and
    # one projection more per layer, untied and tied.
    plain, pooler = parameters(depth, D, 12 * D**2 + 13 * D), D**2 + D
    published = {4: (52.40, 53.45, 57.65, 53.45), 24: (304.33, 305.38, 330.57, 305.38)}[depth]
    more = [plain, plain + pooler, parameters(depth, D, 13 * D**2 + 14 * D) + pooler, plain + pooler]
    assert [round(n / 1e6, 2) for n in more] == list(published)
    assert count - (not softmax) * depth == plain - tied * depth * (D**2 + D)


FORMS = itertools.product(VARIANTS, ("cls", "mean"), (None, "layer", "head"), (True, False))


@pytest.mark.parametrize("variant, pool, neumann, pos_embed", list(FORMS))
@pytest.mark.one_in(2)
def test_every_form_of_evaluation_agrees(variant, pool, neumann, pos_embed, monkeypatch):
    """Chunks without gradients, checkpointing with; and the last layer without its dead tokens."""
    made = model(variant, pool=pool, neumann=neumann, pos_embed=pos_embed)
    for x in (images(), images(18, 25)):
        made.zero_grad()
        expected = made(x)
        expected.square().sum().backward()
        gradients = [p.grad for p in made.parameters()]
        assert all(g is not None and g.abs().max() > 0 for g in gradients)

        features = made.forward_features(x)
        pooled = features[:, 0] if pool == "cls" else features.mean(1)
        assert_close(made.head(pooled), expected)
        before = x.clone()
        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(vit, "CHUNK_TOKENS", 7)
            assert_close(made(x), expected)
            assert_close(made.forward_features(x), features)
        assert torch.equal(x, before)

        twin = copy.deepcopy(made)
        twin.zero_grad()
        twin.set_grad_checkpointing()
        twin(x).square().sum().backward()
        assert_close([p.grad for p in twin.parameters()], gradients)


PARTS = ["", "patch_embed", "blocks.0", "blocks.1.norm1", "blocks.0.attn", "blocks.1.norm2", "blocks.0.mlp", "any"]


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_a_hook_kept_stays_as_it_was(variant, part, context, monkeypatch):
    """More tokens than a chunk has: whatever a module is given or returns is its hooks' to keep."""
    monkeypatch.setattr(vit, "CHUNK_TOKENS", 64)
    made, x = model(variant, pool="mean"), images(40, 60)
    kept = []

    def keep(module, args, out=None):
        tensors = [t for t in (*args, *(out if isinstance(out, tuple) else [out])) if isinstance(t, torch.Tensor)]
        kept.extend((t, t.clone()) for t in tensors)

    if part == "any":
        handles = [f(keep) for f in (nn.modules.module.register_module_forward_pre_hook,
                                     nn.modules.module.register_module_forward_hook)]  # fmt: skip
    else:
        module = made.get_submodule(part)
        handles = [module.register_forward_pre_hook(keep), module.register_forward_hook(keep)]
    try:
        with context():
            made.forward_features(x)
            made(x)
    finally:
        for handle in handles:
            handle.remove()
    assert kept and all(torch.equal(t, then) for t, then in kept)


def test_features_of_inference_are_those_of_training():
    """With as many tokens as a chunk really has, and more."""
    made, features = InfViT(256, PATCH, 3, 5, D, 2, 4, pool="mean"), []
    for block in made.blocks:
        block.register_forward_hook(lambda module, args, out: features.append(out[0]))
    x = torch.randn(2, 3, 256, 260)
    made(x)
    with torch.no_grad():
        made(x)
    assert_close(features[2:], features[:2], rtol=1e-4, atol=1e-4)


class PeakBytes(TorchDispatchMode):
    """The most bytes that tensors held at a time, beside those given."""

    def __init__(self, *given):
        super().__init__()
        self.given = {t.untyped_storage()._cdata for t in given}
        self.alive, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for t in results if isinstance(results, (tuple, list)) else (results,):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                if storage._cdata not in self.given:
                    self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {key: value for key, value in self.alive.items() if not value[0].expired()}
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self.alive.values()))
        return results


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_memory_of_inference_is_two_tensors_of_tokens(pool, monkeypatch):
    monkeypatch.setattr(vit, "CHUNK_TOKENS", 16)
    made, x = model(pool=pool), images(160, 160, B=1)
    for run in (made, made.forward_features):
        with torch.no_grad(), PeakBytes(x, *made.parameters()) as memory:
            run(x)
        assert memory.peak <= 2.5 * 40 * 40 * D * 8


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_an_evaluation_by_hand(variant):
    made, x = model(variant), images()
    tokens = F.conv2d(x, made.patch_embed.weight, made.patch_embed.bias, stride=PATCH).flatten(2).mT
    tokens = torch.cat([made.cls_token.expand(2, -1, -1), tokens], 1) + made.pos_embed
    for block in made.blocks:
        h = block.norm1(tokens)
        if variant == "softmax":
            theirs = nn.MultiheadAttention(D, 4, batch_first=True, dtype=torch.float64)
            ours = InfSAAttention(D, 4, dtype=torch.float64)
            ours.load_state_dict(block.attn.state_dict(), strict=False)
            theirs.load_state_dict(ours.multihead_state_dict())
            tokens = tokens + theirs(h, h, h)[0]
        else:
            tokens = tokens + block.attn(h, need_weights=True)[0]
        h = block.norm2(tokens)
        tokens = tokens + block.mlp.fc2(F.gelu(block.mlp.fc1(h)))
    assert_close(made.forward_features(x), made.norm(tokens))
    assert_close(made(x), made.head(made.norm(tokens)[:, 0]))


@pytest.mark.parametrize("height, width", [(16, 40), (9, 16), (64, 7), (4, 4)])
def test_positions_follow_the_picture(height, width):
    made = model()
    rows, columns = -(-height // PATCH), -(-width // PATCH)
    grid = made.pos_embed[:, 1:].mT.unflatten(-1, (4, 4))
    resized = F.interpolate(grid, (rows, columns), mode="bicubic", antialias=True).flatten(2).mT
    padded = F.pad(images(height, width), (0, columns * PATCH - width, 0, rows * PATCH - height))
    tokens = made.patch_embed(padded) + resized
    assert_close(made._embed(padded)[:, 1:], tokens)
    assert_close(
        made(padded[:, :, :height, :width]),
        made(F.pad(padded[:, :, :height, :width], (0, -width % PATCH, 0, -height % PATCH))),
    )


def test_state_goes_through_safetensors(tmp_path):
    made, other = model(neumann="head", tied=True), model(neumann="head", tied=True)
    save_file(made.state_dict(), tmp_path / "vit.safetensors")
    other.load_state_dict(load_file(tmp_path / "vit.safetensors"))
    x = images()
    assert torch.equal(made(x), other(x))
    twin, softmax = model(tied=False), model("softmax")
    missing, unexpected = twin.load_state_dict(softmax.state_dict(), strict=False)
    assert not unexpected and all(name.endswith("rho_logit") for name in missing)


def test_meta_device_and_reset():
    made = InfViT(16, PATCH, embed_dim=D, depth=2, neumann="layer", device="meta", dtype=torch.float64)
    made.to_empty(device="cpu").reset_parameters()
    assert all(p.isfinite().all() for p in made.parameters())
    assert made(images()).shape == (2, 1000)
    assert InfViT(16, PATCH, num_classes=0, embed_dim=D).double()(images()).shape == (2, D)
    assert made(images(B=0)).shape == (0, 1000)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_autocast(variant, dtype, monkeypatch):
    made, x = model(variant).float(), images(24, 20).float()
    with torch.no_grad():
        expected = made(x)
        for chunk in (7, 4096):
            monkeypatch.setattr(vit, "CHUNK_TOKENS", chunk)
            with torch.autocast("cpu", dtype):
                assert_close(made(x).float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(variant="linear"), "variant is 'linear'"),
        (dict(pool="token"), "pool is 'token', expected 'cls' or 'mean'"),
        (dict(neumann="sum"), "neumann is 'sum'"),
        (dict(img_size=20, patch_size=16), "img_size is 20, expected a multiple of patch_size = 16"),
    ],
)
def test_wrong_construction(arguments, message):
    with pytest.raises(ValueError, match=message):
        InfViT(**arguments, device="meta")


def test_wrong_images():
    with pytest.raises(ValueError, match=r"images has shape \[2, 16, 16, 3\], expected \(B, 3, height, width\)"):
        model()(images().permute(0, 2, 3, 1))


@pytest.mark.parametrize("shape", [(2, 7, D), (1, 1, D), (13, D), (2, 0, D)], ids=str)
def test_projections_of_inference_are_those_of_training(shape):
    """As convolutions of single pixels; with a hook on the layer, or where it is an adapter, as the layer itself."""
    layer, x = nn.Linear(D, 3 * D), torch.randn(shape)
    exact = copy.deepcopy(layer).double()(x.double())
    with torch.no_grad():
        for given in (x, x.mT.contiguous().mT):
            result = vit._project(given, layer)
            assert result.is_contiguous() and result.shape == exact.shape
            assert_close_to_reference(result, layer(x), exact, FORWARD, "projection")
        called = []
        layer.register_forward_hook(lambda *_: called.append(1))
        assert torch.equal(vit._project(x, layer), layer(x)) and len(called) == 2
    assert vit._project(x, layer).requires_grad

"""What users add to a layer's projections is not lost: adapters, offloading, quantisation, hooks, parametrisations.

Fused layers read weights as data; here every projection is more than its weight, and values and gradients are those of
calling it.
"""

import copy

import accelerate
import peft
import pytest
import timm
import torch
import torch.nn.utils.parametrize as parametrize
import torchao.quantization
from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrizations, prune
from torch.testing import assert_close

from infsa_kernels import linear_infsa
from infsa_kernels.nn import InfSAAttention, InfViT, convert, vit
from infsa_kernels.nn.timm import InfSAAttention as TimmAttention

B, N, D, H = 2, 9, 32, 4
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


class Layer(nn.Module):
    """An attention with a norm handed to it, as in a block of InfViT."""

    def __init__(self, batch_first=True):
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.attn = InfSAAttention(D, H, batch_first=batch_first)
        for p in self.parameters():
            if p.dim() < 2:
                nn.init.normal_(p)
        self.double()

    def forward(self, x):
        return self.attn(x, norm=self.norm)[0]


class Timm(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = TimmAttention(D, H, qkv_bias=True).double()

    def forward(self, x):
        return self.attn(x)


def by_calls(layer, x):
    """The same by calls of every module."""
    attention = layer.attn
    if isinstance(layer, Timm):
        q, k, v = attention.qkv(x).unflatten(-1, (3, H, -1)).permute(2, 0, 3, 1, 4)
        out = attention.proj
    else:
        x = layer.norm(x)
        q, k, v = (
            p(x).unflatten(-1, (H, -1)).transpose(1, 2) for p in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        out = attention.out_proj
    z = linear_infsa(q, k, v, rho=torch.sigmoid(attention.rho_logit))
    return out(z.transpose(1, 2).flatten(2))


def tokens():
    return torch.randn(B, N, D, dtype=torch.float64)


def assert_same(layer, x):
    found = []
    for function in (layer, lambda t: by_calls(layer, t)):
        leaf = x.detach().requires_grad_()
        layer.zero_grad()
        out = function(leaf)
        out.square().sum().backward()
        found.append([out.detach(), leaf.grad, *(p.grad for p in layer.parameters() if p.grad is not None)])
    assert_close(*found, rtol=1e-9, atol=1e-9)


def projections(layer):
    return (
        [layer.attn.qkv, layer.attn.proj] if isinstance(layer, Timm) else [getattr(layer.attn, n) for n in PROJECTIONS]
    )


def parts(layer):
    return projections(layer) + ([] if isinstance(layer, Timm) else [layer.norm])


def replace_forward(part):
    """As LyCORIS, Helical and others do."""
    original = part.forward
    part.forward = lambda t: original(t) * 1.5 + 1


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


ADDED = {
    "forward": replace_forward,
    "forward_hook": lambda part: part.register_forward_hook(lambda _, args, out: 2 * out + 1),
    "forward_pre_hook": lambda part: part.register_forward_pre_hook(lambda _, args: (2 * args[0],)),
    "full_backward_hook": lambda part: part.register_full_backward_hook(lambda _, grads, __: (2 * grads[0],)),
    "full_backward_pre_hook": lambda part: part.register_full_backward_pre_hook(lambda _, grads: (2 * grads[0],)),
    "parametrization": lambda part: parametrize.register_parametrization(part, "weight", Doubled()),
    "prune": lambda part: prune.l1_unstructured(part, "weight", 0.5),
    "weight_of_another_class": lambda part: setattr(part, "weight", nn.Parameter(part.weight.as_subclass(Inverted))),
}
MATRICES_ONLY = {
    "weight_norm": parametrizations.weight_norm,
    "old_weight_norm": nn.utils.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
}


class Inverted(torch.Tensor):
    """A tensor with arithmetic of its own, as quantised ones have."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func not in (nn.functional.linear, nn.functional.layer_norm):
            return super().__torch_function__(func, types, args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return 1 - func(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("kind", [Layer, Timm])
@pytest.mark.parametrize("added", [*ADDED, *MATRICES_ONLY])
def test_everything_added_takes_effect(kind, added):
    x = tokens()
    for at in range(len(parts(kind()))):
        layer = kind().eval()  # in training spectral_norm changes with every call
        part = parts(layer)[at]
        if added in MATRICES_ONLY and not isinstance(part, nn.Linear):
            continue
        before = layer(x)
        (ADDED | MATRICES_ONLY)[added](part)
        assert_same(layer, x)
        if added in ("forward", "forward_hook", "parametrization", "weight_of_another_class") and at > 0:
            assert not torch.allclose(layer(x), before)


def test_the_layers_are_fused_where_nothing_is_added(monkeypatch):
    """Else the tests above would compare calls with calls."""
    from infsa_kernels.nn import attention, timm

    def pooled(*args, **kwargs):
        raise InterruptedError

    for module in (attention, timm):
        monkeypatch.setattr(module, "pooled_linear_infsa", pooled)
    for layer in (Layer(), Timm()):
        with pytest.raises(InterruptedError):
            layer(tokens())
        added = projections(layer)[0].register_forward_hook(lambda *_: None)
        layer(tokens())
        added.remove()
        accelerate.hooks.add_hook_to_module(projections(layer)[0], accelerate.hooks.ModelHook())
        layer(tokens())
        accelerate.hooks.remove_hook_from_module(projections(layer)[0])
        with pytest.raises(InterruptedError):
            layer(tokens())


@pytest.mark.parametrize("kind", [Layer, Timm])
def test_a_forward_replaced_on_torchs_class(kind, monkeypatch):
    layer, x, original = kind(), tokens(), nn.Linear.forward
    before = layer(x)
    monkeypatch.setattr(nn.Linear, "forward", lambda self, t: original(self, t) + 1)
    assert_same(layer, x)
    assert not torch.allclose(layer(x), before)


@pytest.mark.parametrize("kind", [Layer, Timm])
def test_hooks_on_all_modules_see_every_projection(kind):
    layer, x, seen = kind(), tokens(), []
    registers = [
        torch_module.register_module_forward_hook, torch_module.register_module_forward_pre_hook,
        torch_module.register_module_full_backward_hook, torch_module.register_module_full_backward_pre_hook,
    ]  # fmt: skip
    for register in registers:
        handle = register(lambda module, *_: seen.append(module))
        try:
            layer(x.requires_grad_()).sum().backward()
        finally:
            handle.remove()
        assert set(parts(layer)) <= set(seen)
        seen.clear()


def test_hooks_on_all_modules_see_every_part_of_a_model():
    model, seen = InfViT(16, 4, 3, 5, D, 2, H), []
    handle = torch_module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        with torch.no_grad():
            model(torch.randn(1, 3, 16, 16))
    finally:
        handle.remove()
    assert {m for m in model.modules() if isinstance(m, (nn.Linear, nn.LayerNorm))} <= set(seen)


@pytest.mark.parametrize("kind", [Layer, Timm])
def test_peft_lora_trains_and_merges(kind):
    layer, x = kind(), tokens()
    names = ["qkv", "proj"] if kind is Timm else list(PROJECTIONS)
    before = layer(x)
    model = peft.get_peft_model(layer, peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False))
    assert not torch.allclose(model(x), before)
    assert_same(layer, x)
    trained = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * len(names)
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), 0.1)
    model(x).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(p, trained[n]) for n, p in model.named_parameters() if n in trained)
    out = model(x)
    merged = model.merge_and_unload()
    assert all(type(part) is nn.Linear for part in projections(merged))
    assert_close(merged(x), out)


def test_multihead_names_are_refused_where_they_would_lose_an_adapter():
    attention = InfSAAttention(D, H)
    attention.multihead_state_dict()
    replace_forward(attention.v_proj)
    with pytest.raises(ValueError, match="v_proj is a Linear that computes more than its weight and bias say"):
        attention.multihead_state_dict()
    adapted = peft.get_peft_model(nn.Sequential(InfSAAttention(D, H)), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="q_proj is a Linear that computes more"):
        adapted.base_model.model[0].multihead_state_dict()


def test_convert_refuses_what_adapters_hold():
    model = nn.Sequential(nn.MultiheadAttention(D, H))
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"]))
    (reason,) = convert(adapted).refused.values()
    assert "adapts" in reason and "merge" in reason
    for change, words in (
        (lambda m: replace_forward(m.out_proj), "forward was replaced"),
        (lambda m: m.compile(), "compiled on its own"),
    ):
        attention = nn.MultiheadAttention(D, H)
        change(attention)
        assert words in convert(attention, inplace=True).refused[""]


@pytest.mark.parametrize("build", [
    lambda: InfViT(16, 4, 3, 5, D, 2, H),
    lambda: InfViT(16, 4, 3, 5, D, 2, H, pool="mean", neumann="head"),
    lambda: InfViT(16, 4, 3, 5, D, 2, H, variant="softmax"),
    lambda: timm.create_model("vit_tiny_patch16_224", embed_dim=D, num_heads=H, depth=2, img_size=32, attn_layer=TimmAttention),
    lambda: convert(nn.TransformerEncoder(nn.TransformerEncoderLayer(D, H, 64, 0.0, batch_first=True), 2)).model,
], ids=["InfViT", "InfViT mean Neumann", "its softmax twin", "timm", "nn.TransformerEncoder"])  # fmt: skip
def test_accelerate_cpu_offload(build):
    model = build().eval()
    x = torch.randn(2, N, D) if isinstance(model, nn.TransformerEncoder) else torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)
        offloaded = accelerate.cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
        assert any(p.is_meta for p in offloaded.parameters())
        assert_close(offloaded(x), expected)


@pytest.mark.parametrize("kind", [Layer, Timm])
def test_torchao_weight_only(kind):
    layer, x = kind().float().eval(), tokens().float()
    with torch.no_grad():
        exact = layer(x)
        torchao.quantization.quantize_(layer, torchao.quantization.Int8WeightOnlyConfig())
        assert all(type(part.weight) is not nn.Parameter for part in projections(layer))
        assert_close(layer(x), by_calls(layer, x))
        assert_close(layer(x), exact, rtol=0.05, atol=0.05)
        model = InfViT(16, 4, 3, 5, D, 2, H).eval()
        images = torch.randn(1, 3, 16, 16)
        exact = model(images)
        torchao.quantization.quantize_(model, torchao.quantization.Int8WeightOnlyConfig())
        assert_close(model(images), exact, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("kind", [Layer, Timm])
def test_functional_calls_with_other_parameters(kind):
    layers, x = [kind() for _ in range(3)], tokens()
    given = dict(layers[1].named_parameters())
    assert_close(torch.func.functional_call(layers[0], given, (x,)), layers[1](x))
    stacked, buffers = torch.func.stack_module_state(layers)
    skeleton = copy.deepcopy(layers[0]).to("meta")

    def call(parameters):
        return torch.func.functional_call(skeleton, (parameters, buffers), (x,))

    assert_close(torch.vmap(call)(stacked), torch.stack([layer(x) for layer in layers]))


def test_a_projection_compiled_on_its_own_is_called():
    layer, called = Layer(), []
    part = layer.attn.v_proj
    part.compile(backend="eager")
    compiled = part._compiled_call_impl
    part._compiled_call_impl = lambda *args: called.append(1) or compiled(*args)
    layer(tokens())
    assert called


@pytest.mark.parametrize("kind", [Layer, Timm])
@pytest.mark.parametrize("added", ["forward", "forward_hook"])
@torch._dynamo.config.patch(skip_nnmodule_hook_guards=False)
@pytest.mark.one_in(2)
def test_compiled_whole_before_and_after(kind, added):
    """One graph; and a new one where something is added later, as for torch's own modules (hooks: with the guards that
    torch.compile leaves out by default)."""
    torch.compiler.reset()
    layer, x = kind(), tokens()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    plain = compiled(x)
    assert_close(plain, layer(x))
    ADDED[added](projections(layer)[-1])
    assert not torch.allclose(layer(x), plain)
    assert_close(compiled(x), layer(x))


def test_projections_of_inference_are_called_where_they_are_more():
    """InfViT's MLP, whose float32 inference on CPUs reads its weights."""
    x = torch.randn(5, D)
    with torch.no_grad():
        for added, add in (ADDED | MATRICES_ONLY).items():
            layer = nn.Linear(D, D).eval()
            before = vit._project(x, layer)
            add(layer)
            assert_close(vit._project(x, layer), layer(x))
            if added in ("forward", "forward_hook", "parametrization", "weight_of_another_class"):
                assert not torch.allclose(layer(x), before)

"""Every comparator against its formula evaluated otherwise (peer_formulas.py), and what it says of itself."""

import functools
import math

import numpy as np
import pytest
import torch
from helpers import peer_formulas as formulas
from helpers.peer_formulas import array, convolve, gelu, merge, split

from bench import peers
from bench.peers import CORES, MECHANISMS

D, H, GRID = 32, 2, (14, 16)
N = GRID[0] * GRID[1]
CPU = torch.device("cpu")
CAUSAL = ("gated_deltanet", "gated_deltanet_fla", "simple_linear", "simple_linear_fla", "window", "frwkv")
# By another's kernels, which need a GPU: the same formula.
KERNELS = {name for name, cls in CORES.items() if cls.unavailable(CPU)}
SAME = {"sdpa_": "softmax", "softmax_": "softmax", "flash_": "softmax", "triton_sigmoid": "sigmoid",
        "linear_plain": "linear_infsa", "pure_plain": "pure_infsa", "linear_attention": "linear_attention"}  # fmt: skip


def formula(name):
    base = name.split("+")[0]
    base = next((same for start, same in SAME.items() if base.startswith(start)), base)
    core = getattr(formulas, base.removesuffix("_untied").removesuffix("_per_token").removesuffix("_fla"))
    return functools.partial(core, tied=False) if name.endswith("_untied") else core


HERE = [name for name, (cls, _) in MECHANISMS.items() if "layer" in cls.LEVELS and name not in KERNELS]
FORMULAS = {name: formula(name) for name in {*CORES, *HERE}}


def make(name):
    """In float64, with every parameter away from its initial value."""
    torch.set_default_dtype(torch.float64)
    try:
        module = peers.build(name, D, GRID, H).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return module


def check(module, name, tokens=N):
    q, k, v = torch.randn(3, 1, tokens, H, D // H, dtype=torch.float64).transpose(2, 3).unbind()
    expected = FORMULAS[name](module, *(array(t[0]) for t in (q, k, v)))
    rows = torch.tensor([0, 7, tokens - 1])

    def same(found, wanted):
        found = array(found[0])
        assert found.shape == wanted.shape if not module.POOLED else found.shape[1] == 1
        np.testing.assert_allclose(np.broadcast_to(found, wanted.shape), wanted, rtol=1e-8, atol=1e-10)

    with torch.no_grad():
        if name not in KERNELS:
            same(module.core(q, k, v), expected)
        same(module.truth(q, k, v, rows), expected[:, rows])


@pytest.mark.parametrize("name", CORES)
def test_core_is_its_formula(name):
    check(make(name), name)


@pytest.mark.parametrize("name", ["gated_deltanet", "simple_linear", "window"])
@pytest.mark.parametrize("tokens", [9, 64, 129, 600])
def test_chunks_of_a_causal_mechanism_do_not_show(monkeypatch, name, tokens):
    monkeypatch.setattr(peers.window, "WIDTH", 100)
    module = make(name)
    check(module, name, tokens)
    q, k, v = torch.randn(3, 1, H, tokens, D // H, dtype=torch.float64).unbind()
    with torch.no_grad():
        before = module.core(q, k, v)
        k[:, :, tokens // 2 :], v[:, :, tokens // 2 :] = 9.0, 9.0
        after = module.core(q, k, v)
    # The tokens before a change do not see it: causal.
    torch.testing.assert_close(after[:, :, : tokens // 2], before[:, :, : tokens // 2], rtol=1e-12, atol=1e-12)
    assert not torch.equal(after[:, :, tokens // 2 :], before[:, :, tokens // 2 :])


def linear(layer, x):
    return x @ array(layer.weight).T + (0 if layer.bias is None else array(layer.bias))


def kernel(conv):
    return array(conv.weight)[:, 0], None if conv.bias is None else array(conv.bias)


def silu(x):
    return x / (1 + np.exp(-x))


def local_part(name, m, x, v):
    """The convolutions' part of the layer, (N, D), from x (N, D) and v (H, N, d)."""
    per_head = {"flatten": getattr(m, "dwc", None), "qt_vit": None, "soft": None, "nystromformer": None}
    if name == "flatten":
        return merge(np.stack([convolve(vh, *kernel(per_head[name]), GRID) for vh in v]))
    if name == "soft":
        filters = array(m.filters.weight)
        return merge(np.stack([convolve(vh, np.repeat(f, D // H, 0), None, GRID) for vh, f in zip(v, filters)]))
    if name == "nystromformer":
        filters = array(m.conv.weight)[:, 0]
        return merge(np.stack([convolve(vh, np.tile(f, (D // H, 1, 1)), None, (N, 1)) for vh, f in zip(v, filters)]))
    if name == "qt_vit":
        norm = m.norm
        scaled = (v - array(norm.running_mean)) / np.sqrt(array(norm.running_var) + norm.eps)
        return merge(gelu(scaled * array(norm.weight) + array(norm.bias)))
    if name == "inline":
        mean, weights = x.mean(0), []
        first, second = m.weights[0], m.weights[2]
        for h, part in enumerate(np.split(mean, H)):
            rows = slice(h * D // H, (h + 1) * D // H), slice(9 * h * D // H, 9 * (h + 1) * D // H)
            hidden = gelu(array(first.weight)[rows[0], :, 0] @ part + array(first.bias)[rows[0]])
            weights.append(array(second.weight)[rows[1], :, 0] @ hidden + array(second.bias)[rows[1]])
        return convolve(merge(v), np.concatenate(weights).reshape(D, 3, 3), None, GRID)
    return convolve(merge(v), *kernel(m.lepe if name == "rala" else m.dwc), GRID)


@pytest.mark.parametrize("name", HERE)
def test_layer_is_its_formula(name):
    module, norm = make(name), torch.nn.LayerNorm(D).double()
    torch.nn.init.normal_(norm.weight)
    tokens = torch.randn(1, N, D, dtype=torch.float64)
    x = array(tokens[0])
    core, base = FORMULAS[name], name.split("+")[0]

    def normalised(x):
        x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + norm.eps)
        return x * array(norm.weight) + array(norm.bias)

    if name == "mlla+local":
        x = x + convolve(x, *kernel(module.before), GRID)
        y = normalised(x)
        v = silu(convolve(linear(module.v_proj, y), *kernel(module.inner), GRID))
        q, k = (split(linear(layer, v), H) for layer in (module.q_proj, module.k_proj))
        out = merge(core(module, q, k, split(v, H))) + convolve(v, *kernel(module.values), GRID)
        x = x + linear(module.out_proj, out * silu(linear(module.gate, y)))
        expected = x + convolve(x, *kernel(module.after), GRID)
    else:
        y = normalised(x)
        q, k, v = (
            split(linear(getattr(module, f"{n}_proj"), y), H) if hasattr(module, f"{n}_proj") else None for n in "qkv"
        )
        if base == "mlla":
            values = merge(v)
            q, k = (split(linear(layer, values), H) for layer in (module.q_proj, module.k_proj))
        v = q if v is None else v
        out = merge(core(module, v if q is None else q, v if k is None else k, v))
        if "+local" in name:
            out = out + local_part(base, module, y, v)
        if base == "rala":
            out = out * linear(module.gate, y)
        expected = x + linear(module.out_proj, out) + (merge(q) if base == "fastformer" else 0)
    with torch.no_grad():
        np.testing.assert_allclose(array(module.sublayer(tokens, norm)[0]), expected, rtol=1e-7, atol=1e-9)


# Parameters beyond a plain biased attention, 4 D^2 + 4 D, by hand: the cards' dP where they give one.
d, SIDES = D // H, sum(GRID)
EXTRA = {
    "linear_infsa": -(D * D + D),
    "linear_infsa_untied": 0,
    "pure_infsa": -(D * D + D),
    "softmax": 0,
    "linformer": 2 * N * 256 - 3 * D,
    "performer": 0,
    "soft": -(D * D + D) + d * d * 2 * 2 + 2 * d,
    "soft+local": -(D * D + D) + d * d * 2 * 2 + 2 * d + H * 9,
    "flatten": N * D + D,
    "flatten+local": N * D + D + 26 * d,
    "agent": H * 49 * 2 * (49 + SIDES),
    "agent+local": H * 49 * 2 * (49 + SIDES) + 10 * D,
    "mlla": 0,
    "mlla+local": 4 * 10 * D + D * D + D,
    "inline": 0,
    "inline+local": D * d + D + 9 * D * d + 9 * D,
    "rala": D * D + D,
    "rala+local": D * D + D + 26 * D,
    "qt_vit": 1,
    "qt_vit+local": 1 + 2 * d,
    "luna": 16 * d + 16 + 2 * 64 + 64 * 8 + 8,
    "cosformer": 0,
    "fastformer": -(D * D + D) + 2 * D,
    "nystromformer": 0,
    "nystromformer+local": 33 * H,
    "sigmoid": 0,
    "relu": 0,
    "mean": -2 * (D * D + D),
    "linear_attention": 0,
    "gated_deltanet": 2 * H,
    "simple_linear": 0,
    "window": 0,
    "frwkv": 5 * D,
}  # fmt: skip


@pytest.mark.parametrize("name", EXTRA)
def test_parameters(name):
    assert sum(p.numel() for p in make(name).parameters()) - (4 * D * D + 4 * D) == EXTRA[name]


@pytest.mark.parametrize("name", [name for name in MECHANISMS if name not in peers.LIMITS])
def test_what_it_says_of_itself(name):
    cls, _ = MECHANISMS[name]
    states = []
    for grid in ((14, 14), (28, 28)):
        module = peers.build(name, D, grid, H)
        states.append(module.state_size())
    assert states[1] == pytest.approx(states[0] * (4 if cls.QUADRATIC else 1), rel=0.01)
    assert ("N^2" in cls.TIME) == cls.QUADRATIC
    assert cls.CAUSAL == (name in CAUSAL) == ("causal" in cls.LABEL)
    reason = cls.unavailable(CPU)
    assert reason is None or "is not installed" in reason or "needs a GPU" in reason


def test_performer_draws_features_as_its_paper_does():
    W = peers.performer.orthogonal(44, 16)
    assert math.floor(64 * math.log(64)) == peers.build("performer", 64, GRID, 1).features == 266
    gram = W[:16] @ W[:16].T
    torch.testing.assert_close(gram, torch.diag(gram.diag()), atol=1e-4, rtol=0)
    assert W.shape == (44, 16)
    assert W.norm(dim=1).mean() == pytest.approx(4, rel=0.1)

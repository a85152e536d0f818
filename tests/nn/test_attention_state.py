"""InfSAAttention as a module: its state and other modules' checkpoints, its construction, and what it refuses."""

import copy
import math
import pickle

import pytest
import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn
from torch.testing import assert_close

from infsa_kernels.nn import InfSAAttention

D, H, N = 24, 4, 5
VARIANTS = ("linear_infsa", "pure_infsa")
LAYOUTS = ({}, {"bias": False}, {"kdim": 10, "vdim": 9}, {"add_bias_kv": True})


@pytest.mark.parametrize("arguments", LAYOUTS, ids=str)
def test_multihead_attention_checkpoints_go_both_ways(arguments):
    theirs, other = (nn.MultiheadAttention(D, H, **arguments) for _ in range(2))
    for p in theirs.parameters():
        nn.init.normal_(p)
    ours = nn.Sequential(InfSAAttention(D, H, **arguments, rho_init=0.3))
    given = {f"0.{name}": t for name, t in theirs.state_dict().items()}
    keys = set(given)
    ours.load_state_dict(given)
    assert set(given) == keys
    q_weight, k_weight, v_weight = (
        theirs.in_proj_weight.chunk(3)
        if theirs.in_proj_weight is not None
        else (theirs.q_proj_weight, theirs.k_proj_weight, theirs.v_proj_weight)
    )
    for projection, weight in zip((ours[0].q_proj, ours[0].k_proj, ours[0].v_proj), (q_weight, k_weight, v_weight)):
        assert torch.equal(projection.weight, weight)
    assert torch.equal(ours[0].out_proj.weight, theirs.out_proj.weight)
    assert ours[0].rho.item() == pytest.approx(0.3)

    other.load_state_dict(ours[0].multihead_state_dict())
    for name, t in theirs.state_dict().items():
        assert torch.equal(other.state_dict()[name], t)


def test_a_tied_module_refuses_a_key_projection():
    with pytest.raises(RuntimeError, match="has tied=True, and the checkpoint a projection of its own for keys"):
        InfSAAttention(D, H, tied=True).load_state_dict(nn.MultiheadAttention(D, H).state_dict())
    tied = InfSAAttention(D, H, tied=True)
    weight = tied.multihead_state_dict()["in_proj_weight"]
    assert torch.equal(weight[:D], weight[D : 2 * D])


def test_the_authors_checkpoints_load():
    names = [f"{p}_proj.{kind}" for p in ("q", "k", "v", "out") for kind in ("weight", "bias")]
    state = {name: torch.randn(D, D) if name.endswith("weight") else torch.randn(D) for name in names}
    state["rho_logit"] = torch.tensor(0.7)
    for per_head in (False, True):
        attention = InfSAAttention(D, H, rho_per_head=per_head)
        attention.load_state_dict(state)
        assert_close(attention.rho, torch.sigmoid(torch.tensor(0.7)).expand(attention.rho.shape))
        assert all(torch.equal(attention.state_dict()[name], state[name]) for name in names)
    with pytest.raises(RuntimeError, match="rho_logit"):
        InfSAAttention(D, H).load_state_dict(InfSAAttention(D, H, rho_per_head=True).state_dict())


def test_copies_pickles_and_safetensors(tmp_path):
    attention = InfSAAttention(D, H, rho_per_head=True, rho_trainable=False, batch_first=True)
    x = torch.randn(2, N, D)
    save_file(attention.state_dict(), tmp_path / "state.safetensors")
    save_model(attention, tmp_path / "model.safetensors")
    twins = [copy.deepcopy(attention), pickle.loads(pickle.dumps(attention))]
    for load in (lambda m: m.load_state_dict(load_file(tmp_path / "state.safetensors")),
                 lambda m: load_model(m, tmp_path / "model.safetensors")):  # fmt: skip
        twins.append(InfSAAttention(D, H, rho_per_head=True, rho_trainable=False, batch_first=True, rho_init=0.5))
        load(twins[-1])
    for twin in twins:
        assert torch.equal(twin(x)[0], attention(x)[0])
        assert "rho_logit" in dict(twin.named_buffers())


def test_parameters_start_as_in_multihead_attention():
    D = 256
    for sizes in ({}, {"kdim": 128, "vdim": 64}):
        theirs = nn.MultiheadAttention(D, H, **sizes, add_bias_kv=True)
        ours = InfSAAttention(D, H, **sizes, add_bias_kv=True)
        state = theirs.state_dict()
        for name, t in ours.multihead_state_dict().items():
            assert_close(t.std(), state[name].std(), rtol=0.2, atol=0)
            assert_close(t.abs().max(), state[name].abs().max(), rtol=0.02 if t.numel() > D else 0.5, atol=0)
    assert ours.rho.item() == pytest.approx(0.95)


def test_device_and_dtype_arguments():
    meta = InfSAAttention(D, H, device="meta", dtype=torch.bfloat16, add_bias_kv=True)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in meta.parameters())
    assert meta(torch.empty(N, 2, D, device="meta", dtype=torch.bfloat16))[0].shape == (N, 2, D)
    meta.to_empty(device="cpu").float().reset_parameters()
    assert all(p.isfinite().all() for p in meta.parameters())
    assert torch.nn.utils.skip_init(InfSAAttention, D, H, tied=True).rho_logit.shape == (1,)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", [(0, N, D), (2, 0, D)], ids=str)
def test_empty_batches_and_sequences(variant, shape):
    attention = InfSAAttention(D, H, batch_first=True, variant=variant)
    x = torch.randn(shape, requires_grad=True)
    out, weights = attention(x, need_weights=True)
    assert out.shape == shape and weights.shape == (*shape[:2], shape[1])
    (out.sum() + attention(x)[0].sum()).backward()
    assert x.grad.shape == shape
    assert all(p.grad is None or p.grad.isfinite().all() for p in attention.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_autocast_and_half_precision(variant):
    attention, x = InfSAAttention(D, H, batch_first=True, variant=variant), torch.randn(2, N, D)
    expected = attention(x)[0]
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            out = attention(x)[0]
        assert out.dtype == dtype
        assert_close(out.float(), expected, atol=0.03, rtol=0.03)
        low = copy.deepcopy(attention).to(dtype)
        assert_close(low(x.to(dtype))[0].float(), expected, atol=0.03, rtol=0.03)
    with pytest.raises((RuntimeError, TypeError), match="dtype"):
        low(x)


WRONG_CONSTRUCTION = [
    (dict(num_heads=5), "embed_dim is 24, expected a multiple of num_heads = 5"),
    (dict(num_heads=0), "num_heads is 0"),
    (dict(variant="softmax"), "variant is 'softmax'"),
    (dict(dropout=1.5), "dropout is 1.5"),
    (dict(rho_init=1.0), "rho_init is 1.0"),
    (dict(eps=0.0), "eps is 0.0"),
    (dict(eps=math.nan), "eps is nan"),
    (dict(tied=True, kdim=10), "kdim is 10, expected embed_dim = 24 with tied=True"),
]


@pytest.mark.parametrize("arguments, message", WRONG_CONSTRUCTION)
def test_wrong_construction(arguments, message):
    with pytest.raises(ValueError, match=message):
        InfSAAttention(**{"embed_dim": D, "num_heads": H} | arguments)


@pytest.mark.parametrize(
    "eps, message", [("1e-6", "eps is '1e-6', a str"), (torch.ones((), requires_grad=True), "eps is a tensor that")]
)
def test_eps_is_a_number(eps, message):
    with pytest.raises(TypeError, match=f"InfSAAttention: {message}.*expected a number"):
        InfSAAttention(D, H, eps=eps)
    assert type(InfSAAttention(D, H, eps=torch.tensor(1e-6)).eps) is float


X, BOOL = torch.randn(2, N, D), torch.zeros(2, N, dtype=torch.bool)
WRONG_CALLS = [
    ((X,), dict(attn_mask=torch.zeros(N, N)), NotImplementedError, "attn_mask is a Tensor.*key_padding_mask"),
    ((X,), dict(is_causal=True), NotImplementedError, "is_causal is True"),
    ((X, None, X), {}, TypeError, "key is None"),
    ((X, X.clone()), dict(norm=nn.LayerNorm(D)), ValueError, "norm is a module"),
    ((X, X[:1]), {}, ValueError, "key has batch size 1, expected 2"),
    ((X, X, X[:, 1:]), {}, ValueError, "value has"),
    ((X[..., 1:],), {}, ValueError, r"query has shape \[2, 5, 23\]"),
    ((X[0, 0],), {}, ValueError, "query has shape"),
    ((X,), dict(key_padding_mask=BOOL.long()), TypeError, "mask == 0"),
    ((X,), dict(key_padding_mask=BOOL[:, 1:]), ValueError, r"key_padding_mask has shape \[2, 4\]"),
    ((X, X.clone()), dict(query_padding_mask=BOOL[0]), ValueError, "query_padding_mask has shape"),
    ((X,), dict(key_padding_mask=torch.full((2, N), -1e4)), ValueError, "neither 0 nor -inf"),
    ((torch.nested.as_nested_tensor([X[0], X[1, 1:]]),), {}, NotImplementedError, "to_padded_tensor"),
]


@pytest.mark.parametrize("args, arguments, error, message", WRONG_CALLS)
def test_wrong_calls(args, arguments, error, message):
    for variant in VARIANTS:
        with pytest.raises(error, match=message):
            InfSAAttention(D, H, batch_first=True, variant=variant)(*args, **arguments)
    with pytest.raises(NotImplementedError, match="pure InfSA has a row of its own"):
        InfSAAttention(D, H, variant="pure_infsa").pooled(X)

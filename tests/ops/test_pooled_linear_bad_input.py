"""Wrong arguments of the pooled layer and of its raw operators are refused by name, with what was expected and the fix."""

import re

import pytest
import torch
from helpers.backends import backends_of
from torch._subclasses.fake_tensor import FakeTensorMode

import infsa_kernels
from infsa_kernels import pooled_linear_infsa
from infsa_kernels.ops.backends import SUFFIXES

B, N, D, H, HEAD, V_HEAD, OUT = 2, 5, 6, 2, 3, 4, 7


def zeros(*shape, **options):
    return torch.zeros(shape, **options)


def good() -> dict:
    return {
        "x": zeros(B, N, D), "num_heads": H, "q_weight": zeros(H * HEAD, D), "v_weight": zeros(H * V_HEAD, D),
        "out_weight": zeros(OUT, H * V_HEAD),
    }  # fmt: skip


NUMBER = "expected a finite number"
VALUES = [
    (dict(x=zeros(N, D)), "x has shape [5, 6], expected (B, N, D); view it with 3 dimensions"),
    (dict(num_heads=0), "num_heads is 0, expected at least 1"),
    (dict(num_heads=4), "q_weight has shape [6, 6], whose 6 outputs 4 heads do not divide"),
    (dict(q_weight=zeros(H * HEAD, D + 1)), "q_weight has shape [6, 7], expected (H*d, D) = [6, 6]"),
    (dict(q_weight=zeros(H * HEAD)), "q_weight has shape [6], expected two dimensions, as nn.Linear.weight has"),
    (dict(k_weight=zeros(H, D)), "k_weight has shape [2, 6], expected (H*d, D) = [6, 6]"),
    (dict(k_bias=zeros(H * HEAD)), "k_bias is given without k_weight; keys tied to the queries have q_bias"),
    (dict(v_weight=zeros(H * V_HEAD, D - 1)), "v_weight has shape [8, 5], expected (H*dv, D) = [8, 6]"),
    (dict(out_weight=zeros(OUT, 3)), "out_weight has shape [7, 3], expected (D_out, H*dv) = [7, 8]"),
    (dict(q_bias=zeros(4)), "q_bias has shape [4], expected (H*d,) = [6]"),
    (dict(v_bias=zeros(1, 8)), "v_bias has shape [1, 8], expected (H*dv,) = [8]"),
    (dict(out_bias=zeros(6)), "out_bias has shape [6], expected (D_out,) = [7]"),
    (dict(norm_weight=zeros(D)), "norm_weight or norm_bias is given without norm_eps; give LayerNorm's eps, as 1e-5"),
    (dict(norm_bias=zeros(5), norm_eps=1e-5), "norm_bias has shape [5], expected (D,) = [6]"),
    (dict(norm_eps=-1.0), f"norm_eps is -1, {NUMBER} of at least 0, or None for no normalisation"),
    (dict(eps=0.0), f"eps is 0, {NUMBER} above 0; the paper's is 1e-6"),
    (dict(rho=float("nan")), f"rho is nan, {NUMBER}; the paper's is 0.95"),
    (dict(rho=zeros(3)), "rho has shape [3], expected [], [1] or (H,) = [2]; give one value, or one per head"),
    (dict(padding_mask=zeros(B, 4, dtype=torch.bool)), "padding_mask has shape [2, 4], expected (B, N) = [2, 5]"),
    (
        dict(v_weight=zeros(8, D, device="meta")),
        "v_weight is on meta, expected cpu, where x is; move it with .to(x.device)",
    ),
    (dict(q_bias=zeros(6, device="meta")), "q_bias is on meta, expected cpu, where x is; move it with .to(x.device)"),
]
TYPES = [
    (dict(x=zeros(B, N, D, dtype=torch.int32)), "x has dtype torch.int32, expected torch.float32, torch.bfloat16"),
    (dict(v_weight=zeros(8, D).half()), "v_weight has dtype torch.float16, expected torch.float32; convert it with"),
    (dict(q_bias=zeros(6).double()), "q_bias has dtype torch.float64, expected torch.float32; convert it with"),
    (dict(padding_mask=zeros(B, N)), "padding_mask has dtype torch.float32, expected torch.bool; convert it with"),
    (dict(rho=torch.ones(2, dtype=torch.int64)), "rho has dtype torch.int64, expected a floating dtype"),
    (
        dict(x=zeros(B, N, D).to_sparse()),
        "x is a torch.sparse_coo tensor, expected a dense strided one; densify it first",
    ),
]
PYTHON_TYPES = [
    (dict(x=None), "x is a NoneType, expected a Tensor"),
    (dict(q_bias=1.0), "q_bias is a float, expected a Tensor or None"),
    (dict(num_heads=2.0), "num_heads is a float, expected an int"),
    (dict(rho="1"), "rho is a str, expected a number or a Tensor"),
    (dict(eps=None), "eps is a NoneType, expected a number"),
    (dict(norm_eps="1"), "norm_eps is a str, expected a number or None"),
    (
        dict(eps=torch.tensor(1.0, requires_grad=True)),
        "eps is a tensor that requires a gradient, expected a number: it",
    ),
    (
        dict(norm_eps=torch.tensor(1.0, requires_grad=True)),
        "norm_eps is a tensor that requires a gradient, expected a number",
    ),
    (dict(norm_eps=torch.ones(2)), "norm_eps is a tensor of shape [2], expected a number or None"),
]


def refused(exception, words, function, *args, **kwargs) -> str:
    with pytest.raises(exception) as caught:
        function(*args, **kwargs)
    assert type(caught.value) is exception
    message = str(caught.value).split("\nException raised from")[0]
    assert re.fullmatch(r"infsa::\w+: .*", message)
    assert words in message
    return message


@pytest.mark.parametrize("wrong, words", VALUES)
def test_values(wrong, words):
    refused(ValueError, words, pooled_linear_infsa, **{**good(), **wrong})


@pytest.mark.parametrize("wrong, words", TYPES + PYTHON_TYPES)
def test_types(wrong, words):
    refused(TypeError, words, pooled_linear_infsa, **{**good(), **wrong})


def raw_good(op):
    x, rest = zeros(B, N, D), {"norm_eps": None, "eps": 1e-6, "padding_mask": None}
    if op == "central_query":
        query = zeros(B, H, HEAD)
        tensors, saved = (
            {"weight": zeros(H, HEAD, D), "bias": zeros(H, HEAD)},
            {"central_query": query, "energy_sum": query[..., 0]},
        )
        grads = {"dcentral_query": query}
    else:
        tensors = {"keys": zeros(B, H, D), "key_bias": zeros(B, H)}
        saved = {"pooled": zeros(B, H, D), "score_sum": zeros(B, H)}
        grads = {"dpooled": zeros(B, H, D), "dmass": zeros(B, H)}
    return {"x": x, **tensors, **rest}, {**grads, "x": x, **tensors, **saved, **rest, "output_mask": [True] * 3}


@pytest.mark.parametrize("op", ["central_query", "score_pool"])
@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_raw(op, direction):
    """Every tensor in other shapes, dtypes and devices: the same words from compiled code, Python and fake tensors."""
    arguments = raw_good(op)[direction == "bwd"]
    for name, t in arguments.items():
        if isinstance(t, torch.Tensor):
            wrong = [(ValueError, "has shape", t.new_zeros(t.shape[:-1])), (ValueError, "has shape", t[None])]
            wrong += [(TypeError, "has dtype", t.int())]
            if name != "x":
                wrong += [(ValueError, "is on meta", t.to("meta"))]
                wrong += [
                    (ValueError, "has shape", t.new_zeros([n + 1 for n in t.shape])),
                    (TypeError, "has dtype", t.double()),
                ]
            for exception, words, bad in wrong:
                said_alike(op, direction, exception, words, {**arguments, name: bad})
    for name, bad in (("eps", 0.0), ("eps", float("inf")), ("norm_eps", -1.0), ("norm_eps", float("nan"))):
        said_alike(op, direction, ValueError, f"{name} is", {**arguments, name: bad})
    mask = zeros(B, N + 1, dtype=torch.bool)
    said_alike(op, direction, ValueError, "padding_mask has shape", {**arguments, "padding_mask": mask})


def said_alike(op, direction, exception, words, arguments):
    messages = set()
    for backend in backends_of("cpu", "pooled_linear"):
        function = getattr(torch.ops.infsa, f"{op}_{direction}{SUFFIXES[backend]}")
        messages.add(refused(exception, words, function, *arguments.values()))
    if "is on" not in words:
        with FakeTensorMode() as mode:
            faked = [mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for t in arguments.values()]
            messages.add(refused(exception, words, getattr(torch.ops.infsa, f"{op}_{direction}"), *faked))
    assert len(messages) == 1, messages


@pytest.mark.parametrize("real", ["x", "q_weight", "out_weight", "q_bias", "norm_weight", "rho", "padding_mask"])
def test_a_real_tensor_among_fake_ones_is_named(real):
    vectors = {"q_bias": zeros(H * HEAD), "norm_weight": zeros(D), "rho": zeros(H), "padding_mask": zeros(B, N).bool()}
    arguments = {**good(), **vectors, "norm_eps": 1e-5}
    mode = FakeTensorMode()
    faked = {n: mode.from_tensor(t) if isinstance(t, torch.Tensor) and n != real else t for n, t in arguments.items()}
    refused(TypeError, f"{real} is a real tensor, expected a fake one", pooled_linear_infsa, **faked)


def test_backend_that_cannot_run():
    with infsa_kernels.backend("cuda"), pytest.raises(RuntimeError, match="backend 'cuda' cannot run this call"):
        pooled_linear_infsa(**good())

"""Whatever is wrong with an argument is refused with the op, the argument, what it is and what it must be.

The same words come from the public function, from torch.ops, from the raw ops of every backend and from fake tensors:
those of ops/check.py.
"""

import contextlib
import re

import numpy as np
import pytest
import torch
from helpers.backends import backends_of
from helpers.bad_input_cases import (
    DV,
    EVERYWHERE,
    LAYOUTS,
    PUBLIC,
    PYTHON_TYPES,
    RAW,
    B,
    D,
    H,
    M,
    N,
    boolean,
    good,
    zeros,
)
from helpers.calls import OPS, raw_op
from torch._subclasses.fake_tensor import FakeTensorMode

import infsa_kernels
from infsa_kernels.ops.backends import SUFFIXES

pytestmark = pytest.mark.parametrize("op", OPS)


def each(*tables):
    rows = [row for table in tables for row in table]
    names = [re.sub(r"[^\w .=-]", "", words if isinstance(words, str) else words[1])[:60] for _, words in rows]
    return pytest.mark.parametrize(("wrong", "words"), rows, ids=names)


def refused(op, exception, words, function, *args, **kwargs):
    with pytest.raises(exception) as caught:
        function(*args, **kwargs)
    assert type(caught.value) is exception
    message = str(caught.value).split("\nException raised from")[0]
    assert message.startswith(f"infsa::{op}: {words}")
    return message


def raw_arguments(q, k, v, eps=1e-6, rho=1.0, head_rho=None, key_padding_mask=None, query_padding_mask=None):
    return q, k, v, eps, rho, head_rho, key_padding_mask, query_padding_mask


def fake(mode, arguments):
    """The arguments as fake tensors; a meta tensor becomes one on a GPU, since fake tensors know no other device."""

    def convert(t):
        if not isinstance(t, torch.Tensor):
            return t
        if t.is_meta:
            return torch.empty(t.shape, dtype=t.dtype, device="cuda")
        return mode.from_tensor(t)

    with mode:
        return {name: convert(t) for name, t in arguments.items()}


@each(EVERYWHERE, PUBLIC, LAYOUTS)
def test_public(op, wrong, words, device, backend):
    arguments = {**good(), **wrong}
    refused(op, *words, getattr(infsa_kernels, f"{op}_infsa"), **arguments)
    refused(op, *words, getattr(torch.ops.infsa, op), **arguments)


@each(EVERYWHERE, RAW)
def test_raw(op, wrong, words, device):
    """Compiled code, Python and fake tensors say the same, word for word."""
    arguments = {**good(), **wrong}
    messages = set()
    for backend in backends_of("cpu"):
        messages.add(refused(op, *words, raw_op(f"{op}_fwd", backend), *raw_arguments(**arguments)))
    exception, text = words
    with FakeTensorMode() as mode:
        faked = fake(mode, arguments)
        for suffix in dict.fromkeys(SUFFIXES.values()):
            function = getattr(torch.ops.infsa, f"{op}_fwd{suffix}")
            message = refused(
                op, exception, text.replace("is on meta", "is on cuda:0"), function, *raw_arguments(**faked)
            )
            messages.add(message.replace("is on cuda:0", "is on meta"))
    assert len(messages) == 1


@each(EVERYWHERE, RAW)
def test_raw_below_autograd(op, wrong, words, device, backend):
    """In inference mode a compiled kernel is called before any Python, and refuses in its own few words."""
    with torch.inference_mode(), pytest.raises((TypeError, ValueError), match=f"infsa::{op}"):
        raw_op(f"{op}_fwd", backend)(*raw_arguments(**{**good(), **wrong}))


@each(EVERYWHERE, PUBLIC)
def test_public_under_fake_tensors(op, wrong, words, device):
    exception, text = words
    with FakeTensorMode() as mode:
        arguments = fake(mode, {**good(), **wrong})
        refused(op, exception, text.replace("is on meta", "is on cuda:0"), getattr(torch.ops.infsa, op), **arguments)


@each(PYTHON_TYPES)
def test_python_types(op, wrong, words, device):
    refused(op, TypeError, words, getattr(infsa_kernels, f"{op}_infsa"), **{**good(), **wrong})
    if "v" not in wrong:
        arguments = {name: t for name, t in {**good(), **wrong}.items() if name != "v"}
        refused(op, TypeError, words, getattr(infsa_kernels, f"{op}_infsa_scores"), **arguments)


def test_eps_is_no_variable_of_transforms(op, device):
    """torch.func would give a gradient of nothing, or torch's own words about the storage of wrappers."""
    function, arguments = getattr(infsa_kernels, f"{op}_infsa"), good()

    def call(eps):
        return function(**arguments, eps=eps).sum()

    refused(op, TypeError, "eps is a tensor that requires a gradient", torch.func.grad(call), torch.tensor(1e-6))
    refused(op, TypeError, "eps is a tensor that vmap maps over", torch.vmap(call), torch.full((2,), 1e-6))
    with pytest.raises(Exception, match="eps is a tensor that requires a gradient"):
        torch.compile(call, backend="eager", fullgraph=True)(torch.tensor(1e-6, requires_grad=True))


@pytest.mark.parametrize("eps", [torch.tensor(1e-6), np.float32(1e-6), torch.full((1,), 1e-6)], ids=str)
def test_what_has_one_value_is_a_number(op, eps, device):
    getattr(infsa_kernels, f"{op}_infsa")(**good(), eps=eps)


@pytest.mark.parametrize("real", ["q", "k", "v", "rho", "key_padding_mask", "query_padding_mask"])
@pytest.mark.parametrize("inside", [False, True])
def test_a_real_tensor_among_fake_ones_is_named(op, real, inside, device):
    """torch refuses it with an AssertionError that leaves the reader to look for it."""
    mode = FakeTensorMode()
    masks = {"key_padding_mask": boolean(B, M), "query_padding_mask": boolean(B, N)}
    arguments = {**good(), **masks, "rho": zeros(H)}
    faked = {n: t if n == real else mode.from_tensor(t) for n, t in arguments.items()}
    with mode if inside else contextlib.nullcontext():
        words = f"{real} is a real tensor, expected a fake one"
        refused(op, TypeError, words, getattr(infsa_kernels, f"{op}_infsa"), **faked)
        refused(op, TypeError, words, getattr(torch.ops.infsa, op), **faked)


@pytest.mark.parametrize("missing", ["q", "k", "v"])
def test_none_is_no_tensor(op, missing, device):
    words = f"{missing} is None, expected a Tensor"
    refused(op, TypeError, words, getattr(torch.ops.infsa, op), **{**good(), missing: None})


@each([row for row in EVERYWHERE + PUBLIC + LAYOUTS if not row[1][1].startswith("v ")])
def test_scores(op, wrong, words, device):
    arguments = {name: t for name, t in {**good(), **wrong}.items() if name != "v"}
    refused(op, *words, getattr(infsa_kernels, f"{op}_infsa_scores"), **arguments)


@each(LAYOUTS)
def test_raw_layouts(op, wrong, words, device, backend):
    """The dispatcher and torch's operations refuse most of them in their own words; none is taken for dense memory."""
    if "rho" not in wrong:
        with pytest.raises((NotImplementedError, RuntimeError, TypeError, ValueError)):
            raw_op(f"{op}_fwd", backend)(*raw_arguments(**{**good(), **wrong}))


def backward_arguments(op):
    q, k, v = good().values()
    out = {"dout": zeros(B, H, DV), "q": q, "k": k, "v": v, "context": zeros(B, H, DV), "central_query": zeros(B, H, D)}
    out.update(energy_sum=zeros(B, H), score_sum=zeros(B, H))
    if op == "pure":
        out = {"dout": zeros(B, H, N, DV), "q": q, "k": k, "v": v, "out": zeros(B, H, N, DV), "norm": zeros(B, H)}
    rest = {"eps": 1e-6, "rho": 1.0, "head_rho": None, "key_padding_mask": None, "query_padding_mask": None}
    return {**out, **rest, "output_mask": [True] * 4}


def test_raw_backward(op, device):
    """Every tensor of every raw backward op, too few and too many of everything, of another dtype, on another device."""
    arguments = backward_arguments(op)
    for name, t in arguments.items():
        if not isinstance(t, torch.Tensor):
            continue
        wrong_shapes = [t.new_zeros(t.shape[:-1]), t[None], t.new_zeros(0), t.new_zeros([n + 1 for n in t.shape])]
        wrong_shapes += [t.select(i, 0).unsqueeze(i) for i in range(t.dim()) if (name, i) not in {("q", 2)}]
        wrong = [(ValueError, "has shape", bad) for bad in wrong_shapes]
        wrong += [
            (TypeError, "has dtype", t.double()),
            (TypeError, "has dtype", t.int()),
            (ValueError, "is on", t.to("meta")),
        ]
        for exception, words, bad in wrong:
            messages = set()
            for backend in backends_of("cpu"):
                with pytest.raises(exception, match=f"^infsa::{op}: .* {words}") as caught:
                    raw_op(f"{op}_bwd", backend)(*{**arguments, name: bad}.values())
                messages.add(str(caught.value))
            assert len(messages) == 1, messages


def test_meta_tensors_are_no_mistake(op, device):
    out = getattr(torch.ops.infsa, op)(*(t.to("meta") for t in good().values()))
    assert out.is_meta
    assert out.shape == ((B, H, DV) if op == "linear" else (B, H, N, DV))


def test_unknown_backends(op, device):
    with pytest.raises(ValueError, match=r"got 'metal', expected one of 'cpu', 'cuda', 'triton', 'eager'"):
        infsa_kernels.backend("metal")
    with pytest.raises(ValueError, match="no backend 'metal', expected one of"):
        getattr(torch.ops.infsa, op)(*good().values(), backend="metal")

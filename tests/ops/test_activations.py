"""Other activations than ReLU: values, gradients, masks, transforms, and what says that there are no kernels of them."""

import math

import pytest
import torch
from helpers.framework_calls import RawCalls
from torch.func import grad, vmap
from torch.testing import assert_close

import infsa_kernels
from infsa_kernels import linear_infsa, linear_infsa_scores, pure_infsa, pure_infsa_scores

# Written otherwise than the package does.
PHI = {
    "relu": lambda t: (t + t.abs()) / 2,
    "gelu": lambda t: t * (1 + torch.erf(t / math.sqrt(2))) / 2,
    "abs": lambda t: t * t.sign(),
    "softplus": lambda t: (1 + t.exp()).log(),
}
OTHERS = [name for name in PHI if name != "relu"]
FUNCTIONS = {"linear": linear_infsa, "pure": pure_infsa}
SCORES = {"linear": linear_infsa_scores, "pure": pure_infsa_scores}
B, H, N, M, D, DV = 2, 3, 7, 5, 4, 6
RHO, EPS = 0.8, 1e-3


@pytest.fixture
def qkv():
    return tuple(torch.randn(B, H, n, d, dtype=torch.float64) for n, d in ((N, D), (M, D), (M, DV)))


def by_hand(op, activation, q, k, v, keys=None, queries=None, floor=0.0):
    """Head by head, of the tokens that count alone."""
    outputs = []
    for b in range(len(q)):
        kept_keys = torch.arange(k.shape[2])[slice(None) if keys is None else ~keys[b]]
        kept_queries = torch.arange(q.shape[2])[slice(None) if queries is None else ~queries[b]]
        for h in range(q.shape[1]):
            u, kappa, values = q[b, h, kept_queries], k[b, h, kept_keys], v[b, h, kept_keys]
            if op == "pure":
                P = PHI[activation](u @ kappa.T / q.shape[-1])
                rows = RHO * P @ values / ((P**2).sum() ** 0.5 + EPS)
                outputs.append(q.new_zeros(q.shape[2], v.shape[3]).index_copy(0, kept_queries, rows))
                continue
            energy = (u**2).sum(1) ** 0.5 / q.shape[-1] ** 0.5
            central = energy @ u / q.shape[-1] ** 0.5 / (energy.sum() + EPS)
            t = kappa @ central / q.shape[-1] ** 0.5
            share = floor * t.abs().sum()
            a = (PHI[activation](t) + share / len(t)) / (PHI[activation](t).abs().sum() + share + EPS)
            outputs.append((RHO * a @ values).expand(q.shape[2], -1))
    return torch.stack(outputs).view(*q.shape[:3], -1)


def masks():
    keys, queries = torch.zeros(B, M, dtype=torch.bool), torch.zeros(B, N, dtype=torch.bool)
    keys[0, 1], keys[1, 3:], queries[0, 4], queries[1, :2] = True, True, True, True
    return keys, queries


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("activation", PHI)
@pytest.mark.parametrize("op", FUNCTIONS)
def test_values_and_gradients(op, activation, masked, qkv):
    keys, queries = masks() if masked else (None, None)
    dout = torch.randn(B, H, N, DV, dtype=torch.float64)
    if masked and op == "linear":
        dout[0, :, 4], dout[1, :, :2] = 0, 0  # one row for all positions, those that are masked too
    leaves = [t.clone().requires_grad_() for t in qkv]
    truth = by_hand(op, activation, *leaves, keys, queries)
    truths = torch.autograd.grad(truth, leaves, dout)
    given = [t.clone() for t in qkv]
    if masked:
        given[0].movedim(1, 2)[queries] = math.nan
        for t in given[1:]:
            t.movedim(1, 2)[keys] = math.nan
    given = [t.requires_grad_() for t in given]
    out = FUNCTIONS[op](*given, RHO, EPS, keys, queries, activation=activation)
    rows = slice(None) if queries is None else ~queries[:, None].expand(B, H, N)
    assert_close(out[rows], truth[rows])
    assert_close(torch.autograd.grad(out, given, dout), truths)
    for dtype in (torch.float32, torch.bfloat16):
        low = FUNCTIONS[op](*(t.to(dtype) for t in given), RHO, EPS, keys, queries, activation=activation)
        assert low.dtype == dtype
        same = FUNCTIONS[op](*(t.to(dtype).double() for t in given), RHO, EPS, keys, queries, activation=activation)
        assert_close(low, same.to(dtype))  # sums in float32


@pytest.mark.parametrize("activation", PHI)
def test_a_floor(activation, qkv):
    q, k, v = qkv
    out = linear_infsa(q, k, v, RHO, EPS, *masks(), score_floor=0.3, activation=activation)
    assert_close(out, by_hand("linear", activation, q, k, v, *masks(), floor=0.3))


@pytest.mark.parametrize("activation", OTHERS)
@pytest.mark.parametrize("op", FUNCTIONS)
def test_gradcheck(op, activation, qkv):
    q, k, v = (t[0, :2, :3, :2].clone().requires_grad_() for t in qkv)  # three dimensions
    rho = torch.rand(2, dtype=torch.float64, requires_grad=True)
    floor = {"score_floor": 0.3} if op == "linear" else {}

    def call(q, k, v, rho):
        return FUNCTIONS[op](q, k, v, rho, activation=activation, **floor)

    assert torch.autograd.gradcheck(call, (q, k, v, rho))
    assert torch.autograd.gradgradcheck(call, (q, k, v, rho))


@pytest.mark.parametrize("activation", OTHERS)
@pytest.mark.parametrize("op", FUNCTIONS)
def test_weights(op, activation, qkv):
    q, k, v = qkv
    keys, queries = masks()
    given = RHO, EPS, keys, queries
    weights = SCORES[op](q, k, *given, activation=activation)
    weights = weights.mT if op == "linear" else weights
    out = FUNCTIONS[op](q, k, v, *given, activation=activation)
    assert_close((weights @ v).expand(out.shape), out)
    assert (weights.mT[keys[:, None].expand(B, H, M)] == 0).all()
    size = weights.abs().sum(-1) if op == "linear" else torch.linalg.matrix_norm(weights)
    assert (size < RHO).all() and (size > 0.9 * RHO).all()
    assert (weights < 0).any() == (activation == "gelu")


@pytest.mark.parametrize("op", FUNCTIONS)
def test_relu_is_the_kernel_and_the_others_are_none(op, qkv):
    q, k, v = (t.float() for t in qkv)
    assert FUNCTIONS[op](q, k, v, activation="relu").equal(FUNCTIONS[op](q, k, v))
    for activation, count in (("relu", 1), ("gelu", 0)):
        with RawCalls() as raw:
            FUNCTIONS[op](q, k, v, activation=activation)
        assert len(raw.calls) == count
    tied = FUNCTIONS[op](q, q, q, activation="gelu")
    assert_close(tied, FUNCTIONS[op](q, q.clone(), q, activation="gelu"))


@pytest.mark.parametrize("op", FUNCTIONS)
def test_transforms(op, qkv):
    q, k, v = qkv

    def call(q, k, v):
        return FUNCTIONS[op](q, k, v, 0.9, activation="softplus")

    assert_close(vmap(call)(*(t[:, None] for t in qkv)).squeeze(1), call(*qkv))
    assert grad(lambda q: call(q, k, v).sum())(q).isfinite().all()
    assert_close(torch.compile(call, fullgraph=True, backend="eager")(*qkv), call(*qkv))
    with torch.autocast("cpu", torch.bfloat16):
        assert call(q.float(), k.float(), v.float()).dtype == torch.bfloat16


@pytest.mark.parametrize("op", FUNCTIONS)
def test_errors(op, qkv):
    expected = "expected 'relu', 'gelu', 'abs' or 'softplus'"
    q, k, v = qkv
    for call in (lambda a: FUNCTIONS[op](q, k, v, activation=a), lambda a: SCORES[op](q, k, activation=a)):
        with pytest.raises(ValueError, match=f"infsa::{op}: activation is 'silu', {expected}"):
            call("silu")
        with pytest.raises(TypeError, match=f"infsa::{op}: activation is a NoneType, expected a str"):
            call(None)
    with pytest.raises(ValueError, match=rf"infsa::{op}: k has shape \[2, 3, 5, 3\], expected"):
        FUNCTIONS[op](q, k[..., 1:], v, activation="gelu")
    with pytest.raises(ValueError, match=f"infsa::{op}: eps is 0"):
        FUNCTIONS[op](q, k, v, eps=0.0, activation="gelu")


@pytest.mark.parametrize("op", FUNCTIONS)
def test_backends(op, qkv):
    reasons = infsa_kernels.explain_backend(op, torch.device("cpu"), torch.float32, (1, 1, 8, 8), activation="abs")
    assert reasons.pop("eager") is None
    assert reasons and all("activation is 'abs', and kernels have 'relu' only" in reason for reason in reasons.values())
    with infsa_kernels.backend("eager"):
        FUNCTIONS[op](*qkv, activation="abs")
    with (
        infsa_kernels.backend("cpu"),
        pytest.raises(RuntimeError, match=r"backend 'cpu' cannot .* activation is 'abs'"),
    ):
        FUNCTIONS[op](*qkv, activation="abs")

"""Calls of the pooled layer as data: arguments by name, its result and gradients, and those of the plain path."""

import torch
from torch import Tensor

from helpers.calls import Expected, plain
from infsa_kernels import pooled_linear_infsa, reference
from infsa_kernels.testing import FORWARD, GRADIENT, assert_within, error_of_eager

B, N, D, H, HEAD, V_HEAD, OUT = 2, 37, 24, 3, 5, 4, 10


def layer(
    dtype=torch.float64, *, tied=True, bias=True, norm="affine", rho="heads", masked=False, shape=(B, N, D), heads=H,
    head=HEAD, v_head=V_HEAD, out=OUT,
):  # fmt: skip
    """Keyword arguments of one call; what can have a gradient wants one."""
    width = shape[-1]

    def random(*sizes, scale=1.0):
        return (torch.randn(sizes) * scale).to(dtype).requires_grad_()

    call = {
        "x": random(*shape),
        "num_heads": heads,
        "q_weight": random(heads * head, width, scale=width**-0.5),
        "v_weight": random(heads * v_head, width, scale=width**-0.5),
        "out_weight": random(out, heads * v_head, scale=(heads * v_head) ** -0.5),
    }
    if not tied:
        call["k_weight"] = random(heads * head, width, scale=width**-0.5)
    if bias:
        call |= {"q_bias": random(heads * head), "v_bias": random(heads * v_head), "out_bias": random(out)}
        if not tied:
            call["k_bias"] = random(heads * head)
    if norm:
        call["norm_eps"] = 1e-5
    if norm == "affine":
        call |= {"norm_weight": random(width), "norm_bias": random(width)}
    rho_shape = {"scalar": (), "one": (1,), "heads": (heads,)}
    call["rho"] = (torch.rand(rho_shape[rho]) + 0.5).to(dtype).requires_grad_() if rho in rho_shape else 0.95
    if masked:
        call["padding_mask"] = (torch.arange(shape[1]) + torch.arange(shape[0])[:, None]) % 3 == 0
    return call


def leaves(call: dict) -> dict[str, Tensor]:
    return {n: t for n, t in call.items() if isinstance(t, Tensor) and t.requires_grad}


def results(function, call: dict, dout: Tensor) -> dict[str, Tensor]:
    """The output and all gradients by name."""
    out = function(**call)
    wanted = leaves(call)
    grads = torch.autograd.grad(out, wanted.values(), dout.to(out.dtype), allow_unused=True)
    return {"out": out.detach(), **{f"d{n}": g for n, g in zip(wanted, grads) if g is not None}}


def to(call: dict, dtype: torch.dtype) -> dict:
    cast = {n: t.detach().to(dtype).requires_grad_() for n, t in leaves(call).items()}
    return {**call, **cast}


def nearby(call: dict) -> dict:
    """The same call on values that differ by up to 1/64 of themselves."""
    moved = {
        n: (t.detach() * (1 + (torch.rand_like(t, dtype=torch.float32) - 0.5) / 32).to(t.dtype)).requires_grad_()
        for n, t in leaves(call).items()
    }
    return {**call, **moved}


def expected(call: dict, dout: Tensor, draws: int = 8) -> dict[str, Expected]:
    """What a call must give. The error of plain code is the largest over a few nearby inputs."""
    dtype, found = call["x"].dtype, {}
    for draw in range(draws):
        near = nearby(call) if draw else call
        truth = results(reference.pooled_linear, to(near, torch.float64), dout)
        low = results(reference.pooled_linear, to(near, plain(dtype)), dout)
        for name, t in truth.items():
            error = error_of_eager(low[name], t, dtype)
            known = found.setdefault(name, Expected(t, error))
            known.eager_error = max(known.eager_error, error)
    return found


def check(call: dict, dout: Tensor) -> dict[str, Tensor]:
    """Holds a call and its gradients, on the backend in force, to the rule of infsa_kernels/testing.py; returns them."""
    wanted, actual = expected(call, dout), results(pooled_linear_infsa, call, dout)
    assert actual.keys() == wanted.keys()
    for name, result in actual.items():
        assert result.dtype == (call["x"] if name == "out" else call[name[1:]]).dtype
        assert_within(
            result, wanted[name].truth, wanted[name].eager_error, FORWARD if name == "out" else GRADIENT, name
        )
    return actual


def output_gradient(call: dict) -> Tensor:
    return torch.randn(call["x"].shape[0], call["out_weight"].shape[0]).to(call["x"].dtype)

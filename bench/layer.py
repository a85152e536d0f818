"""The pooled layer beside the plain path: the same weights through `nn.Linear`, the fused operator and `nn.Linear`."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from infsa_kernels import linear_infsa, pooled_linear_infsa, reference
from infsa_kernels.testing import FORWARD, GRADIENT, error_of_eager, rounding

from . import rows
from .cases import EPS, HEADS, RHO, short
from .image import PATCH, D, patches
from .measure import Action, interleave, observe

# Up to where float64 through the plain path takes seconds.
LARGEST_PIXELS = 1024
NORM_EPS = 1e-6
WEIGHTS = ("q_weight", "v_weight", "out_weight", "q_bias", "v_bias", "out_bias", "norm_weight", "norm_bias")


def inputs(pixels: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """x (1, N, D), the picture's projected patches, and one random layer: K = Q, biases, LayerNorm."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator)

    tokens = patches(pixels)
    made = {"x": (tokens @ (random(tokens.shape[1], D) / tokens.shape[1] ** 0.5))[None]}
    made |= {name: random(D, D) / D**0.5 if name.endswith("t") else random(D) / 8 for name in WEIGHTS[:6]}
    made |= {"norm_weight": 1 + random(D) / 8, "norm_bias": random(D) / 8}
    return {name: t.to(device, dtype) for name, t in made.items()}


def plain(x, q_weight, v_weight, out_weight, q_bias, v_bias, out_bias, norm_weight, norm_bias) -> Tensor:
    H, d = HEADS["linear"]
    tokens = F.layer_norm(x, (D,), norm_weight, norm_bias, NORM_EPS)
    q, v = (
        F.linear(tokens, weight, bias).unflatten(-1, (H, d)).transpose(1, 2)
        for weight, bias in ((q_weight, q_bias), (v_weight, v_bias))
    )
    out = linear_infsa(q, q, v, RHO, EPS)
    return F.linear(out.transpose(1, 2).flatten(2), out_weight, out_bias)


def pooled(*tensors: Tensor) -> Tensor:
    named = dict(zip(("x", *WEIGHTS), tensors))
    return pooled_linear_infsa(**named, num_heads=HEADS["linear"][0], rho=RHO, eps=EPS, norm_eps=NORM_EPS)


def action(function, tensors: dict[str, Tensor], dout: Tensor, train: bool) -> Action:
    if not train:

        def forward(lap):
            with torch.no_grad():
                return [function(*tensors.values())]

        return forward
    leaves = [t.detach().requires_grad_() for t in tensors.values()]

    def step(lap):
        out = function(*leaves)
        # The plain path's row has to reach every token, whose gradients are summed again: as in a model.
        return [out.detach(), *torch.autograd.grad(out, leaves, dout)]

    return step


def measure(settings, sizes: list[int], progress: Callable[[str], None]) -> list[dict]:
    """A row per size, pass and candidate; the gate stands before the time of the pooled layer."""
    found = []
    for pixels in sorted(p for p in sizes if p <= LARGEST_PIXELS) if sizes else ():
        progress(f"layer {pixels}px")
        tensors = inputs(pixels, settings.dtype, settings.device)
        generator = torch.Generator().manual_seed(1)
        row = torch.randn(1, D, generator=generator).to(tensors["x"])
        every = (row[:, None] / tensors["x"].shape[1]).expand(tensors["x"].shape).contiguous()
        verdict = judge(tensors, row)
        for direction in ("fwd", "fwd+bwd"):
            train = direction == "fwd+bwd"
            actions = {"pooled": action(pooled, tensors, row, train), "plain": action(plain, tensors, every, train)}
            seen = {name: observe(a, settings.device, warm_up=True)[0] for name, a in actions.items()}
            interleave(actions, seen, settings.budget, settings.device)
            for name in actions:
                found.append(
                    {
                        "candidate": name,
                        "direction": direction,
                        "pixels": pixels,
                        "N": (pixels // PATCH) ** 2,
                        "dtype": short(settings.dtype),
                        **rows.times(seen[name], direction),
                        **rows.memory(seen[name], direction),
                        **(verdict if name == "pooled" else {}),
                    }
                )
    return found


def judge(tensors: dict[str, Tensor], dout: Tensor) -> dict:
    """Every result of the pooled layer by the rule: error and bound of the one that is nearest to its bound."""

    def path(*tensors):
        named = dict(zip(("x", *WEIGHTS), tensors))
        return reference.linear_layer(**named, num_heads=HEADS["linear"][0], rho=RHO, eps=EPS, norm_eps=NORM_EPS)

    def results(function, dtype):
        return action(function, {n: t.to(dtype) for n, t in tensors.items()}, dout.to(dtype), True)(None)

    dtype = tensors["x"].dtype
    actual, low, truth = results(pooled, dtype), results(path, dtype), results(path, torch.float64)
    worst = {"error": 0.0, "bound": 1.0, "worst": "out"}
    for name, result, eager, true in zip(("out", "x", *WEIGHTS), actual, low, truth):
        largest = float(true.abs().max())
        factor = FORWARD if name == "out" else GRADIENT
        bound = factor * error_of_eager(eager, true, dtype) + rounding(true, dtype)
        error = float((result.double() - true).abs().max())
        if not error / bound <= worst["error"] / worst["bound"]:
            worst = {"error": error / largest, "bound": bound / largest, "worst": name}
    right = worst["error"] <= worst["bound"]
    return worst if right else {**worst, "status": "wrong"}

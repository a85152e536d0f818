"""One point of a level: what is built, how it is checked, and the row that comes of it. Runs in a process of its own.

    operator    q, k, v (1, H, N, d) given       -> the core
    layer       x (1, N, D)                      -> x + layer(LayerNorm(x))
    model       a picture                        -> class scores of a 4- or 24-layer scaffold

A result counts only if it is close to float64: outputs by their largest error, the input's gradients, which jump where a ReLU
does, by the norm of their error.
"""

import copy
import statistics
import time
from contextlib import nullcontext
from functools import partial

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import machine, peers, rows, scaffold
from .image import PATCH, D, picture, queries_keys_values, tokens
from .measure import Observation, interleave, observe

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
BASELINE = "linear_infsa"

# Largest error of an output, over its largest entry, and of a gradient, over its norm.
OUTPUT_BOUND = {"fp32": 1e-3, "bf16": 5e-2, "fp16": 1e-2, "fp64": 1e-9}
GRADIENT_BOUND = {"fp32": 1e-2, "bf16": 2e-1, "fp16": 5e-2, "fp64": 1e-7}
CHECKED_ROWS = 64
GRADIENTS_UP_TO = 1024  # tokens
MODELS_UP_TO = 256  # tokens

ENERGY_SECONDS = 2.0


class Subject:
    """A point's module in its dtype, its inputs, and what calls it."""

    def __init__(self, point: dict, device: torch.device, dim: int = D):
        self.point, self.device, self.dtype = point, device, DTYPES[point["dtype"]]
        level, name, pixels = point["level"], point["name"], point["pixels"]
        torch.manual_seed(0)
        grid = (pixels // PATCH,) * 2
        if level == "model":
            self.module = scaffold.model(name, point["depth"], pixels, dim)
            inputs = [picture(pixels)]
        else:
            self.module = peers.build(name, dim, grid)
            if level == "layer":
                self.norm = nn.LayerNorm(dim)
                inputs = [tokens(pixels)[None, :, :dim]]
            else:
                inputs = [self.module.heads(t[None, :, :dim]) for t in queries_keys_values(pixels)]
        self.module = self.module.to(device, self.dtype)
        if level == "layer":
            self.module.add_module("sublayer_norm", self.norm.to(device, self.dtype))
        self.inputs = [t.to(device, self.dtype) for t in inputs]

    @property
    def mechanism(self):
        return self.module if isinstance(self.module, peers.Mechanism) else None

    def function(self):
        """What is called: inputs -> output."""
        level, module = self.point["level"], self.module
        if level == "model":
            return module
        return module.core if level == "operator" else partial(_sublayer, module)

    def parameters(self) -> list[nn.Parameter]:
        return [p for n, p in self.module.named_parameters() if not n.startswith("sublayer_norm")]

    def action(self, function):
        if self.point["phase"] == "fwd":
            self.module.eval()

            def forward(lap):
                with torch.no_grad():
                    return [function(*self.inputs)]

            return forward
        self.module.train()
        leaves = [t.detach().requires_grad_() for t in self.inputs]
        wanted = [*leaves, *self.module.parameters()]
        dout = []

        def train(lap):
            out = function(*leaves)
            if not dout:
                dout.append(torch.randn_like(out))
            lap()
            return [out.detach(), *(g for g in torch.autograd.grad(out, wanted, dout[0], allow_unused=True) if g is not None)]

        return train

    def check(self, function) -> dict:
        """Errors against float64, and whether they are in bounds."""
        N, level = (self.point["pixels"] // PATCH) ** 2, self.point["level"]
        if level == "model" and N > MODELS_UP_TO:
            return {"checked": "not at this size: in float64 it would take longer than all the rest"}
        self.module.eval()
        gradients = self.point["phase"] == "train" and level != "model" and N <= GRADIENTS_UP_TO
        count = N if gradients else min(N, CHECKED_ROWS)
        picked = torch.randperm(N, generator=torch.Generator().manual_seed(N))[:count].sort().values.to(self.device)
        exact = copy.deepcopy(self.module).double()
        with torch.set_grad_enabled(gradients):
            truth, true_gradient = self._evaluate(partial(self._truth, exact, picked), torch.float64, gradients)
            found, gradient = self._evaluate(lambda *t: self._pick(function(*t), picked), self.dtype, gradients)
        if level == "layer":  # the residual would hide what the layer adds
            truth, found = (t - self.inputs[0][:, picked].double() for t in (truth, found))
        name = self.point["dtype"]
        result = {"error": _relative(found, truth, torch.amax), "bound": OUTPUT_BOUND[name]}
        right = result["error"] <= result["bound"]
        if gradients:
            result["gradient_error"] = _relative(gradient, true_gradient, torch.linalg.vector_norm)
            right &= result["gradient_error"] <= GRADIENT_BOUND[name]
        part = "all rows" if count == N else f"{count} of {N} rows"
        return result | {"checked": part + (" and gradients" if gradients else ""), "right": bool(right)}

    def _evaluate(self, function, dtype, gradients):
        leaves = [t.detach().to(dtype).requires_grad_(gradients) for t in self.inputs]
        out = function(*leaves)
        if not gradients:
            return out.double(), None
        dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        grads = torch.autograd.grad(out, leaves, dout, allow_unused=True)
        return out.detach().double(), torch.cat([g.double().flatten() for g in grads if g is not None])

    def _truth(self, exact, picked, *inputs):
        level = self.point["level"]
        if level == "model":
            return exact(*inputs)
        return exact.truth(*inputs, picked) if level == "operator" else exact.sublayer_truth(*inputs, exact.sublayer_norm, picked)

    def _pick(self, out, picked):
        level = self.point["level"]
        return out if level == "model" else out[:, :, picked] if level == "operator" else out[:, picked]


def _sublayer(module, x):
    return module.sublayer(x, module.sublayer_norm)


def _relative(found, truth, size) -> float:
    return (size((found - truth).abs()) / size(truth.abs()).clamp_min(1e-300)).item()


def measure(point: dict, device: torch.device, budget: float, dim: int = D) -> dict:
    """The row of a point: its figures, or the status that says why there are none."""
    began = time.perf_counter()
    row = {**point, "label": peers.label(point["name"]), "N": (point["pixels"] // PATCH) ** 2}
    try:
        if why := peers.MECHANISMS[point["name"]][0].unavailable(device):
            raise NotImplementedError(why)
        row |= _measure(point, device, budget, dim)
    except Exception as error:
        row |= rows.failure(error)
    return row | {"seconds": time.perf_counter() - began}


def _measure(point, device, budget, dim) -> dict:
    subject = Subject(point, device, dim)
    function, context = subject.function(), nullcontext()
    way = point["way"]
    if way == "compile":
        torch._dynamo.reset()
        function = torch.compile(function, dynamic=False)
    elif way.startswith("sdpa:"):
        context = sdpa_kernel(SDPA[way.removeprefix("sdpa:")])
    facts = {"parameters": sum(p.numel() for p in subject.parameters())}
    if mechanism := subject.mechanism:
        facts |= {"H": mechanism.num_heads, "d": mechanism.head_dim, "time": mechanism.TIME, "state": mechanism.STATE}
        facts |= {"state_size": mechanism.state_size(), "causal": mechanism.CAUSAL, "note": mechanism.NOTE}
    with context:
        verdict = subject.check(function)
        if not verdict.pop("right", True):
            return facts | verdict | {"status": "wrong", "reason": "further from float64 than allowed"}
        actions = {"own": subject.action(function)}
        seen = {"own": observe(actions["own"], device, warm_up=True)[0]}
        if point["level"] != "model" and (point["name"], way) != (BASELINE, "eager"):
            baseline = Subject({**point, "name": BASELINE, "way": "eager"}, device, dim)
            actions["baseline"] = baseline.action(baseline.function())
            seen["baseline"] = observe(actions["baseline"], device, warm_up=True)[0]
        _interleave(actions, seen, budget, device)
        facts |= verdict | rows.times(seen["own"], "fwd") | rows.memory(seen["own"], "fwd")
        if point["phase"] == "train":
            facts["backward_s"] = statistics.median(laps[-1] for laps in seen["own"].samples)
        if "baseline" in seen:
            facts["baseline_s"] = rows.times(seen["baseline"], "fwd")["median_s"]
        if point["level"] == "model" and point["phase"] == "fwd" and device.type == "cuda":
            facts["joules"] = energy(actions["own"], device)
    if point["level"] == "layer" and (flops := mechanism.layer_flops(point["phase"] == "train")):
        # The product is measured next to what it is compared with.
        product = machine.gemm(machine.fastest_gemm(device, subject.dtype), device, subject.dtype)
        rate = machine.gemm_flops(device) / machine.seconds(product, device)
        facts |= {"flops": flops, "share_of_limit": flops / rate / facts["median_s"], "limit": "matrix product"}
    return facts


def _interleave(actions, seen: dict[str, Observation], budget, device) -> None:
    """In turn; calls of seconds keep the sample that they have."""
    if seen["own"].seconds < 2 * budget:
        interleave(actions, seen, budget, device)


def energy(action, device) -> float | None:
    """Joules of a call, by the board's own counter over at least ENERGY_SECONDS; None where there is no such counter."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        read = partial(pynvml.nvmlDeviceGetTotalEnergyConsumption, handle)
        read()
    except Exception:
        return None
    torch.cuda.synchronize()
    before, began, calls = read(), time.perf_counter(), 0
    while time.perf_counter() - began < ENERGY_SECONDS:
        action(lambda: None)
        torch.cuda.synchronize()
        calls += 1
    return (read() - before) / 1e3 / calls


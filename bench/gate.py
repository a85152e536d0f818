"""The one gate: a result counts only if it is as close to float64 as plain torch code of its dtype (infsa_kernels.testing).

    operator    out and the gradients of q, k and v, at the size that is measured
    layer       what it adds to x, and the gradients of x and of its parameters, at 224 x 224 pixels; at the size that is measured
                its core on its own q, k and v, or all of it again where it is no composition of projections and core, or compiled
    model       class scores at 112 x 112 pixels, and its layer as above

Plain code is the mechanism's own ``truth`` in the dtype of the case. Of long sequences some rows, drawn at random, are compared,
and some heads. A gradient jumps where a score is 0, and either side is right there: tokens with a score that float32 cannot tell
from 0 are left out when gradients are compared. Of a batch, the last picture is compared.
"""

import copy
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import infsa_kernels
from infsa_kernels.testing import FORWARD, GRADIENT, error_of_eager, rounding

from . import peers
from .subject import Subject, heads_of_model

# Where layers and models are compared whole; pictures above LARGE are compared at its size.
LAYER, MODEL, LARGE = 224, 112, 2048
ROWS = 64
# Tokens up to which gradients are compared, where nothing cheaper than all pairs is known.
GRADIENTS_UP_TO = 1024
DRAWS, ZERO = 3, 1e-12

# What a truth of our operators depends on: the last one is kept. What a verdict depends on, beside the level's own.
SHARED = ("pixels", "dtype", "layout", "batch", "dim", "heads", "phase", "device")
CASE = ("level", "dtype", "layout", "batch", "dim", "pixels", "way")
_known: dict[tuple | bool, tuple] = {}
_verdicts: dict[tuple, "Verdict"] = {}


@dataclass
class Verdict:
    """The tensor that is worst beside its bound; error and bound are relative to the tensor's largest entry."""

    right: bool
    error: float
    bound: float
    what: str
    checked: str

    def badness(self) -> float:
        return math.inf if math.isnan(self.error) else self.error / (self.bound or 1e-300)

    def row(self) -> dict:
        error = self.error if math.isfinite(self.error) else None
        found = {"error": error, "bound": self.bound, "worst": self.what, "checked": self.checked}
        reason = f"{self.what}: error {self.error:.1e} of its largest entry, allowed {self.bound:.1e}"
        return found if self.right else found | {"status": "wrong", "reason": reason}


def examine(subject: Subject, function=None) -> Verdict:
    """Calls what is measured, or the same at a size at which float64 is cheap, and compares; once for every case."""
    level = subject.case["level"]
    by_phase = level == "operator" or subject.case["way"] == "compile"
    size = subject.case["depth"] if level == "model" else subject.module.num_heads
    key = subject.name, size, by_phase and subject.case["phase"], *(str(subject.case[f]) for f in CASE)
    if key not in _verdicts:
        function = function or subject.function()
        if level == "operator":
            _verdicts[key] = _core(subject, function, subject.inputs, subject.case["phase"] == "train")
        else:
            _verdicts[key] = (_layer if level == "layer" else _model)(subject, function)
    return _verdicts[key]


def forget() -> None:
    """What was examined: the code has changed since."""
    _verdicts.clear()


def _layer(subject: Subject, function) -> Verdict:
    if subject.case["way"] == "compile":
        return _whole(subject, function)
    own = subject.at(pixels=min(LARGE, subject.case["pixels"]), phase="train")
    if own.case["pixels"] == LAYER:
        return _whole(own, own.function())
    small = examine(subject.at(pixels=LAYER))
    if own.module.FUSED:
        return _worst(small, _whole(own, own.function()))
    with torch.no_grad():
        q, k, v = own.module.project(own.module.sublayer_norm(own.inputs[0]))
    inputs = [v if t is None else t for t in (q, k, v)]
    return _worst(small, _core(own, own.on_backend(own.module.core), inputs, train=False))


def _model(subject: Subject, function) -> Verdict:
    small = subject.at(pixels=MODEL)
    exact = copy.deepcopy(small.module).double()

    def evaluate(inputs):
        with torch.no_grad(), infsa_kernels.backend("eager"):
            return {"out": exact(inputs[0].double())}, {"out": small.module(inputs[0])}, None

    expected = _expected(evaluate, [small.inputs[0][-1:]], DRAWS)
    with torch.no_grad():
        whole = judge({"out": small.function()(*small.inputs)[-1:]}, *expected, f"all at {MODEL} pixels")
    heads = heads_of_model(subject.name, subject.case["depth"], subject.case["dim"])
    return _worst(whole, examine(subject.at(level="layer", heads=heads)))


def _core(subject: Subject, function, inputs: list[Tensor], train: bool) -> Verdict:
    """Compares a core on q, k and v."""
    exact = copy.deepcopy(subject.module).double()
    gradients = train and (exact.BY_ROWS or subject.tokens <= GRADIENTS_UP_TO)
    whole = exact.POOLED or (gradients and not exact.BY_ROWS)
    rows = _drawn(subject, subject.tokens if whole else ROWS)
    shape = list(inputs[2].shape)
    shape[2] = 1 if exact.POOLED else shape[2]
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(inputs[2])
    # A gradient arrives in the layout of the output: that of q.
    dout = noise if exact.POOLED else torch.empty_like(inputs[0]).copy_(noise)
    groups = exact.head_groups(gradients)
    heads = [h for group in groups for h in group]

    def evaluate(inputs):
        parts = [[t[:, group] for t in (*inputs, dout[-1:])] for group in groups]
        truth = _joined([exact.results(*(t.double() for t in part), rows, gradients) for part in parts])
        plain = _joined([subject.module.results(*part, rows, gradients) for part in parts])
        return truth, plain, truth.pop("undecided", None)

    # Plain code, and our operators on every backend, are compared with one truth.
    ours = isinstance(exact, peers.InfSA) and subject.case["level"] == "operator"
    shared = ours and (type(exact).truth, exact.KEYS, *(str(subject.case.get(f)) for f in SHARED))
    if not shared or shared not in _known:
        _known.clear()
        few = gradients and subject.tokens <= GRADIENTS_UP_TO
        _known[shared] = _expected(evaluate, [t[-1:] for t in inputs], DRAWS if few else 1)
    expected = _known[shared]
    part = "" if len(heads) == exact.num_heads else f" in {len(heads)} of {exact.num_heads} heads"
    checked = _part(rows, subject) + part + (" and gradients" if gradients else "")

    found = _call(function, inputs, dout if gradients else None, ("dq", "dk", "dv"))
    found = {n: t[-1:, heads] for n, t in found.items()}
    found = {n: t if n == "out" and exact.POOLED else t[:, :, rows] for n, t in found.items()}
    return judge(found, *expected, checked)


def _whole(subject: Subject, function) -> Verdict:
    """Compares a layer, x + layer(LayerNorm(x))."""
    module, x = subject.module, subject.inputs[0][-1:]
    exact = copy.deepcopy(module).double()
    gradients = subject.case["phase"] == "train" and (module.FUSED or subject.tokens <= GRADIENTS_UP_TO)
    rows = _drawn(subject, subject.tokens if gradients else ROWS)
    dout = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x)
    names = ("dx", *(n for n, _ in module.named_parameters()))

    def results(function, of, x):
        with torch.set_grad_enabled(gradients):
            found = _call(function, [x], dout.to(x.dtype) if gradients else None, names, list(of.parameters()))
        # The residual would hide what the layer adds.
        return found | {"out": (found["out"].double() - x[:, rows].double()).to(x.dtype)}

    def evaluate(inputs):
        truth, plain = (
            results(lambda x: m.sublayer_truth(x, m.sublayer_norm, rows), m, inputs[0].to(dtype))
            for m, dtype in ((exact, torch.float64), (module, subject.dtype))
        )
        undecided = _undecided_tokens(exact, inputs[0].double()) if gradients else None
        if undecided is not None:  # dx has a part from every head, the weights' gradients from every token
            truth = {n: t for n, t in truth.items() if n == "out" or (n == "dx" and not undecided.all())}
        # What is exactly 0, as the gradient of a bias on softmax's keys, has no digits to compare.
        largest = max(t.abs().max() for t in truth.values())
        truth = {n: t for n, t in truth.items() if t.abs().max() > ZERO * largest}
        return truth, plain, undecided

    expected = _expected(evaluate, [x], DRAWS if subject.tokens <= GRADIENTS_UP_TO else 1)
    checked = f"{_part(rows, subject)}{' and gradients' if gradients else ''} at {subject.case['pixels']} pixels"

    if gradients:
        return judge(results(function, module, x), *expected, checked)
    return judge(results(lambda x: function(subject.inputs[0])[-1:, rows], module, x), *expected, checked)


def _undecided_tokens(exact: nn.Module, x: Tensor) -> Tensor | None:
    """(B, N): tokens with a score whose sign hangs on rounding; None if there are none."""
    with torch.no_grad():
        q, k, v = exact.project(exact.sublayer_norm(x))
        undecided = exact.undecided(q, k, v) if q is not None else None
    return undecided.any(1) if undecided is not None and undecided.any() else None


def _drawn(subject: Subject, count: int) -> Tensor:
    """Some of the tokens, at random."""
    drawn = torch.randperm(subject.tokens, generator=torch.Generator().manual_seed(subject.tokens))[:count]
    return drawn.sort().values.to(subject.device)


def _expected(evaluate, inputs: list[Tensor], draws: int) -> tuple[dict[str, Tensor], dict[str, float], Tensor | None]:
    """Truth, the error of plain code, and the undecided tokens; the error is the largest over a few nearby inputs.

    One draw of plain code may be right by luck; among many tokens luck makes no difference.
    """
    expected, errors = None, {}
    generator = torch.Generator().manual_seed(2)
    for draw in range(draws):
        noise = [(torch.rand(t.shape, generator=generator).to(t) - 0.5) / 32 if draw else 0 for t in inputs]
        with sdpa_kernel(SDPBackend.MATH):  # float64 not by the backend under test, which may have none
            truth, plain, undecided = evaluate([t * (1 + n) for t, n in zip(inputs, noise)])
        expected = expected or (truth, errors, undecided)
        for name, true in truth.items():
            error = error_of_eager(*(_decided(name, t, undecided) for t in (plain[name], true)), plain[name].dtype)
            errors[name] = max(errors.get(name, 0.0), error)
    return expected


def _decided(name: str, t: Tensor, undecided: Tensor | None) -> Tensor:
    """The tensor, with 0 where the sign of a score hangs on rounding if it is a gradient that jumps there."""
    return t if undecided is None or name not in ("dq", "dk", "dx") else t.masked_fill(undecided[..., None], 0)


def _part(rows: Tensor, subject: Subject) -> str:
    return "all" if len(rows) == subject.tokens else f"{len(rows)} of {subject.tokens} rows"


def _joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts], 1) for name in parts[0]}


def _call(function, inputs, dout, names, parameters=()) -> dict[str, Tensor]:
    """What a function gives: out and, where there is a ``dout``, the gradients of inputs and parameters that have one."""
    if dout is None:
        with torch.no_grad():
            return {"out": function(*inputs)}
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = function(*leaves)
    grads = torch.autograd.grad(out, [*leaves, *parameters], dout, allow_unused=True)
    return {"out": out.detach(), **{n: g for n, g in zip(names, grads) if g is not None}}


def judge(found: dict, truth: dict, errors: dict, undecided: Tensor | None, checked: str) -> Verdict:
    """Every tensor of the truth by the rule: the one that is worst beside its bound."""
    verdicts = []
    for name, true in truth.items():
        if name not in found or found[name].shape != true.shape:
            return Verdict(False, math.nan, 0.0, name, checked)
        actual, true = (_decided(name, t, undecided) for t in (found[name], true))
        bound = (FORWARD if name == "out" else GRADIENT) * errors[name] + rounding(true, actual.dtype)
        error = (actual.double() - true).abs().max().item()
        largest = true.abs().max().item() or 1.0
        verdicts.append(Verdict(error <= bound, error / largest, bound / largest, name, checked))  # False for NaN
    return max(verdicts, key=Verdict.badness)


def _worst(*verdicts: Verdict) -> Verdict:
    checked = "; ".join(verdict.checked for verdict in verdicts)
    return replace(max(verdicts, key=Verdict.badness), checked=checked)

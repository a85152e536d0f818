"""One call of an operator as data: run it, evaluate its reference in any dtype, compare the two by the rule."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from infsa_kernels import reference
from infsa_kernels.ops.backends import SUFFIXES
from infsa_kernels.testing import FORWARD, GRADIENT, assert_within, error_of_eager

OPS = ("linear", "pure")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
REFERENCE = {"linear": reference.linear, "pure": reference.pure}


def raw_op(name: str, backend: str):
    """A backend's own operator, as raw_op("linear_fwd", "eager")."""
    return getattr(torch.ops.infsa, name + SUFFIXES[backend])


def accumulation(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def plain(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which plain code is the measure: the same, but for float64, in which the reference is the truth."""
    return torch.float32 if dtype == torch.float64 else dtype


@dataclass
class Call:
    """The arguments of `infsa::<op>`; k is None where it is tied to q."""

    op: str
    q: Tensor
    k: Tensor | None
    v: Tensor
    rho: float | Tensor = 0.95
    eps: float = 1e-6
    key_padding_mask: Tensor | None = None
    query_padding_mask: Tensor | None = None
    score_floor: float = 0.0  # of linear

    @property
    def raw_name(self) -> str:
        """Of the raw operators that run it, without _fwd and _bwd."""
        return f"{self.op}_floor" if self.score_floor else self.op

    def tensors(self) -> dict[str, Tensor]:
        """What can have a gradient, by name."""
        named = {"q": self.q, "k": self.k, "v": self.v, "rho": self.rho}
        return {name: t for name, t in named.items() if isinstance(t, Tensor)}

    def qkv(self) -> dict[str, Tensor | None]:
        return {"q": self.q, "k": self.k, "v": self.v}

    def run(self) -> Tensor:
        return getattr(torch.ops.infsa, self.op)(*self._arguments(), **self.by_name())

    def reference(self, dtype: torch.dtype) -> Tensor:
        q, k, v, eps, rho, *masks = self.to(dtype)._arguments()
        return REFERENCE[self.op](q, k, v, rho, eps, *masks, **self.by_name())

    def gradients(self, dout: Tensor) -> dict[str, Tensor]:
        return self._differentiate(dout, type(self).run)[1]

    def reference_gradients(self, dout: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        return self.reference_results(dout, dtype)[1]

    def reference_results(self, dout: Tensor, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
        """The output and the gradients of the reference, all in ``dtype``."""
        return self.to(dtype)._differentiate(dout.to(dtype), lambda call: call.reference(dtype))

    def to(self, dtype: torch.dtype) -> "Call":
        """The same call in another dtype; rho stays in the accumulation dtype where it differs from q."""
        cast = {name: t.to(dtype) for name, t in self.tensors().items()}
        if "rho" in cast and self.rho.dtype != self.q.dtype:
            cast["rho"] = self.rho.to(accumulation(dtype))
        return replace(self, **cast)

    def leaves(self) -> "Call":
        """The same call, strides and all, on leaves that want a gradient."""
        return replace(self, **{name: t.detach().requires_grad_() for name, t in self.tensors().items()})

    def raw(self) -> tuple:
        """The arguments of the raw ops from q on, up to output_mask."""
        rho, head_rho = self.rho, None
        if isinstance(rho, Tensor):
            head_rho, rho = rho.detach().to(accumulation(self.q.dtype)).expand(self.q.shape[:2]), 1.0
        masks = self.key_padding_mask, self.query_padding_mask
        return self.q, self.k, self.v, self.eps, *self.by_name().values(), rho, head_rho, *masks

    def nearby(self) -> "Call":
        """The same call on values that differ by up to 1/64 of themselves, equal tokens staying equal."""

        def scaled(t):
            return t * (1 + (torch.rand(t.shape[-1:], device=t.device) - 0.5) / 32).to(t.dtype)

        return replace(self, **{name: scaled(t) for name, t in self.tensors().items()})

    def _arguments(self):
        k = self.q if self.k is None else self.k
        return self.q, k, self.v, self.eps, self.rho, self.key_padding_mask, self.query_padding_mask

    def by_name(self) -> dict[str, float]:
        return {"score_floor": self.score_floor} if self.score_floor else {}

    def _differentiate(self, dout, evaluate) -> tuple[Tensor, dict[str, Tensor]]:
        call = self.leaves()
        tensors = call.tensors()
        out = evaluate(call)
        return out.detach(), dict(zip(tensors, torch.autograd.grad(out, tensors.values(), dout)))


@dataclass
class Expected:
    truth: Tensor
    eager_error: float


def expected(call: Call, dout: Tensor | None = None, draws: int = 8) -> dict[str, Expected]:
    """What a call must give: "out" and, for a dout, the gradients by name.

    The error of plain code is the largest over a few nearby inputs: on one input of few elements it is often 0 by luck.
    """
    results: dict[str, Expected] = {}
    for draw in range(draws):
        near = call.nearby() if draw else call
        truths, lows = (_evaluate(near, dout, dtype) for dtype in (torch.float64, plain(call.q.dtype)))
        if any(bool((truths[n].isfinite() & ~lows[n].isfinite()).any()) for n in truths):
            lows = _evaluate(near, dout, torch.float32)
        for name, truth in truths.items():
            dtype = call.q.dtype if name == "out" else call.tensors()[name].dtype
            error = error_of_eager(lows[name], truth, dtype)
            known = results.setdefault(name, Expected(truth, error))
            known.eager_error = max(known.eager_error, error)
    return results


def _evaluate(call: Call, dout: Tensor | None, dtype: torch.dtype) -> dict[str, Tensor]:
    if dout is None:
        return {"out": call.reference(dtype)}
    out, gradients = call.reference_results(dout, dtype)
    return {"out": out, **gradients}


def check(call: Call, dout: Tensor | None = None, wanted: dict[str, Expected] | None = None, draws: int = 8) -> None:
    """Runs a call, and its gradients for a dout, on the backend in force and holds the results to the rule."""
    wanted = wanted or expected(call, dout, draws)
    actual = {"out": call.run(), **({} if dout is None else call.gradients(dout))}
    for name, result in actual.items():
        assert result.dtype == (call.q.dtype if name == "out" else call.tensors()[name].dtype)
        factor, what = (FORWARD, "out") if name == "out" else (GRADIENT, f"d{name}")
        assert_within(result, wanted[name].truth, wanted[name].eager_error, factor, what)


def output_gradient(call: Call) -> Tensor:
    """A random dout for a call."""
    *heads, N, _ = call.q.shape
    rows = [N] if call.op == "pure" else []
    return torch.randn(*heads, *rows, call.v.shape[-1], dtype=call.q.dtype, device=call.q.device)


def call_of_one_key(heads: int, device="cpu") -> Call:
    """Linear with one query and one key all but orthogonal to it: a score of few right digits that has all the weight."""
    q, k, v = (torch.randn(1, heads, 1, 33, device=device) for _ in range(3))
    k = k - (1 - 1e-3) * (k * q).sum(-1, keepdim=True) / q.square().sum(-1, keepdim=True) * q
    return Call("linear", 100 * q, k * (k * q).sum(-1, keepdim=True).sign(), v, rho=1.0, eps=1e-12)

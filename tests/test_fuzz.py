"""Random calls of every kind against the float64 reference, on every backend; the same calls in every run."""

import math
from dataclasses import dataclass, field
from random import Random

import pytest
import torch
from calls import DTYPES, OPS, Call, check, expected, output_gradient
from conftest import backends_of
from sweep import some

import infsa_kernels

# Of each operator; every one runs forward and backward on every backend.
CASES = some([200, 600], 200)


def size(draw: Random) -> int:
    return draw.choice([1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, draw.randint(1, 70)])


def head_dim(draw: Random) -> int:
    return draw.choice([1, 2, 3, 4, 8, 15, 16, 17, 20, 32, 33, 64, 65, draw.randint(1, 96)])


@dataclass
class Layout:
    """How a tensor lies in memory: the order of its dimensions, the step along each, where it begins, what is expanded."""

    order: list[int]
    steps: list[int]
    offset: int
    expanded: set[int] = field(default_factory=set)

    def __call__(self, t):
        ones = t[tuple(slice(0, 1) if i in self.expanded else slice(None) for i in range(t.dim()))]
        permuted = ones.permute(self.order)
        spread = [n * step for n, step in zip(permuted.shape, self.steps)]
        storage = t.new_full((self.offset + math.prod(spread),), True if t.dtype == torch.bool else torch.nan)
        view = storage[self.offset :].view(spread)[tuple(slice(step - 1, None, step) for step in self.steps)]
        view.copy_(permuted)
        inverse = sorted(range(t.dim()), key=self.order.__getitem__)
        return view.permute(inverse).expand(t.shape)


def layout(draw: Random, dim: int) -> Layout:
    if draw.random() < 0.5:
        return Layout(list(range(dim)), [1] * dim, 0)
    order = draw.sample(range(dim), dim)
    steps = draw.choices([1, 1, 2, 3], k=dim)
    expanded = {draw.randrange(dim)} if draw.random() < 0.15 else set()
    return Layout(order, steps, draw.randint(0, 3), expanded)


# Scales that keep results and gradients inside the range of the dtype.
SCALES = {
    torch.float16: [0.25, 30],
    torch.bfloat16: [1e-3, 1e3],
    torch.float32: [1e-3, 1e3],
    torch.float64: [1e-6, 1e6],
}


LARGE = 100  # how far one token may stand out


def values(kind, shape, generator):
    t = torch.randn(shape, generator=generator, dtype=torch.float64)
    if kind == "zeros":
        return torch.zeros_like(t)
    if kind == "zero_rows":
        return t * (torch.rand(*shape[:-1], 1, generator=generator) < 0.5)
    if kind == "constant":
        return torch.full_like(t, 0.75)
    if kind == "duplicates":
        return t[..., torch.randint(0, min(3, shape[-2]), (shape[-2],), generator=generator), :]
    if kind == "one_large":
        t[..., -1, :] *= LARGE
    return t


KINDS = ["normal"] * 6 + ["zeros", "zero_rows", "constant", "duplicates", "one_large"]


def random_call(draw: Random, op: str, device: str) -> tuple[Call, torch.Tensor]:
    """A call and a gradient of its output."""
    dtype = draw.choice(DTYPES)
    tie = draw.choice(["untied", "untied", "tied", "same_memory"])
    heads = [draw.randint(1, 3), draw.randint(1, 3)] if draw.random() < 0.8 else [draw.randint(1, 5)]
    N, d, dv = size(draw), head_dim(draw), head_dim(draw)
    M = size(draw) if tie == "untied" else N
    dim = len(heads) + 2
    generator = torch.Generator().manual_seed(draw.getrandbits(32))
    kinds = draw.choices(KINDS, k=3)
    scales = draw.choices([1.0, 1.0, *SCALES[dtype]], k=2)

    def tensor(kind, scale, *shape):
        return layout(draw, dim)((values(kind, (*heads, *shape), generator) * scale).to(device, dtype))

    def mask(length):
        kind = draw.choice(["no", "no", "random", "none_ignored", "all_ignored", "padding"])
        chance = {"random": 0.3, "none_ignored": 0.0, "all_ignored": 1.0}.get(kind)
        if kind == "no":
            return None
        if kind == "padding":
            m = torch.arange(length) >= torch.randint(0, length + 1, (heads[0], 1), generator=generator)
        else:
            m = torch.rand(heads[0], length, generator=generator) < chance
        return layout(draw, 2)(m.to(device))

    q = tensor(kinds[0], scales[0], N, d)
    k = {"untied": lambda: tensor(kinds[1], scales[1], M, d), "tied": lambda: None, "same_memory": lambda: q[:]}[tie]()
    v = tensor(kinds[2], 1.0, M, dv)
    rho_shape = draw.choice([None, (), (1,), (heads[-1],)])
    accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    rho = draw.choice([0.95, 1, -2.0, 0.0])
    if rho_shape is not None:
        rho = torch.randn(rho_shape, generator=generator).to(device, draw.choice([dtype, accumulation]))

    # Where few or equal tokens share all the weight and eps is small, the gradient is a difference of two equal terms and
    # nothing can be said about its digits: there eps is of the size of the scores.
    largest = [scale * (LARGE if kind == "one_large" else 1) for scale, kind in zip(scales, kinds)]
    score = largest[0] * largest[tie == "untied"]
    few_tokens = min(N, M) < 8 or not {"normal", "zeros"} >= set(kinds)
    eps = score * (1.0 if few_tokens else draw.choice([1e-6, 1e-2, 1.0]))
    call = Call(op, q, k, v, rho, max(eps, 1e-6), mask(M), mask(N))
    if call.key_padding_mask is not None or call.query_padding_mask is not None:
        call.eps = max(call.eps, score)
    dout = output_gradient(call)
    return call, layout(draw, dout.dim())(torch.randn(dout.shape, generator=generator).to(device, dtype))


def near_the_kink(call: Call) -> bool:
    """Whether a score is so close to 0 that float32 may take it for positive or not; the gradient jumps there."""
    if call.q.dtype != torch.float32:
        return False
    q, k = call.q.double(), (call.q if call.k is None else call.k).double()
    if call.op == "linear":
        q = (q.norm(dim=-1, keepdim=True) * q).sum(-2, keepdim=True)
    products = q.norm(dim=-1, keepdim=True) * k.norm(dim=-1, keepdim=True).mT
    return bool(((q @ k.mT).abs() < 1e-6 * products).logical_and(products > 0).any())


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("cases", CASES)
def test_random_calls(op, cases, device):
    draw = Random(op)
    for case in range(cases):
        call, dout = random_call(draw, op, device)
        if near_the_kink(call):
            continue
        torch.manual_seed(case)
        wanted = expected(call, dout, draws=16)
        for backend in backends_of(device):
            with infsa_kernels.backend(backend):
                try:
                    check(call, dout, wanted)
                except AssertionError as error:
                    raise AssertionError(f"call {case}, backend {backend!r}: {error}") from error

"""Random calls of every kind against the float64 reference, on every backend. The same calls in every run."""

import math
from dataclasses import dataclass, field

import pytest
import torch
from calls import DTYPES, OPS, Call, check, expected, output_gradient
from conftest import backends_of
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import infsa_kernels

CASES = 600  # of each operator; every one runs forward and backward on every backend

sizes = st.sampled_from([1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65]) | st.integers(1, 70)
head_dims = st.sampled_from([1, 2, 3, 4, 8, 15, 16, 17, 20, 32, 33, 64, 65]) | st.integers(1, 96)
few = st.integers(1, 3)


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


@st.composite
def layouts(draw, dim):
    if draw(st.booleans()):
        return Layout(list(range(dim)), [1] * dim, 0)
    order = draw(st.permutations(range(dim)))
    steps = draw(st.lists(st.sampled_from([1, 1, 2, 3]), min_size=dim, max_size=dim))
    expanded = draw(st.sets(st.integers(0, dim - 1), max_size=1)) if draw(st.integers(0, 3)) == 0 else set()
    return Layout(order, steps, draw(st.integers(0, 3)), expanded)


# Scales that keep results and gradients inside the range of the dtype.
SCALES = {
    torch.float16: [0.25, 30],
    torch.bfloat16: [1e-3, 1e3],
    torch.float32: [1e-3, 1e3],
    torch.float64: [1e-6, 1e6],
}


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
        t[..., -1, :] *= 100
    return t


KINDS = st.sampled_from(["normal"] * 6 + ["zeros", "zero_rows", "constant", "duplicates", "one_large"])


@st.composite
def calls(draw, op, device):
    dtype = draw(st.sampled_from(DTYPES))
    tie = draw(st.sampled_from(["untied", "untied", "tied", "same_memory"]))
    heads = [draw(few), draw(few)] if draw(st.integers(0, 4)) else [draw(st.integers(1, 5))]
    N, d, dv = draw(sizes), draw(head_dims), draw(head_dims)
    M = draw(sizes) if tie == "untied" else N
    dim = len(heads) + 2
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    kinds = [draw(KINDS) for _ in range(3)]
    scales = [draw(st.sampled_from([1.0, 1.0, *SCALES[dtype]])) for _ in range(2)]

    def tensor(kind, scale, *shape):
        return draw(layouts(dim))((values(kind, (*heads, *shape), generator) * scale).to(device, dtype))

    def mask(length):
        kind = draw(st.sampled_from(["no", "no", "random", "none_ignored", "all_ignored", "padding"]))
        chance = {"random": 0.3, "none_ignored": 0.0, "all_ignored": 1.0}.get(kind)
        if kind == "no":
            return None
        if kind == "padding":
            m = torch.arange(length) >= torch.randint(0, length + 1, (heads[0], 1), generator=generator)
        else:
            m = torch.rand(heads[0], length, generator=generator) < chance
        return draw(layouts(2))(m.to(device))

    q = tensor(kinds[0], scales[0], N, d)
    k = {"untied": lambda: tensor(kinds[1], scales[1], M, d), "tied": lambda: None, "same_memory": lambda: q[:]}[tie]()
    v = tensor(kinds[2], 1.0, M, dv)
    rho_shape = draw(st.sampled_from([None, (), (1,), (heads[-1],)]))
    accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    rho = draw(st.sampled_from([0.95, 1, -2.0, 0.0]))
    if rho_shape is not None:
        rho = torch.randn(rho_shape, generator=generator).to(device, draw(st.sampled_from([dtype, accumulation])))

    # Where few or equal tokens share all the weight and eps is small, the gradient is a difference of two equal terms and
    # nothing can be said about its digits: there eps is of the size of the scores.
    score = scales[0] * (scales[1] if tie == "untied" else scales[0])
    few_tokens = min(N, M) < 8 or not {"normal", "zeros"} >= set(kinds)
    eps = score * (1.0 if few_tokens else draw(st.sampled_from([1e-6, 1e-2, 1.0])))
    call = Call(op, q, k, v, rho, max(eps, 1e-6), mask(M), mask(N))
    if call.key_padding_mask is not None or call.query_padding_mask is not None:
        call.eps = max(call.eps, score)
    dout = output_gradient(call)
    return call, draw(layouts(dout.dim()))(torch.randn(dout.shape, generator=generator).to(device, dtype))


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
def test_random_calls(op, device):
    counted = 0

    @settings(
        max_examples=CASES, derandomize=True, deadline=None, database=None, print_blob=False,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(calls(op, device))
    def run(case):
        nonlocal counted
        call, dout = case
        assume(not near_the_kink(call))
        counted += 1
        torch.manual_seed(counted)
        wanted = expected(call, dout, draws=16)
        for backend in backends_of(device):
            with infsa_kernels.backend(backend):
                check(call, dout, wanted)

    run()
    assert counted >= CASES

"""Random calls: sizes, strides, values, masks, dtypes, forms of a call. The tests run fixed ones, `make fuzz` new ones.

`python tests/fuzz.py --minutes 20 --seed 7` holds what it draws to the rule of infsa_kernels/testing.py, prints for
every failure the command that repeats that one call, and ends with a count and exit code 1 if anything failed.
"""

import argparse
import math
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from random import Random

import torch
from helpers import pooled_linear_calls
from helpers.backends import backends_of
from helpers.calls import DTYPES, OPS, Call, Expected, accumulation, expected, output_gradient, raw_op
from torch.utils.checkpoint import checkpoint

import infsa_kernels
from infsa_kernels.testing import FORWARD, GRADIENT, assert_within


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
    rho = draw.choice([0.95, 1, -2.0, 0.0])
    if rho_shape is not None:
        rho = torch.randn(rho_shape, generator=generator).to(device, draw.choice([dtype, accumulation(dtype)]))

    # Where few or equal tokens share all the weight and eps is small, the gradient is a difference of two equal terms and
    # nothing can be said about its digits: there eps is of the size of the scores.
    largest = [scale * (LARGE if kind == "one_large" else 1) for scale, kind in zip(scales, kinds)]
    score = largest[0] * largest[tie == "untied"]
    few_tokens = min(N, M) < 8 or not {"normal", "zeros"} >= set(kinds)
    eps = score * (1.0 if few_tokens else draw.choice([1e-6, 1e-2, 1.0]))
    call = Call(op, q, k, v, rho, max(eps, 1e-6), mask(M), mask(N))
    if call.key_padding_mask is not None or call.query_padding_mask is not None:
        call.eps = max(call.eps, score)
    if op == "linear" and draw.random() < 0.4:
        call.score_floor = draw.choice([1e-3, 0.1, 2.0])
    dout = output_gradient(call)
    return call, layout(draw, dout.dim())(torch.randn(dout.shape, generator=generator).to(device, dtype))


def near_the_kink(call: Call) -> bool:
    """Whether a score is so close to 0 that float32 may take it for positive or not; the gradient jumps there.

    Half precision adds up in float32 too, and few of its digits cancel exactly: a score of 0 in truth, and of 1e-8 here.
    """
    if call.q.dtype == torch.float64:
        return False
    q, k = call.q.double(), (call.q if call.k is None else call.k).double()
    if call.op == "linear":
        q = (q.norm(dim=-1, keepdim=True) * q).sum(-2, keepdim=True)
    products = q.norm(dim=-1, keepdim=True) * k.norm(dim=-1, keepdim=True).mT
    return bool(((q @ k.mT).abs() < 1e-6 * products).logical_and(products > 0).any())


# How far the command moves inputs from order one, in powers of two. The measure for float64 is plain code in float32.
REACH = {torch.float32: 60, torch.bfloat16: 60, torch.float16: 6, torch.float64: 20}


def other_scales(draw: Random, call: Call, dout):
    """The same call at other scales, eps in proportion."""
    reach = REACH[call.q.dtype]
    powers = {name: draw.randint(-reach, reach) for name in ("q", "k", "v", "dout")}
    same = call.k is None or call.k.data_ptr() == call.q.data_ptr()
    if draw.random() < 0.5:  # scores of order one, by large and small rows or by rows of order one
        powers["k"] = -powers["q"]
        powers["q"] *= not same
    powers["k"] = powers["q"] if same else powers["k"]
    scaled = {name: t * 2.0 ** powers[name] for name, t in call.qkv().items() if t is not None}
    eps = call.eps * 2.0 ** (powers["q"] + powers["k"])
    return replace(call, **scaled, eps=min(max(eps, 1e-37), 1e37)), dout * 2.0 ** powers["dout"]


def subnormals(draw: Random, call: Call, dout):
    """The same call with elements of q, k and v below the smallest normal number of the dtype."""
    generator = torch.Generator().manual_seed(draw.getrandbits(32))
    tiny = torch.finfo(call.q.dtype).smallest_normal

    def some(t):
        return torch.where(torch.rand(t.shape, generator=generator) < 0.3, t.clamp(-1, 1) * tiny, t)

    return replace(call, **{name: some(t) for name, t in call.qkv().items() if t is not None}), dout


def special_value(draw: Random, call: Call, dout):
    """The same call with one NaN or infinity in q, k or v."""
    name = draw.choice([name for name, t in call.qkv().items() if t is not None])
    t = call.qkv()[name].clone(memory_format=torch.contiguous_format)
    t.view(-1)[draw.randrange(t.numel())] = draw.choice([math.nan, math.inf, -math.inf])
    return replace(call, **{name: t}), dout


def results(call: Call, run: Callable, dout) -> dict[str, torch.Tensor]:
    """The output, and its gradients, of what `run` makes of a call."""
    call = call.leaves()
    tensors = call.tensors()
    out = run(call)
    return {"out": out.detach(), **dict(zip(tensors, torch.autograd.grad(out, tensors.values(), dout)))}


def of_tensors(call: Call) -> Callable:
    """A call as a function of what can have a gradient."""
    names = list(call.tensors())
    return lambda *tensors: replace(call, **dict(zip(names, tensors))).run()


def plain_form(draw, call, dout, backend):
    return results(call, Call.run, dout)


def compiled_form(draw, call, dout, backend):
    torch._dynamo.reset()
    function = torch.compile(of_tensors(call), backend="aot_eager", fullgraph=True, dynamic=True)
    return results(call, lambda c: function(*c.tensors().values()), dout)


def checkpointed_form(draw, call, dout, backend):
    return results(call, lambda c: checkpoint(of_tensors(c), *c.tensors().values(), use_reentrant=False), dout)


def vmapped_form(draw, call, dout, backend):
    """One of a batch of three calls, the other two near it."""
    at, others = draw.randrange(3), [call.nearby() for _ in range(2)]
    dims = {name: draw.randint(0, t.dim()) for name, t in call.tensors().items()}

    def run(leaf):
        batch = [c.tensors() for c in (*others[:at], leaf, *others[at:])]
        stacked = (torch.stack([tensors[name] for tensors in batch], dim) for name, dim in dims.items())
        return torch.vmap(of_tensors(call), tuple(dims.values()))(*stacked)[at]

    return results(call, run, dout)


def raw_form(draw, call, dout, backend):
    """The raw operators, whose tensors have four dimensions."""
    heads = call.q.shape[:-2]
    if len(heads) == 1:
        qkv = {name: t[None] for name, t in call.qkv().items() if t is not None}
        # Masks of three-dimensional input are one per head: a batch of heads, each with one.
        qkv = {name: t.transpose(0, 1) for name, t in qkv.items()}
        rho = call.rho.expand(heads)[:, None] if isinstance(call.rho, torch.Tensor) else call.rho
        four = replace(call, **qkv, rho=rho)
        dout = dout[None].transpose(0, 1)
    else:
        four = call
    q, k, v, *rest = four.raw()
    outputs = raw_op(f"{call.raw_name}_fwd", backend)(q, k, v, *rest)
    saved = outputs[1:] if call.op == "linear" else outputs
    dq, dk, dv, drho = raw_op(f"{call.raw_name}_bwd", backend)(dout, q, k, v, *saved, *rest, [True] * 4)
    found = {"out": outputs[0], "q": dq, "k": dk, "v": dv}
    found = {name: t.reshape(*heads, *t.shape[2:]) for name, t in found.items() if t.numel() or name != "k"}
    if isinstance(call.rho, torch.Tensor):
        found["rho"] = drho.reshape(heads).sum_to_size(call.rho.shape).to(call.rho.dtype)
    return {name: t for name, t in found.items() if name == "out" or name in call.tensors()}


def packed_form(draw, call, dout, backend):
    """The tokens that no mask ignores, one sequence behind another."""
    masks = call.query_padding_mask, call.key_padding_mask
    # Tied are those of which both masks leave the same.
    tied = call.k is None and (masks[0] is masks[1] or (None not in masks and torch.equal(*masks)))
    absent = torch.zeros(call.q.shape[0], call.q.shape[-2], dtype=torch.bool)
    query_mask, key_mask = (
        absent[:, :1].expand(-1, t.shape[-2]) if mask is None else mask for mask, t in zip(masks, (call.q, call.v))
    )
    offsets = [torch.nn.functional.pad((~mask).sum(1).cumsum(0), (1, 0)).int() for mask in (query_mask, key_mask)]

    def run(leaf):
        k = leaf.q if leaf.k is None else leaf.k
        q, k, v = (t.transpose(1, 2)[~mask] for t, mask in ((leaf.q, query_mask), (k, key_mask), (leaf.v, key_mask)))
        k, cu_k = (q, offsets[0]) if tied else (k, offsets[1])
        longest = query_mask.shape[1], key_mask.shape[1]
        floor = leaf.by_name()
        return torch.ops.infsa.linear_varlen(q, k, v, offsets[0], cu_k, *longest, leaf.eps, leaf.rho, **floor)

    return results(call, run, dout)


FORMS = {
    f.__name__.removesuffix("_form"): f for f in (plain_form, compiled_form, checkpointed_form, vmapped_form, raw_form)
}


def by_hand(call: Call) -> Call:
    """What a float32 call is under autocast to bfloat16."""
    return replace(call, **{name: t.bfloat16() for name, t in call.qkv().items() if t is not None})


def autocast_form(draw, call, dout, backend):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = results(call, Call.run, dout.bfloat16())
    return {name: t if name in ("out", "rho") else t.bfloat16() for name, t in found.items()}


def demanded(call: Call, dout, truth: dict[str, torch.Tensor]) -> set[str]:
    """Which results plain code in float32 gets right, of those inside the range of normal numbers of the dtype."""
    out, gradients = call.reference_results(dout, torch.float64 if call.q.dtype == torch.float64 else torch.float32)
    names = set()
    for name, plain in {"out": out, **gradients}.items():
        range_of = torch.finfo(call.q.dtype if name == "out" else call.tensors()[name].dtype)
        largest = truth[name].abs().max().item() if truth[name].numel() else 0.0
        inside = largest == 0 or 2**12 * range_of.smallest_normal < largest < range_of.max / 4
        if inside and (plain.double() - truth[name]).abs().max() <= 1e-3 * largest:
            names.add(name)
    return names - {"q"} if call.op == "linear" and has_vanishing_rows(call.q) else names


def has_vanishing_rows(q: torch.Tensor) -> bool:
    """Whether the square of a norm leaves the accumulation type, so that the row counts as one of zeros (docs/linear.md)."""
    scale = 2.0**600  # else the norm of subnormal numbers is 0 here, too
    norms, least = (q.double() * scale).norm(dim=-1), 2.0**-511 if q.dtype == torch.float64 else 2.0**-63
    return bool(((norms > 0) & (norms < least * scale)).any())


def hold(found: dict[str, torch.Tensor], measure: Callable[[int], dict[str, Expected]]) -> None:
    """The rule, by what measure(draws) finds. Few draws of equal values know too small an error, so a miss is held to many."""
    try:
        hold_to(found, measure(16))
    except AssertionError:
        hold_to(found, measure(256))


def hold_to(found: dict[str, torch.Tensor], wanted: dict[str, Expected]) -> None:
    for name, result in found.items():
        if name in wanted:
            factor = FORWARD if name == "out" else GRADIENT
            assert_within(result, wanted[name].truth, wanted[name].eager_error, factor, name)


def hold_special(found: dict[str, torch.Tensor], call: Call, dout) -> None:
    """NaN and infinity come out where they come out of plain code, and no NaN turns into a number in a gradient."""
    out, gradients = call.reference_results(dout, torch.float64)
    for kind in (torch.isnan, torch.isinf):
        wanted, is_so = kind(out.to(found["out"].dtype)), kind(found["out"])
        assert torch.equal(is_so, wanted), (
            f"out: {kind.__name__} at {int(is_so.sum())} places, expected {int(wanted.sum())}"
        )
    if any(t.isinf().any() for t in call.qkv().values() if t is not None):
        return  # where infinity meets 0 in a gradient depends on the order of its products
    for name, truth in gradients.items():
        lost = truth.isnan() & found[name].isfinite()
        assert not lost.any(), f"{name}: a number at {int(lost.sum())} places of NaN"


def operator_case(draw: Random, op: str) -> tuple[str, Callable]:
    """A name, and what raises AssertionError if a call is wrong."""
    call, dout = random_call(draw, op, "cpu")
    change = draw.choice([None, None, other_scales, other_scales, subnormals, special_value])
    if change:
        call, dout = change(draw, call, dout)
    forms = [*FORMS, "plain", "plain", "raw", "vmapped", "checkpointed"] + ["autocast"] * (
        call.q.dtype == torch.float32 and change in (None, special_value)
    )
    if op == "linear" and call.q.dim() == 4:
        forms += ["packed"] * 2
    form = draw.choice(forms)
    backend = draw.choice(backends_of("cpu", f"{op}_varlen" if form == "packed" else op))

    def run():
        base, low_dout = (by_hand(call), dout.bfloat16()) if form == "autocast" else (call, dout)
        if change is not special_value and near_the_kink(base):
            return
        with infsa_kernels.backend(backend):
            make = FORMS | {"autocast": autocast_form, "packed": packed_form}
            found = make[form](draw, call, dout, backend)
        if change is special_value:
            return hold_special(found, base, low_dout)

        def measure(draws):
            wanted = expected(base, low_dout, draws=draws)
            if change not in (other_scales, subnormals):
                return wanted
            names = demanded(base, low_dout, {name: e.truth for name, e in wanted.items()})
            return {name: e for name, e in wanted.items() if name in names}

        hold(found, measure)

    return f"{op} {form} {backend} {change.__name__ if change else 'plain values'} {str(call.q.dtype)[6:]}", run


def layer_case(draw: Random) -> tuple[str, Callable]:
    dtype = draw.choice(DTYPES)
    shape = draw.randint(1, 3), draw.choice([2, 3, 8, 16, 33, draw.randint(9, 70)]), draw.randint(2, 48)
    heads, head, v_head = draw.randint(1, 4), draw.randint(1, 20), draw.randint(1, 20)
    call = pooled_linear_calls.layer(
        dtype, tied=draw.random() < 0.5, bias=draw.random() < 0.5, norm=draw.choice(["affine", "plain", None]),
        rho=draw.choice(["scalar", "one", "heads", None]), masked=draw.random() < 0.3, shape=shape, heads=heads, head=head,
        v_head=v_head, out=draw.randint(1, 20),
    )  # fmt: skip
    # As above: the gradient of a head with few positive scores is a difference of two equal terms, unless eps is of their size.
    call["eps"] = draw.choice([1.0, 10.0])
    call["score_floor"] = draw.choice([0.0, 0.0, 1e-2, 0.3])
    call["x"] = layout(draw, 3)(call["x"].detach()).requires_grad_()
    dout = pooled_linear_calls.output_gradient(call)
    form = draw.choice(["plain", "compiled", "checkpointed"])
    backend = draw.choice(backends_of("cpu", "pooled_linear"))

    def function(**kwargs):
        if form == "compiled":
            torch._dynamo.reset()
            return torch.compile(infsa_kernels.pooled_linear_infsa, backend="aot_eager", fullgraph=True)(**kwargs)
        if form == "checkpointed":
            return checkpoint(infsa_kernels.pooled_linear_infsa, use_reentrant=False, **kwargs)
        return infsa_kernels.pooled_linear_infsa(**kwargs)

    def run():
        with infsa_kernels.backend(backend):
            found = pooled_linear_calls.results(function, call, dout)
        hold(found, lambda draws: pooled_linear_calls.expected(call, dout, draws=draws))

    return f"pooled_linear {form} {backend} {str(dtype)[6:]}", run


def one(seed: str, index: int) -> tuple[str, str | None]:
    """Draws a call and makes it: its name, and what was wrong."""
    draw = Random(f"{seed}/{index}")
    torch.manual_seed(draw.getrandbits(32))
    op = draw.choice([*OPS, *OPS, "pooled_linear"])
    name, run = layer_case(draw) if op == "pooled_linear" else operator_case(draw, op)
    try:
        run()
    except Exception as error:  # any error is a finding
        return name, f"{type(error).__name__}: {error}".splitlines()[0]
    return name, None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=1)
    parser.add_argument("--seed", default="0")
    parser.add_argument("--only", type=int, help="make this one call of the seed's")
    args = parser.parse_args()
    calls, failures, end = Counter(), Counter(), time.monotonic() + 60 * args.minutes
    index = first = args.only or 0
    while index == first or (args.only is None and time.monotonic() < end):
        name, error = one(args.seed, index)
        kind = " ".join(name.split()[:2])
        calls[kind] += 1
        if error:
            failures[kind] += 1
            print(f"python tests/fuzz.py --seed {args.seed} --only {index}  # {name}: {error}", flush=True)
        index += 1
    for kind in sorted(calls):
        print(f"{kind:28}{calls[kind]:8} calls{failures[kind]:6} failures")
    print(f"{calls.total()} calls, {failures.total()} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

"""Precision, range, NaN and Inf, determinism and memory."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from helpers.backends import backends_of, multiplies_bfloat16
from helpers.calls import DTYPES, OPS, REFERENCE, Call, call_of_one_key, check, expected, output_gradient, raw_op
from helpers.layouts import LAYOUTS
from helpers.sweep import swept

import infsa_kernels
from infsa_kernels.testing import FORWARD, GRADIENT, assert_within

both = pytest.mark.parametrize("op", OPS)


def make(op, device, *, B=1, H=2, N=50, M=None, d=16, dtype=torch.float32, tied=False, **options) -> Call:
    def randn(*shape):
        return torch.randn(shape, dtype=dtype, device=device)

    M = M or N
    return Call(op, randn(B, H, N, d), None if tied else randn(B, H, M, d), randn(B, H, M, d), **options)


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("N", [1, 19, 300])
def test_half_precision_rounds_once(op, dtype, N, device, backend):
    """Everything between the inputs and the output is float32: the output is the truth, rounded. But for P where a CPU
    multiplies bfloat16 by itself."""
    for layout in ("contiguous", "token_major", "every_other_channel"):
        call = make(op, device, B=2, N=N, M=N + 30, d=24, dtype=dtype)
        call = Call(op, **{name: LAYOUTS[layout](t) for name, t in call.qkv().items()})
        truth = call.reference(torch.float64)
        # Half a unit of the last place of each element, and float32 noise of the largest.
        ulp = torch.finfo(dtype).eps * 2.0 ** truth.abs().clamp_min(torch.finfo(dtype).smallest_normal).log2().floor()
        allowed = 0.5 * ulp + 3e-6 * truth.abs().max()
        if op == "pure" and dtype == torch.bfloat16 and N > 32 and backend == "cpu" and multiplies_bfloat16():
            of_sizes = Call(op, **call.qkv() | {"v": call.v.abs()}).reference(torch.float64)
            allowed += torch.finfo(dtype).eps / 2 * of_sizes
        assert ((call.run().double() - truth).abs() <= allowed).all()


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_two_halves_of_a_tied_gradient_round_once(op, dtype, device, backend):
    """With masks that differ, what a token gets as a query and what it gets as a key may be made apart."""
    call = make(op, device, H=4, N=20, d=24, dtype=dtype, tied=True, eps=1.0)
    call.key_padding_mask = torch.arange(20, device=device)[None] % 3 == 0
    dout = output_gradient(call)
    truth = call.reference_gradients(dout, torch.float64)["q"]
    ulp = torch.finfo(dtype).eps * 2.0 ** truth.abs().clamp_min(torch.finfo(dtype).smallest_normal).log2().floor()
    error = (call.gradients(dout)["q"].double() - truth).abs()
    assert (error <= 0.5 * ulp + 1e-5 * truth.abs().max()).all()


@pytest.mark.parametrize("layout", ["contiguous", "token_major"])
@pytest.mark.one_in(2)
def test_linear_float16_of_long_sequences(layout, device, backend):
    """The energy sum leaves the range of float16 (65504) long before the sequence ends."""
    call = make("linear", device, N=100_000, d=64, dtype=torch.float16)
    call.q *= 3
    call.v += 1
    call = Call("linear", **{name: LAYOUTS[layout](t) for name, t in call.qkv().items()})
    out, _, _, energy_sum, _ = raw_op("linear_fwd", backend)(*call.raw())
    assert (energy_sum > 65504).all()
    assert out.isfinite().all()
    assert (out != 0).all()
    torch.testing.assert_close(out.double(), call.reference(torch.float64), rtol=1e-3, atol=1e-3)


@both
def test_float16_of_large_scores(op, device, backend):
    """Scores of 10^6 and their squares leave the range of float16; the results do not."""
    call = make(op, device, N=120, d=64, dtype=torch.float16)
    call.q *= 300
    call.k *= 300
    truth = call.reference(torch.float64)
    out = call.run()
    assert out.isfinite().all()
    assert (out.double() - truth).abs().max() < 1e-3 * truth.abs().max()
    gradients = call.gradients(output_gradient(call))
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@both
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e3, 1e6])
def test_scales(op, scale, device, backend):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        call = make(op, device, N=40, dtype=dtype, eps=scale**2)
        call.q *= scale
        call.k *= scale
        check(call, output_gradient(call))


# Of q and of k: both large, both small, and one by the other with scores of order one.
FAR = [(1e9, 1e9), (1e15, 1e2), (1e18, 1.0), (1e18, 1e-18), (1e-18, 1e18), (1e-9, 1e-9), (1e-15, 1e-3)]


@both
@pytest.mark.parametrize("far", [*FAR, (1e9, None), (1e18, None), (1e-9, None)], ids=str)
@pytest.mark.parametrize("compiled", [name for name in backends_of("cpu") if name != "triton"])
@pytest.mark.one_in(4)
def test_range(op, far, compiled):
    """What plain code keeps inside float32 the operators do too, though they multiply before they divide."""
    tied = far[1] is None
    for dtype in (torch.float32, torch.bfloat16):
        eps = max(far[0] * (far[0] if tied else far[1]), 1e-37)
        call = make(op, "cpu", N=50, M=None if tied else 60, dtype=dtype, tied=tied, eps=eps)
        call.q *= far[0]
        if not tied:
            call.k *= far[1]
        for size in (1.0, 1e-10, 1e10):
            call.v, dout = torch.randn_like(call.v) * size, output_gradient(call)
            with infsa_kernels.backend(compiled):
                check(call, dout)


@pytest.mark.parametrize("compiled", [name for name in backends_of("cpu") if name != "triton"])
def test_a_gradient_that_vanishes_on_the_way(compiled):
    """dq is of order 1e-31, and float32 holds it; the gradient of the energies' sum, a factor of it, is of order 1e-45."""
    call = make("linear", "cpu", N=31, M=31, d=4, eps=1e26)
    call.q *= 1e13
    call.k *= 1e13
    with infsa_kernels.backend(compiled):
        check(call, output_gradient(call) * 1e-10)


@pytest.mark.parametrize("score_floor", [0.0, 0.1])
@pytest.mark.parametrize("compiled", [name for name in backends_of("cpu") if name != "triton"])
@pytest.mark.parametrize("sizes", [(1e-6, 1e-6, 1e-30, 1e-12), (1e13, 1e-1, 1e-25, 1e-10)], ids=str)
def test_products_of_values_and_gradients_that_vanish(compiled, score_floor, sizes):
    """dout . v, or that over the sum of the scores, is below float32. Over small scores, or times large queries, it is not: plain
    code loses dk."""
    q_size, k_size, v_size, dout_size = sizes
    call = make("linear", "cpu", N=31, M=31, d=4, eps=0.1 * q_size * k_size, score_floor=score_floor)
    call = replace(call, q=call.q * q_size, k=call.k * k_size, v=call.v * v_size)
    dout = output_gradient(call) * dout_size
    with infsa_kernels.backend(compiled):
        found = call.gradients(dout)
    for name, right in call.reference_gradients(dout, torch.float64).items():
        error = (found[name] - right).abs().max()
        assert error <= 1e-5 * right.abs().max() + torch.finfo(torch.float32).smallest_normal, name


@pytest.mark.parametrize("channel", [0, 3, 15])
@pytest.mark.parametrize("layout", ["contiguous", "token_major"])
@pytest.mark.parametrize("op, options", [("linear", {}), ("linear", {"score_floor": 0.1}), ("pure", {})], ids=str)
@pytest.mark.parametrize("compiled", [name for name in backends_of("cpu") if name != "triton"])
def test_sums_of_values_that_cancel(op, options, channel, layout, compiled):
    """A sum may be infinity less infinity on its way to a finite number, in one channel among others that stay small."""
    call = make(op, "cpu", N=64)
    q, k, v = call.q.abs() + 1, call.k.abs() + 1, call.v
    v[..., ::2, channel], v[..., 1::2, channel] = 3e38, -3e38
    call = Call(op, LAYOUTS[layout](q), LAYOUTS[layout](k), LAYOUTS[layout](v), **options)
    truth, right = call.reference(torch.float64), torch.arange(16) == channel
    with infsa_kernels.backend(compiled):
        out = call.run()
    for part in (right, ~right):
        assert (out - truth)[..., part].abs().max() <= 1e-5 * truth[..., part].abs().max()


@both
@pytest.mark.parametrize("v_size", [1e-12, 1e20])
@pytest.mark.parametrize("compiled", [name for name in backends_of("cpu") if name != "triton"])
def test_a_factor_that_overflows_leaves_nothing_nothing(op, v_size, compiled):
    """No score is positive: output and gradients are 0, though 1 / eps times what takes them out of their units is infinite."""
    call = make(op, "cpu", N=20, eps=1e-34)
    call = replace(call, q=call.q * 0, k=call.k * 1e-11, v=call.v * v_size)
    with infsa_kernels.backend(compiled):
        found = {"out": call.run(), **call.gradients(output_gradient(call) * 1e18)}
    assert [name for name, t in found.items() if not (t == 0).all()] == []


@pytest.mark.parametrize("op, options", [("linear", {}), ("linear", {"score_floor": 0.1}), ("pure", {})], ids=str)
@pytest.mark.parametrize("dtype, allowed", [(torch.float32, 1e-5), (torch.bfloat16, 5e-3)], ids=str)
@pytest.mark.parametrize("compiled", [name for name in backends_of("cpu") if name != "triton"])
def test_products_of_scores_and_values_that_vanish(op, options, dtype, allowed, compiled):
    """Every r_j v_j is below float32, beside a head whose values are 0."""
    call = make(op, "cpu", N=64, dtype=dtype, eps=1e-17, **options)
    call = replace(call, q=call.q * 2.0**-22, k=call.k * 2.0**-22, v=call.v * 2.0**-108)
    call.v[:, 1] = 0
    truth = call.reference(torch.float64)
    with infsa_kernels.backend(compiled):
        out = call.run()
    assert (out - truth).abs().max() <= allowed * truth.abs().max()


@pytest.mark.parametrize("compiled", [name for name in backends_of("cpu") if name != "triton"])
def test_the_norm_of_large_scores(compiled):
    """Squares of 1e36 and more: float32 holds the norm, and the scores' shares of it."""
    call = make("pure", "cpu", N=300, M=260, d=64)
    call.q *= 1e9
    call.k *= 1e9
    out, norm = raw_op("pure_fwd", compiled)(*call.raw())
    S = call.q.double() @ call.k.double().mT / 64
    torch.testing.assert_close(norm.double(), torch.relu(S).norm(dim=(-2, -1)), rtol=1e-6, atol=0)
    assert (out.abs().amax((-2, -1)) > 1e-3).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("compiled", [name for name in backends_of("cpu") if name == "cpu"])
def test_gradient_of_one_score(dtype, compiled):
    """Of N = M = 1 the gradients of q and k are what is left of two terms that cancel; the rule, on this very input."""
    strictly("pure", dtype, compiled, (1, 1, 64), ("q", "k"))


@pytest.mark.parametrize("N, M, d", [(1023, 1, 64), (300, 2, 100)])
@pytest.mark.parametrize("compiled", [name for name in backends_of("cpu") if name == "cpu"])
def test_scores_of_few_keys(N, M, d, compiled):
    """No sum over keys averages their rounding."""
    strictly("pure", torch.float32, compiled, (N, M, d), ("out",))


def strictly(op, dtype, backend, sizes, names):
    """The rule on sixty inputs, by the error of plain code on that input alone."""
    N, M, d = sizes
    for _ in range(60):
        call = make(op, "cpu", H=1, N=N, M=M, d=d, dtype=dtype)
        dout = output_gradient(call)
        wanted = expected(call, dout, draws=1)
        with infsa_kernels.backend(backend):
            found = {"out": call.run(), **call.gradients(dout)}
        for name in names:
            factor = FORWARD if name == "out" else GRADIENT
            assert_within(found[name], wanted[name].truth, wanted[name].eager_error, factor, name)


@pytest.mark.parametrize("sizes", [(1, 1), (1, 2), (3, 2)], ids=str)
def test_c_of_few_scores_is_not_from_the_rounded_output(sizes, device, backend):
    """With one query and one key dq and dk are eps / F of their terms; the output's rounding would leave 2^-9 of them."""
    for dtype in (torch.bfloat16, torch.float16):
        call = make("pure", device, H=8, N=sizes[0], M=sizes[1], d=64, dtype=dtype)
        dout = output_gradient(call)
        truth = call.reference_gradients(dout, torch.float64)
        size = max(truth[name].abs().max().item() for name in ("q", "k"))
        for name in ("q", "k"):
            error = (call.gradients(dout)[name].double() - truth[name]).abs().max().item()
            assert error <= torch.finfo(dtype).eps * size + 3e-6, name


def test_ignored_rows_are_zero_whatever_v_holds(device, backend):
    call = make("pure", device, N=20, M=18)
    call.v[0, 1, 3, 2] = torch.inf
    call.query_padding_mask = torch.arange(20, device=device)[None] % 3 == 0
    out = call.run()
    assert (out[:, :, ::3] == 0).all()
    assert torch.equal(out.isfinite(), call.reference(torch.float64).isfinite())


def test_a_removed_side_hides_what_the_other_holds(device, backend):
    """All keys ignored: no score counts, not even that of a NaN."""
    call = make("pure", device, N=20, M=18)
    call.q[0, 0, 4, 1], call.q[0, 1, 5, 2] = torch.nan, torch.inf
    call.key_padding_mask = torch.ones(1, 18, dtype=torch.bool, device=device)
    assert (call.run() == 0).all()


@pytest.mark.parametrize("N", [4097, 8192])
@pytest.mark.one_in(2)
def test_frobenius_norm(N, device, backend):
    """N^2 squares in float32, of which a plain float32 sum loses the last two digits."""
    call = make("pure", device, H=1, N=N, d=16)
    _, norm = raw_op("pure_fwd", backend)(*call.raw())
    squares = torch.zeros((), dtype=torch.float64, device=device)
    for block in call.q[0, 0].double().split(1024):
        squares += torch.relu(block @ call.k[0, 0].double().T / 16).square().sum()
    assert (norm[0, 0].double() / squares.sqrt() - 1).abs() < 1e-6


@both
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_nan_and_inf_of_the_output(op, where, value, device, backend):
    """They come out where they come out of plain torch code."""
    for dtype in DTYPES:
        call = make(op, device, N=21, M=19, d=16, dtype=dtype)
        call.qkv()[where][0, 1, 5, 3] = value
        truth = call.reference(torch.float64)
        out = call.run()
        assert torch.equal(out.isnan().cpu(), truth.isnan().cpu())
        assert torch.equal(out.isinf().cpu(), truth.isinf().cpu())
        assert out[:, 0].isfinite().all()
        # Minus infinity can be a score that ReLU removes; NaN stays.
        assert value == value or not out[:, 1].isfinite().all()


@both
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("where", ["q", "k", "v", "dout"])
def test_nan_in_gradients(op, where, tied, device, backend):
    """A NaN never turns into a number, and stays in its head."""
    if tied and where == "k":
        where = "q"
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        call = make(op, device, N=21, d=16, dtype=dtype, tied=tied)
        dout = output_gradient(call)
        poisoned = dout if where == "dout" else call.qkv()[where]
        poisoned[0, 1].view(-1)[5] = torch.nan
        truth = call.reference_gradients(dout, torch.float64)
        for name, gradient in call.gradients(dout).items():
            assert gradient[:, 0].isfinite().all(), name
            assert torch.equal(gradient.isnan().cpu(), truth[name].isnan().cpu()), name


@pytest.mark.parametrize("floor", [0.0, 0.1], ids=["relu", "floor"])
def test_a_row_that_is_all_but_zero(floor, device, backend):
    """The gradient goes along q_i / ||q_i||, whose norm has no inverse in float32."""
    for dtype in (torch.float32, torch.bfloat16):
        call = make("linear", device, N=9, M=7, d=1, dtype=dtype, eps=1.0, score_floor=floor)
        call.q[0, :, ::2] = torch.finfo(dtype).smallest_normal * 2**-7
        for name, gradient in call.gradients(output_gradient(call)).items():
            assert gradient.isfinite().all(), name


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.one_in(2)
def test_same_bits_in_every_run(op, dtype, device, backend):
    call = make(op, device, N=600, M=530, d=16, dtype=dtype, rho=torch.rand(2, device=device))
    dout = output_gradient(call)
    first = [call.run(), *call.gradients(dout).values()]
    for _ in range(25):
        # Memory of another alignment and content each time must not matter.
        _ = torch.randn(torch.randint(1, 5000, ()).item(), device=device)
        for result, again in zip(first, [call.run(), *call.gradients(dout).values()], strict=True):
            assert torch.equal(result, again)


SIZES = [
    {"H": 3, "N": 70, "M": 50, "d": 16},
    {"H": 1, "N": 3001, "M": 2503, "d": 32},
    {"B": 2, "H": 5, "N": 333, "M": 444, "d": 20},
    {"H": 16, "N": 800, "M": 1000, "d": 8},
]


@both
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("compiled", [name for name in backends_of("cpu") if name == "cpu"])
def test_same_bits_for_every_number_of_threads(op, sizes, compiled):
    """A promise of the compiled kernels; torch's own reductions, which eager code uses, depend on the number."""
    threads = torch.get_num_threads()
    for dtype in (torch.float32, torch.bfloat16):
        for tied in (False, True):
            call = make(op, "cpu", dtype=dtype, tied=tied, **({**sizes, "M": None} if tied else sizes))
            dout = output_gradient(call)
            results = []
            try:
                for n in (1, 2, 3, 40):
                    torch.set_num_threads(n)
                    with infsa_kernels.backend(compiled):
                        results.append([call.run(), *call.gradients(dout).values()])
            finally:
                torch.set_num_threads(threads)
            for others in results[1:]:
                for result, other in zip(results[0], others, strict=True):
                    assert torch.equal(result, other)


MEMORY = r"""
import re, resource, sys, torch, infsa_kernels
backend, N = sys.argv[1], int(sys.argv[2])
q, k, v = (torch.randn(1, 1, N, 64).requires_grad_() for _ in range(3))

def peak():
    try:  # of this process alone: Linux's ru_maxrss has that of the process which started it, too
        return int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1])
    except FileNotFoundError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10

with infsa_kernels.backend(backend):
    small = [t[:, :, :64] for t in (q, k, v)]
    torch.ops.infsa.pure(*small).sum().backward()
    for t in (q, k, v):
        t.grad.fill_(1)
    before = peak()
    out = torch.ops.infsa.pure(q, k, v)
    forward = peak()
    out.backward(torch.ones_like(out))
print(forward - before, peak() - before)
"""


@pytest.mark.parametrize("name", [swept(name) if name == "eager" else name for name in backends_of("cpu")])
def test_pure_needs_no_matrix(name):
    """Of one head at N = 8192 the scores alone would be 256 MiB."""
    N = 8192
    # What is freed goes back at once, as of real sizes it does.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    command = [sys.executable, "-c", MEMORY, name, str(N)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    tensor_kib = N * 64 * 4 // 1024
    forward, both_directions = (int(kib) for kib in run.stdout.split())
    # Beyond results and gradients: in torch operations up to nine of the blocks of 16 MiB that they go by.
    working = {"cpu": 64, "eager": 9 * 16}[name] * 1024
    assert forward < tensor_kib + working
    # out, dout and the three gradients
    assert both_directions < 5 * tensor_kib + working


@both
def test_one_positive_score(op, device, backend):
    """Of a head with a single positive score the gradients of q and k are of the order of eps: two large terms cancel.

    What is left of the terms is their rounding, including that of Pure's saved output; it must not be more.
    """
    for dtype in DTYPES:
        q = torch.tensor([[1.0, 0.5], [-1.0, -0.5]], dtype=dtype, device=device)[None, None]
        k = torch.tensor([[0.75, 0.5], [-1.0, -0.25]], dtype=dtype, device=device)[None, None]
        q, k = (q[:, :, :1], k) if op == "pure" else (q.abs(), k)
        v = torch.randn(1, 1, 2, 8, dtype=dtype, device=device)
        call = Call(op, q, k, v)
        dout = output_gradient(call)
        # The terms are rho dout.v times the derivative of log r, which is about 1 here.
        size = (dout.double().abs().sum() * v.double().abs().max()).item()
        truth = call.reference_gradients(dout, torch.float64)
        for name, gradient in call.gradients(dout).items():
            error = (gradient.double() - truth[name]).abs().max().item()
            assert error <= 8 * torch.finfo(dtype).eps * size, name


def test_the_reference_is_the_formula(device):
    """The truth of all tests, written out once more, element by element, for one head."""
    q, k, v = (torch.randn(1, 1, 3, 2, dtype=torch.float64, device=device) for _ in range(3))
    rho, eps = 0.9, 0.1
    u, kappa, values = ((t[0, 0] * s).tolist() for t, s in ((q, 2**-0.5), (k, 2**-0.5), (v, 1)))

    def dot(x, y):
        return sum(a * b for a, b in zip(x, y))

    def pooled(weights):
        return [dot(weights, column) for column in zip(*values)]

    P = [[max(0.0, dot(x, y)) for y in kappa] for x in u]
    F = sum(dot(row, row) for row in P) ** 0.5
    pure = [pooled([rho * p / (F + eps) for p in row]) for row in P]

    energy = [dot(x, x) ** 0.5 for x in u]
    central_query = [dot(energy, column) / (sum(energy) + eps) for column in zip(*u)]
    r = [max(0.0, dot(central_query, y)) for y in kappa]
    linear = pooled([rho * x / (sum(r) + eps) for x in r])

    for op, wanted in (("pure", pure), ("linear", linear)):
        actual = REFERENCE[op](q, k, v, rho, eps)[0, 0].cpu()
        torch.testing.assert_close(actual, torch.tensor(wanted, dtype=torch.float64))


def test_a_key_with_all_the_weight_has_weight_one(device, backend):
    """r_j / R where R = r_j: a backward pass whose scores had other bits than the forward's would leave their rounding there."""
    call = call_of_one_key(64, device)
    out, dout = call.run(), output_gradient(call)
    positive = out.abs().sum(-1) > 0
    assert positive.float().mean() > 0.9
    torch.testing.assert_close(call.gradients(dout)["v"][:, :, 0][positive], dout[positive], rtol=5e-7, atol=0)


@pytest.mark.only_backend("cpu")
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(("N", "d", "dv"), [(47, 7, 33), (301, 24, 5), (433, 72, 64)])
@pytest.mark.parametrize("layout", ["contiguous", "every_other_channel"])
def test_pure_in_bfloat16(N, d, dv, layout, tied, device, backend):
    """Of one block and of several, odd sizes and masks that differ, where products may be of pairs."""
    q, k = (LAYOUTS[layout](torch.randn(2, 2, N, d, dtype=torch.bfloat16)) for _ in range(2))
    v = LAYOUTS[layout](torch.randn(2, 2, N, dv, dtype=torch.bfloat16))
    call = Call("pure", q, None if tied else k, v)
    check(call, output_gradient(call))
    ignored = torch.arange(N) % 5 == 0
    call.key_padding_mask = torch.stack([ignored, ~ignored])
    check(call, output_gradient(call))
    call.query_padding_mask = call.key_padding_mask
    check(call, output_gradient(call))


@pytest.mark.only_backend("cpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_pure_along_its_output(tied, dtype, device, backend):
    """What a score's gradient owes to the norm F, which random gradients of the output hardly see."""
    q, k, v = (torch.randn(1, 2, 700, 24).to(dtype) for _ in range(3))
    for values in (v, v + 2):
        call = Call("pure", q, None if tied else k, values)
        check(call, call.reference(torch.float64).to(dtype))


@pytest.mark.only_backend("cpu")
@pytest.mark.sweep
@pytest.mark.parametrize("isa", ["avx512_bf16", "avx512", "avx2", "portable"])
def test_pure_in_bfloat16_on_every_instruction_set(isa):
    """Some multiply it by itself, others in float32: the tests of layouts and of rounding once more on every set of this CPU."""
    environment = {**os.environ, "INFSA_CPU_ISA": isa}
    probe = [sys.executable, "-c", "import infsa_kernels"]
    if subprocess.run(probe, env=environment, capture_output=True).returncode:
        pytest.skip(f"this CPU has no {isa}")
    folder = os.path.dirname(__file__)
    tests = [os.path.join(folder, name) for name in ("test_operators.py", "test_numerics.py")]
    chosen = "cpu-cpu and pure and bfloat16 and not instruction and (layouts or kinds_of_rho or rounds_once or pure_in)"
    run = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", chosen, *tests]
    done = subprocess.run(run, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]

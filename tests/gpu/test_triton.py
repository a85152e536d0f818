"""The Triton kernels in Triton's interpreter: every kernel and every path of it, against the float64 reference.

The interpreter is chosen when Triton is imported, so those of these tests that need it run in processes of their own: run.py.
"""

import itertools
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from helpers import packed_calls
from helpers.calls import OPS, Call, check, expected, output_gradient, raw_op
from helpers.interpreter import needs_interpreter
from helpers.layouts import LAYOUTS
from helpers.parts import check_in_parts
from helpers.sweep import some

import infsa_kernels

pytest.importorskip("triton")

by_op = pytest.mark.parametrize("op", OPS)
by_tie = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def interpreted(test):
    return pytest.mark.interpreter(needs_interpreter(test))


def test_importing_the_package_does_not_import_the_kernels():
    code = "import sys, infsa_kernels; assert 'infsa_kernels.triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture
def triton(monkeypatch):
    """The backend in force, with sequences cut into splits from 32 tokens on, as long ones are."""
    from infsa_kernels.triton import configs

    monkeypatch.setattr(configs, "WHOLE", 32)
    monkeypatch.setattr(configs, "resident", lambda *kind: 1)
    monkeypatch.setattr(configs, "multiprocessors", lambda device: 12)
    with infsa_kernels.backend("triton"):
        yield


def make(
    op, *, B=2, H=3, N=70, M=45, d=16, dv=16, dtype=torch.float32, tied=False, layout="token_major", **options
) -> Call:
    def tensor(length, width):
        return LAYOUTS[layout](torch.randn(B, H, length, width, dtype=dtype))

    length = N if tied else M
    options = {"rho": torch.rand(H) + 0.5, "eps": 1.0} | options
    return Call(op, tensor(N, d), None if tied else tensor(length, d), tensor(length, dv), **options)


@interpreted
@by_op
@by_tie
@pytest.mark.parametrize("dtype", some(DTYPES, torch.float32, torch.bfloat16), ids=str)
@pytest.mark.one_in(4)
def test_parts_of_a_sequence(op, tied, dtype, triton):
    """The kernels as steps, in blocks, under masks and with a floor: tests/ops/test_steps.py."""
    for masked, floor in itertools.product((False, True), (0.0, 0.3) if op == "linear" else (0.0,)):
        call = make(op, dtype=dtype, tied=tied, N=70, M=45, H=2)
        masks = {
            "key_padding_mask": torch.rand(2, call.v.shape[2]) < 0.3,
            "query_padding_mask": torch.rand(2, 70) < 0.3,
        }
        call = replace(call, score_floor=floor, **(masks if masked else {}))
        check_in_parts(call, "triton", f"masked {masked}, floor {floor}")


@interpreted
@by_op
@by_tie
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.one_in(3)
def test_against_the_reference(op, tied, dtype, triton):
    layout = "contiguous" if dtype == torch.float32 else "token_major"
    call = make(op, dtype=dtype, tied=tied, layout=layout, N=130, M=97, H=2)
    check(call, output_gradient(call), draws=3)


@interpreted
@by_op
@by_tie
@pytest.mark.parametrize("which", some(["keys", "queries", "both", "same"], "both"))
@pytest.mark.one_in(2)
def test_masks(op, tied, which, triton):
    for dtype in (torch.float32, torch.float16):
        call = make(op, dtype=dtype, tied=tied, H=2)
        keys, queries = torch.rand(2, call.v.shape[2]) < 0.4, torch.rand(2, 70) < 0.4
        if which == "same":
            keys = queries[:, : keys.shape[1]]
        for t in (call.v,) if tied else (call.k, call.v):
            t.masked_fill_(keys[:, None, :, None] & (which != "queries"), float("nan"))
        masks = {
            "key_padding_mask": None if which == "queries" else keys,
            "query_padding_mask": None if which == "keys" else queries,
        }
        call = replace(call, **masks)
        check(call, output_gradient(call), draws=3)


@interpreted
@by_op
@by_tie
@pytest.mark.one_in(2)
def test_padding_of_whole_tiles(op, tied, triton):
    """At either end, on either side, and all of a sample; NaN there."""
    rows = torch.arange(200)
    ignored = torch.stack((rows >= 70, (rows < 130) | (rows > 170), rows >= 0))
    for dtype, query_mask in ((torch.float16, ignored.flip(0)), (torch.float32, None)):
        call = make(op, B=3, H=1, N=200, M=200, tied=tied, dtype=dtype)
        for t in (call.v,) if tied else (call.k, call.v):
            t.masked_fill_(ignored[:, None, :, None], float("nan"))
        call = replace(call, key_padding_mask=ignored, query_padding_mask=query_mask)
        wanted = replace(call, v=call.v.nan_to_num(), k=None if tied else call.k.nan_to_num())
        dout = output_gradient(call)
        check(call, dout, expected(wanted, dout, 3))


@interpreted
@by_tie
def test_tiles_of_padding_are_skipped(tied, triton, monkeypatch):
    """Pure's products: as many as of the tokens that count, in a padded batch and in a packed one."""
    from triton.runtime import interpreter

    counted, dot = [], interpreter.InterpreterBuilder.create_dot
    monkeypatch.setattr(
        interpreter.InterpreterBuilder, "create_dot", lambda self, *given: counted.append(1) or dot(self, *given)
    )

    def products(call) -> int:
        counted.clear()
        call.gradients(call.output_gradient() if hasattr(call, "lengths") else output_gradient(call))
        return len(counted)

    def masked(N, padded):
        mask = (torch.arange(N) >= N - padded).expand(1, N).contiguous()
        return make(
            "pure", B=1, H=1, N=N, M=N, tied=tied, dtype=torch.bfloat16, key_padding_mask=mask, query_padding_mask=mask
        )

    assert products(masked(384, 256)) == products(masked(128, 0)) > 0

    def packed(*lengths):
        return packed_calls.make("pure", tied=tied, dtype=torch.bfloat16, heads=1, lengths=lengths, key_lengths=lengths)

    assert products(packed(0, 128, 0, 200, 70)) == sum(products(packed(n)) for n in (128, 200, 70))


@interpreted
@by_op
@pytest.mark.parametrize("layout", some(LAYOUTS, "token_major", "every_other_channel", "expanded_token"))
@pytest.mark.one_in(2)
def test_layouts(op, layout, triton):
    for dtype, d, dv in ((torch.float32, 20, 9), (torch.bfloat16, 16, 32)):
        call = make(op, dtype=dtype, d=d, dv=dv, layout=layout, N=37, M=29)
        check(call, output_gradient(call), draws=3)


@interpreted
@by_op
@pytest.mark.parametrize(
    ("N", "M"), some([(1, 1), (1, 70), (33, 1), (31, 32), (32, 33), (64, 63), (65, 129)], (1, 1), (33, 1), (32, 33))
)
@pytest.mark.one_in(2)
def test_lengths(op, N, M, triton):
    for dtype in (torch.float32, torch.bfloat16):
        call = make(op, dtype=dtype, B=1, N=N, M=M, H=2)
        check(call, output_gradient(call), draws=3)


@interpreted
@by_op
@pytest.mark.parametrize(
    ("d", "dv"),
    some(
        [(1, 1), (3, 5), (20, 72), (64, 64), (33, 100), (128, 16), (160, 256)], (3, 5), (20, 72), (33, 100), (128, 16)
    ),
)
@pytest.mark.one_in(2)
def test_head_dims(op, d, dv, triton):
    for dtype in (torch.float32, torch.bfloat16):
        call = make(op, dtype=dtype, B=1, H=2, d=d, dv=dv, N=37, M=29)
        check(call, output_gradient(call), draws=3)


@interpreted
@by_op
@by_tie
@pytest.mark.one_in(2)
def test_large_half_precision_neither_overflows_nor_vanishes(op, tied, triton):
    for size in (3e-3, 1.0, 2000.0):
        call = make(op, dtype=torch.float16, tied=tied, B=1, H=1, d=64, dv=64, N=65, M=65, eps=1e-6, rho=0.9)
        call.q.mul_(size)
        if call.k is not None:
            call.k.mul_(size)
        dout = output_gradient(call) * 100
        out = call.run()
        assert out.isfinite().all()
        check(call, draws=3)
        truth = call.reference_gradients(dout, torch.float64)
        for name, grad in call.gradients(dout).items():
            # Where even the gradient fits into float16 it is finite and close to the truth.
            fits = truth[name].abs() < 6e4
            error = (grad.double() - truth[name])[fits].abs().max()
            assert error <= 1e-2 * truth[name].abs().max().clamp(max=6e4) + 1e-7, f"d{name}: {error}"


@interpreted
@by_op
@pytest.mark.parametrize("value", some([float("nan"), float("inf"), -float("inf")], float("inf")))
def test_nan_and_inf_propagate(op, value, triton):
    for name in "qkv":
        call = make(op, N=40, M=40)
        getattr(call, name)[0, 1, 5, 3] = value
        check(call, draws=1)


@interpreted
@by_op
@by_tie
@pytest.mark.one_in(2)
def test_outputs_are_made_only_on_demand(op, tied, triton):
    call = make(op, B=1, H=1, tied=tied, dtype=torch.bfloat16)
    forward, backward = raw_op(f"{op}_fwd", "triton"), raw_op(f"{op}_bwd", "triton")
    raw, dout = call.raw(), output_gradient(call)
    out, *saved = forward(*raw)
    saved = [out, *saved] if op == "pure" else saved
    everything = backward(dout, *raw[:3], *saved, *raw[3:], [True] * 4)
    for number in range(15):
        wanted = [bool(number >> i & 1) for i in range(4)]
        for made, whole, asked in zip(backward(dout, *raw[:3], *saved, *raw[3:], wanted), everything, wanted):
            assert torch.equal(made, whole) if asked else made.shape == (0,)


@interpreted
@by_op
def test_empty_sizes_and_repeated_runs(op, triton):
    for sizes in ({"B": 0}, {"H": 0}, {"N": 0}, {"M": 0}, {"d": 0}, {"dv": 0}):
        call = make(op, **sizes, layout="contiguous")
        check(call, output_gradient(call), draws=1)
    call = make(op, dtype=torch.bfloat16, N=200, M=190)
    assert torch.equal(call.run(), call.run())


@interpreted
@by_tie
@pytest.mark.parametrize(
    "sizes", [{"N": 130, "M": 97, "H": 1}, {"N": 30, "M": 20, "H": 2, "d": 20, "dv": 9}], ids=["long", "short"]
)
@pytest.mark.one_in(2)
def test_floor(tied, sizes, triton):
    """In splits and in one program; with masks, NaN under them, and one sample that ignores all keys."""
    for dtype, masked in ((torch.float32, True), (torch.bfloat16, False)):
        call = make("linear", dtype=dtype, tied=tied, score_floor=0.3, **sizes)
        if masked:
            call.key_padding_mask = torch.rand(2, call.v.shape[2]) < 0.4
            call.key_padding_mask[1] = True
            call.query_padding_mask = torch.rand(2, sizes["N"]) < 0.4
            call.v.masked_fill_(call.key_padding_mask[:, None, :, None], float("nan"))
            wanted = expected(replace(call, v=call.v.nan_to_num()), dout := output_gradient(call), 3)
            check(call, dout, wanted)
        else:
            check(call, output_gradient(call), draws=3)
    backward = raw_op("linear_floor_bwd", "triton")
    raw, dout = call.raw(), output_gradient(call)
    saved = raw_op("linear_floor_fwd", "triton")(*raw)[1:]
    everything = backward(dout, *raw[:3], *saved, *raw[3:], [True] * 4)
    for number in range(0, 15, 3):
        wanted = [bool(number >> i & 1) for i in range(4)]
        for made, whole, asked in zip(backward(dout, *raw[:3], *saved, *raw[3:], wanted), everything, wanted):
            assert torch.equal(made, whole) if asked else made.shape == (0,)


@interpreted
def test_empty_sizes_with_a_floor(triton):
    for sizes in ({"B": 0}, {"N": 0}, {"M": 0}, {"d": 0}, {"dv": 0}):
        call = make("linear", **sizes, layout="contiguous", score_floor=0.1)
        check(call, output_gradient(call), draws=1)


@interpreted
def test_refusals_name_the_reason():
    def reason(dtype, d):
        return infsa_kernels.explain_backend("linear", torch.device("cpu"), dtype, (1, 1, 8, d))["triton"]

    assert reason(torch.bfloat16, 64) is None
    assert "float64" in reason(torch.float64, 64)
    assert "257" in reason(torch.float32, 257)
    q, v = torch.randn(1, 1, 8, 16), torch.randn(1, 1, 8, 300)
    with infsa_kernels.backend("triton"), pytest.raises(ValueError, match="300"):
        torch.ops.infsa.pure(q, q, v)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="it is not refused there")
def test_the_cpu_is_refused():
    q = torch.randn(1, 1, 8, 16)
    with infsa_kernels.backend("triton"), pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        torch.ops.infsa.linear(q, q, q)

"""Every Triton kernel as compiled for sm_80 and sm_90, executed: right, in bounds, nothing read that was never written, no race.

What finds the last three is the machine itself, whose own tests are in test_machine.py; that every barrier and every wait is
needed, or why not, in test_mutants.py.
"""

import pytest
import torch
from helpers import packed_calls
from helpers.calls import Call, expected, output_gradient
from helpers.layouts import LAYOUTS
from helpers.sweep import some

from infsa_kernels.testing import FORWARD, GRADIENT, assert_within

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter does not compile", allow_module_level=True)

from infsa_kernels.triton import configs, linear_fold  # noqa: E402

from .launches import executing  # noqa: E402
from .machine import descending, shuffled  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
by_op = pytest.mark.parametrize("op", ["linear", "pure"])
on_each = pytest.mark.parametrize("arch", some(["sm_80", "sm_90"], "sm_80"))


@pytest.fixture(autouse=True)
def splits(monkeypatch):
    """Linear's sequences are cut from 128 tokens on, as those of more than 512 are, into splits of several tiles."""
    monkeypatch.setattr(configs, "WHOLE", 128)
    monkeypatch.setattr(configs, "resident", lambda *kind: 1)
    monkeypatch.setattr(configs, "multiprocessors", lambda device: 12)


def make(op, dtype, *, tied=False, masks="", N=200, M=131, H=2, d=64, dv=64, layout="token_major") -> Call:
    M = N if tied else M

    def tensor(length, width):
        return LAYOUTS[layout](torch.randn(1, H, length, width, dtype=DTYPES[dtype]))

    q, k, v = tensor(N, d), None if tied else tensor(M, d), tensor(M, dv)
    keys, queries = torch.rand(1, M) < 0.4, torch.rand(1, N) < 0.4
    if "keys" in masks:
        # NaN counts as unwritten: it must not even be read.
        for t in (v,) if tied else (k, v):
            t.masked_fill_(keys[:, None, :, None], float("nan"))
    call = Call(op, q, k, v, torch.rand(H) + 0.5, 1.0)
    call.key_padding_mask = keys if "keys" in masks else None
    call.query_padding_mask = queries if "queries" in masks else None
    return call


def results(call: Call, dout, **how) -> dict[str, torch.Tensor]:
    with executing(**how):
        return {"out": call.run(), **call.gradients(dout)}


def check(call: Call, arch: str = "sm_80") -> None:
    """The rule, and the same bits whichever program runs first and whichever lane's store stays.

    The last holds where threads read several elements of a row at once. Where each reads one, a product of its own goes into
    the first sum over the row by FMA, and what the others send has been rounded: the lanes' sums differ in their last bits.
    """
    packed = isinstance(call, packed_calls.PackedCall)
    dout = call.output_gradient() if packed else output_gradient(call)
    before = {name: t.clone() for name, t in call.tensors().items()}
    found = results(call, dout, arch=arch)
    for name, wanted in expected(call, dout).items():
        factor, what = (FORWARD, "out") if name == "out" else (GRADIENT, f"d{name}")
        assert_within(found[name], wanted.truth, wanted.eager_error, factor, what)
    for name, t in call.tensors().items():
        assert torch.equal(t.nan_to_num(), before[name].nan_to_num()), f"{name} was written to"
    step = call.q.stride(0 if packed else 2)
    row_at_once = call.q.stride(-1) == 1 and call.q.data_ptr() % 16 == step * call.q.itemsize % 256 == 0
    for order in (descending, shuffled(1)) if call.op == "linear" else ():
        for name, t in results(call, dout, order=order, first_wins=row_at_once, arch=arch).items():
            assert torch.equal(t, found[name]), f"{name} differs with the order in which programs run"


KINDS = [
    (op, dtype, tied, masks)
    for op in ("linear", "pure")
    for dtype in DTYPES
    for tied in (False, True)
    for masks in ("", "keys", "queries", "keys, queries")
]
IN_MAKE_TEST = [
    *(("linear", dtype, False, "") for dtype in DTYPES),
    ("linear", "bf16", True, "keys, queries"),
    ("linear", "fp16", False, "keys, queries"),
    *(("pure", dtype, False, "") for dtype in DTYPES),
    ("pure", "bf16", True, ""),
    ("pure", "fp16", True, "keys, queries"),
    ("pure", "bf16", False, "keys, queries"),
    ("pure", "fp32", False, "keys, queries"),
]


@pytest.mark.parametrize(("op", "dtype", "tied", "masks"), some(KINDS, *IN_MAKE_TEST))
@on_each
@pytest.mark.one_in(3)
def test_tiles_and_a_tail(op, dtype, tied, masks, arch):
    sizes = {"N": 600, "M": 530, "H": 3, "d": 16, "dv": 16} if op == "linear" else {}
    if op == "pure" and dtype == "fp32":
        sizes = {"N": 70, "M": 65}
    check(make(op, dtype, tied=tied, masks=masks, **sizes), arch)


@pytest.mark.parametrize("N", [70, 129, 197])
@pytest.mark.parametrize(("masks", "layout"), [("", "token_major"), ("", "offset_by_one"), ("keys", "token_major")])
def test_pure_forward_on_hopper(N, masks, layout):
    """Tiles by descriptor or, of a tensor that is on no 16 bytes, and under a mask, through pointers."""
    call, ran = make("pure", "bf16", N=N, M=N, H=1, masks=masks, layout=layout), {}
    with executing(arch="sm_90", see=lambda launch, machine: ran.update({launch.name: launch.ptx})):
        out = call.run()
    wanted = expected(call, output_gradient(call))["out"]
    assert_within(out, wanted.truth, wanted.eager_error, FORWARD, "out")
    assert "wgmma.mma_async" in ran["pure_fwd_kernel"]
    assert ("cp.async.bulk.tensor" in ran["pure_fwd_kernel"]) == (not masks and layout == "token_major")


@pytest.mark.parametrize(
    ("op", "dtype", "tied", "masks"),
    [("linear", "bf16", False, ""), ("pure", "bf16", False, ""), ("pure", "fp16", True, "keys, queries")],
)
def test_forward_and_backward_on_hopper(op, dtype, tied, masks):
    sizes = {"N": 300, "M": 270, "H": 3, "d": 16, "dv": 16} if op == "linear" else {"N": 130, "M": 70, "H": 1}
    check(make(op, dtype, tied=tied, masks=masks, **sizes), "sm_90")


@pytest.mark.parametrize(("dtype", "tied"), some([("bf16", False), ("fp16", True), ("fp32", False)], ("fp16", True)))
def test_partial_sums_added_up_by_a_launch_of_their_own(dtype, tied, monkeypatch):
    fold, calls = linear_fold.Fold.__call__, []

    def counted(*arguments):
        calls.append(arguments)
        return fold(*arguments)

    monkeypatch.setattr(linear_fold.Fold, "__call__", counted)
    with configs.always_folding():
        check(make("linear", dtype, tied=tied, N=300, M=280, H=3, d=20, dv=9))
    assert len(calls) == 3 * 3  # three orders of the programs: forward, then forward and backward


SHORT = [kind[:3] for kind in KINDS if not kind[3]]


@pytest.mark.parametrize(("op", "dtype", "tied"), some(SHORT, ("linear", "bf16", True), ("pure", "fp16", False)))
@on_each
def test_short_sequences(op, dtype, tied, arch):
    """Linear in one program per head group, and so few scores that Pure's backward pass makes them anew."""
    sizes = {"N": 70, "M": 45, "d": 16, "dv": 16} if op == "linear" else {"N": 32, "M": 29}
    check(make(op, dtype, tied=tied, **sizes), arch)


# Empty ones first, amid the others and last, with queries or keys alone; from few scores to several tiles; and short ones.
LENGTHS = {"long": ((0, 3, 150, 0, 33), (0, 4, 131, 2, 0)), "short": ((5, 0, 70), (9, 3, 45))}


@pytest.mark.parametrize("lengths", some(LENGTHS, "long"))
@pytest.mark.parametrize(
    ("op", "dtype", "tied"),
    some(
        [*SHORT, ("linear_floor", "bf16", True), ("linear_floor", "fp32", False)],
        ("linear", "bf16", False),
        ("linear_floor", "bf16", True),
        ("pure", "fp16", True),
        ("pure", "bf16", False),
    ),
)
@on_each
@pytest.mark.one_in(2)
def test_packed_sequences(op, dtype, tied, lengths, arch):
    """Whose bounds the kernels look up; no program may touch what lies between or behind the parts that others left."""
    lengths, key_lengths = LENGTHS[lengths]
    d, heads = (32, 1) if op == "pure" else (16, 3)
    call = packed_calls.make(
        op, dtype=DTYPES[dtype], tied=tied, lengths=lengths, key_lengths=key_lengths, heads=heads, d=d, dv=d,
        rho=torch.rand(heads) + 0.5, eps=1.0,
    )  # fmt: skip
    check(call, arch)


@by_op
@pytest.mark.parametrize("dtype", some(["fp32", "bf16"], "bf16"))
@pytest.mark.parametrize("layout", some(LAYOUTS, "every_other_channel"))
def test_layouts(op, dtype, layout):
    check(make(op, dtype, N=150, M=70, d=16, dv=32, layout=layout))


HEAD_DIMS = [(1, 1), (3, 5), (20, 9), (33, 100), (40, 40), (72, 72), (128, 128), (128, 16), (160, 256), (256, 256)]


@by_op
@pytest.mark.parametrize(("dtype", "tied"), some([("fp32", False), ("bf16", False), ("fp16", True)], ("fp16", True)))
@pytest.mark.parametrize(("d", "dv"), some(HEAD_DIMS, (40, 40)))
@on_each
def test_head_dims(op, dtype, d, dv, tied, arch):
    sizes = {"N": 150, "M": 140} if op == "linear" else {"N": 70, "M": 65}
    check(make(op, dtype, H=1, d=d, dv=dv, tied=tied, **sizes), arch)


@pytest.mark.sweep
@by_op
@pytest.mark.parametrize(("N", "M"), [(1, 1), (1, 70), (33, 1), (64, 64), (128, 64), (64, 128), (127, 129), (256, 320)])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_lengths(op, dtype, N, M):
    check(make(op, dtype, N=N, M=M, d=16 if op == "linear" else 64, H=3))


@pytest.mark.parametrize("tied", some([False, True], False))
@pytest.mark.parametrize("d", some([64, 128, 256], 64))
@on_each
def test_tf32(d, tied, arch):
    """The matrix instructions of float32. Scores of inputs that TF32 holds exactly are exact; what else is multiplied loses the
    bits after the tenth."""
    call = make("pure", "fp32", N=70, M=65, H=1, d=d, dv=d, tied=tied)
    for t in call.qkv().values():
        if t is not None:
            t.copy_(t.bfloat16())
    dout = output_gradient(call).bfloat16().float()
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        found = results(call, dout, arch=arch)
    finally:
        torch.set_float32_matmul_precision(precision)
    out, gradients = call.reference_results(dout, torch.float64)
    for name, truth in {"out": out, **gradients}.items():
        error = (found[name] - truth).abs().max() / truth.abs().max()
        assert error < 2**-9, f"{name}: {error}"

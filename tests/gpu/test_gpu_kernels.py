"""Our GPU kernels where the shared tests do not go: every tile, tf32, graphs, streams, sizes beyond 32 bits, other devices.

Without a GPU the same tests run in Triton's interpreter, at sizes that take no time: that proves the tests.
"""

import ctypes
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import packed_calls, pooled_linear_calls
from helpers.calls import OPS, Call, check, expected, output_gradient
from helpers.interpreter import needs_interpreter

import infsa_kernels
from bench import timer
from infsa_kernels import pooled_linear_infsa
from infsa_kernels.testing import FORWARD, GRADIENT, assert_within

ROOT = Path(__file__).parents[2]
GPU = torch.cuda.is_available()
HEADS = {"linear": (64, 16), "pure": (16, 64)}
SANITIZER = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"

pytestmark = [
    pytest.mark.only_backend("triton", "cuda"),
    *([] if GPU else [pytest.mark.interpreter, needs_interpreter]),
]
by_op = pytest.mark.parametrize("op", OPS)
on_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")


def make(op, device, N, *, B=1, H=None, d=None, dtype=torch.bfloat16, tied=True, **options) -> Call:
    """Views of [B, N, H, d] with the paper's heads unless told otherwise, on whole numbers whose products are all odd.

    No score's sign then hangs on rounding, and a gradient jumps nowhere.
    """
    H, d = (own or paper for own, paper in zip((H, d), HEADS[op] if GPU else (2, 16)))

    def odd():
        t = 2 * torch.randint(-1, 2, (B, N, H, d), device=device)
        t[..., 0] = 2 * torch.randint(0, 2, (B, N, H), device=device) - 1
        return t.to(dtype).transpose(1, 2)

    v = torch.randn(B, N, H, d, device=device).to(dtype).transpose(1, 2)
    # The gradient of a head with few positive scores all but cancels where eps is small.
    return Call(op, odd(), None if tied else odd(), v, eps=1.0, **options)


def results(call: Call, dout) -> list[torch.Tensor]:
    return [call.run(), *call.gradients(dout).values()]


def within_the_rule(out, call: Call) -> None:
    """A part of an output beside the reference of the same part of the inputs."""
    wanted = expected(call, draws=2)["out"]
    assert_within(out, wanted.truth, wanted.eager_error, FORWARD, "out")


def tiles():
    """Every tile of configs.py: head dimensions, and lengths that fill tiles and that do not."""
    if not GPU:
        return [(op, 16, 33) for op in OPS]
    linear = [("linear", d, N) for d in (16, 64, 200) for N in (33, 197, 1000, 4097)]
    return linear + [("pure", d, N) for d in (32, 64, 128, 256) for N in (33, 197, 1024, 2049)]


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", ["float32", "tf32", "bfloat16", "float16"] if GPU else ["float32", "tf32"])
@pytest.mark.parametrize(("op", "d", "N"), tiles())
@pytest.mark.one_in(4)
def test_every_tile(op, d, N, kind, tied, masked, device, backend):
    names = ("key_padding_mask", "query_padding_mask") if masked else ()
    masks = {name: torch.rand(2, N, device=device) < 0.3 for name in names}
    dtype = getattr(torch, kind.replace("tf32", "float32"))
    call = make(op, device, N, B=2, H=2, d=d, dtype=dtype, tied=tied, **masks)
    torch.set_float32_matmul_precision("high" if kind == "tf32" else "highest")
    try:
        check(call, output_gradient(call), draws=2)
    finally:
        torch.set_float32_matmul_precision("highest")


@by_op
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("N", [197, 4096, 65536] if GPU else [33])
def test_same_bits_in_every_run_stream_and_graph(op, N, tied, device, backend):
    if op == "pure" and N > 4096:
        pytest.skip("as at 4096")
    call = make(op, device, N, tied=tied)
    dout = output_gradient(call)
    first = results(call, dout)
    runs = [lambda: results(call, dout)] * (250 if N <= 4096 else 25) if GPU else [lambda: results(call, dout)]
    runs += [lambda: _on_side_stream(lambda: results(call, dout)), lambda: _replayed(call, dout)] if GPU else []
    for run in runs:
        for result, again in zip(first, run(), strict=True):
            assert torch.equal(result, again)


def _on_side_stream(run):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = run()
    stream.synchronize()
    return found


def _replayed(call, dout):
    graph, found = timer.capture(lambda: results(call, dout))
    for t in found:
        t.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    return found


@by_op
def test_strides_beyond_32_bits(op, device, backend):
    N, stride = (600, 1 << 22) if GPU else (40, 1 << 10)  # 600 * 2^22 > 2^31
    call = make(op, device, N, H=2, tied=True)
    d = call.q.shape[-1]
    store = torch.empty(N * stride, dtype=call.q.dtype, device=device)
    far = [store.as_strided((1, 2, N, d), (0, d, stride, 1), offset) for offset in (0, stride // 2)]
    for view, t in zip(far, (call.q, call.v)):
        view.copy_(t)
    check(Call(op, far[0], None, far[1], eps=1.0), output_gradient(call), draws=2)


@by_op
def test_more_pictures_than_a_grid_has_rows(op, device, backend):
    B, N = (70_000, 33) if GPU else (5, 7)
    call = make(op, device, N, B=B, H=2)
    few = torch.tensor([0, B // 2, B - 1], device=device)
    within_the_rule(call.run()[few], Call(op, call.q[few], None, call.v[few], eps=1.0))


def test_two_million_tokens(device, backend):
    call = make("linear", device, (1 << 21) + 5 if GPU else 100)
    out = call.run()
    for h in (0, call.q.shape[1] - 1):
        within_the_rule(out[:, [h]], Call("linear", call.q[:, [h]], None, call.v[:, [h]], eps=1.0))


@by_op
def test_a_device_that_is_not_the_current_one(op, backend, device):
    if GPU and torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU only")
    other = torch.device("cuda", torch.cuda.device_count() - 1) if GPU else torch.device("cpu")
    call = make(op, other, 33, tied=False)
    check(call, output_gradient(call), draws=2)
    assert call.run().device == other


@on_gpu
def test_launches_of_a_captured_call(device, backend):
    """One of a CUDA kernel, at most two of a forward pass of Triton's, at N = 197."""
    call = make("linear", device, 197).leaves()
    with torch.cuda.stream(timer.capture_stream()):
        out = call.run()
    torch.cuda.synchronize()
    dout = torch.ones_like(out)
    launches = _launches(lambda: [call.run()])
    launches_backward = _launches(lambda: torch.autograd.grad(out, [call.q, call.v], dout, retain_graph=True))
    assert launches <= {"triton": 2, "cuda": 1}[backend]
    assert backend != "cuda" or launches_backward == 1


def _launches(run) -> int:
    captured, _ = timer.capture(run, keep_graph=True)
    count = ctypes.c_size_t()
    raw = ctypes.c_void_p(captured.raw_cuda_graph())
    status = ctypes.CDLL("libcuda.so.1").cuGraphGetNodes(raw, None, ctypes.byref(count))
    assert status == 0, f"cuGraphGetNodes gives {status}"
    return count.value


@by_op
@pytest.mark.only_backend("triton")
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.one_in(2)
def test_packed_sequences_in_a_graph(op, tied, device, backend):
    """Captured once, and replayed where the sequences begin elsewhere: the CPU has read no offset."""
    lengths = ((700, 0, 33, 3), (1, 600, 0, 135)) if GPU else ((40, 0, 3), (1, 42, 0))
    call = packed_calls.make(
        op, device, tied=tied, lengths=lengths[0], key_lengths=lengths[0], dtype=torch.bfloat16, eps=1.0
    )
    cu_seqlens = packed_calls.offsets(lengths[0], device=device)
    dout, longest = call.output_gradient(), sum(lengths[0])

    def run():
        leaves = [t.detach().requires_grad_() for t in (call.q, call.k, call.v) if t is not None]
        q, k, v = (leaves[0], *leaves) if tied else leaves
        out = call.operator()(q, k, v, cu_seqlens, cu_seqlens, longest, longest, call.eps, call.rho)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout)]

    graph, found = timer.capture(run) if GPU else (None, run())
    cu_seqlens.copy_(packed_calls.offsets(lengths[1]))
    if GPU:
        graph.replay()
        torch.cuda.synchronize()
    else:
        found = run()
    call = replace(call, lengths=lengths[1], key_lengths=lengths[1])
    wanted = expected(call, dout, draws=2)
    for t, name in zip(found, wanted):
        factor, what = (FORWARD, "out") if name == "out" else (GRADIENT, f"d{name}")
        assert_within(t, wanted[name].truth, wanted[name].eager_error, factor, what)


@by_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.one_in(2)
def test_every_kernel_once(op, dtype, device, backend):
    """At small odd sizes: what the sanitizer watches."""
    # The last is more than a cluster holds: one grid.
    for N in (33, 700, *([30_001] if backend == "cuda" else [])) if GPU else (33,):
        for tied in (True, False):
            call = make(op, device, N, H=2, dtype=dtype, tied=tied)
            assert all(t.isfinite().all() for t in results(call, output_gradient(call)))
    if GPU:
        torch.cuda.synchronize()


POOLED = [((1, 197, 384), 6, 64), ((2, 4097, 1024), 64, 16), ((1, 1000, 130), 1, 200)] if GPU else [((1, 33, 24), 2, 5)]


def pooled(size, dtype, device, **form) -> dict:
    shape, heads, head = size
    with torch.device(device):
        return pooled_linear_calls.layer(dtype, tied=False, shape=shape, heads=heads, head=head, **form) | {"eps": 1e-2}


@pytest.mark.only_backend("triton")
@pytest.mark.parametrize("floor", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", POOLED, ids=str)
@pytest.mark.one_in(3)
def test_pooled_layer(size, dtype, floor, device, backend):
    for form in ({"masked": True}, {"norm": "", "bias": False}):
        call = pooled(size, dtype, device, **form) | {"score_floor": floor}
        with torch.device(device):
            pooled_linear_calls.check(call, pooled_linear_calls.output_gradient(call))


@pytest.mark.only_backend("triton")
@pytest.mark.parametrize("size", POOLED, ids=str)
def test_same_bits_of_the_pooled_layer(size, device, backend):
    call = pooled(size, torch.bfloat16, device)
    with torch.device(device):
        dout = pooled_linear_calls.output_gradient(call)

    def run():
        return pooled_linear_calls.results(pooled_linear_infsa, call, dout)

    first = run()
    for _ in range(25 if GPU else 1):
        assert all(torch.equal(t, first[name]) for name, t in run().items())


@pytest.mark.only_backend("triton")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.one_in(2)
def test_every_kernel_once_of_the_pooled_layer(dtype, device, backend):
    call = pooled(POOLED[0], dtype, device, masked=True) | {"score_floor": 0.3}
    with torch.device(device):
        dout = pooled_linear_calls.output_gradient(call)
    assert all(t.isfinite().all() for t in pooled_linear_calls.results(pooled_linear_infsa, call, dout).values())


@on_gpu
@pytest.mark.skipif(not Path(SANITIZER).exists(), reason="no compute-sanitizer here")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_the_sanitizer_finds_nothing(tool):
    command = [
        SANITIZER,
        "--tool",
        tool,
        "--error-exitcode",
        "9",
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
    ]
    # Without torch's cache of freed blocks every access beyond a tensor is one beyond an allocation.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    run = subprocess.run([*command, "-k", "test_every_kernel_once", __file__], cwd=ROOT, env=environment, capture_output=True,
                         text=True, timeout=300)  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:]


@on_gpu
@pytest.mark.parametrize("op", [*OPS, "pooled_linear"])
def test_our_kernels_run_here(op):
    """What a GPU check is worth: that none of them is left out."""
    reasons = infsa_kernels.explain_backend(op, torch.device("cuda"), torch.bfloat16, (1, 1, 16, 16))
    assert reasons["triton"] is None
    assert op != "linear" or reasons["cuda"] is None

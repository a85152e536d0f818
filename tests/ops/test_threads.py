"""Threads, processes and modes of the whole process: the same numbers under all of them."""

import os
import subprocess
import sys
import threading

import pytest
import torch
from helpers.calls import OPS
from helpers.framework_calls import make_call, tensor
from torch.testing import assert_close

import infsa_kernels

pytestmark = pytest.mark.alone

THREADS = 8


@pytest.fixture(params=OPS)
def op(request):
    return request.param


def large_call(op, device):
    """Long enough for the kernels to use several threads."""
    call = make_call(op, "head_rho", torch.float32, device)
    length = 3000 if op == "linear" else 300
    call.q, call.k, call.v = (
        tensor("token_major", 2, 3, length, 16, dtype=torch.float32, device=device) for _ in "qkv"
    )
    return call.leaves()


def results(call):
    out = call.run()
    return [out.detach(), *torch.autograd.grad(out.square().sum(), list(call.tensors().values()))]


def test_eight_threads_at_once(op, device, backend):
    call = large_call(op, device)
    expected = results(call)
    barrier = threading.Barrier(THREADS)
    failures = []

    def work():
        try:
            with infsa_kernels.backend(backend):
                barrier.wait()
                for _ in range(10):
                    for actual, wanted in zip(results(call), expected):
                        assert torch.equal(actual, wanted)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]


def test_backward_from_another_thread(op, device, backend):
    call = large_call(op, device)
    expected = results(call)[1:]
    out = call.run()
    thread = threading.Thread(target=lambda: out.square().sum().backward())
    thread.start()
    thread.join()
    for t, wanted in zip(call.tensors().values(), expected):
        assert torch.equal(t.grad, wanted)


def test_number_of_threads_changes_nothing(op, device, backend):
    """Bit for bit in the compiled kernels; torch's own sums, of which eager is made, promise no more than closeness."""
    call = large_call(op, device)
    before = torch.get_num_threads()
    try:
        expected = results(call)
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            exact = {"rtol": 0, "atol": 0} if backend == "cpu" else {}
            assert_close(results(call), expected, **exact)
    finally:
        torch.set_num_threads(before)


def test_deterministic_algorithms(op, device, backend):
    call = large_call(op, device)
    torch.use_deterministic_algorithms(True)
    expected = results(call)
    for _ in range(5):
        for actual, wanted in zip(results(call), expected):
            assert torch.equal(actual, wanted)


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_anomaly_detection(op, device, backend):
    call = make_call(op, "head_rho", torch.float32, device).leaves()
    with torch.autograd.detect_anomaly(check_nan=True):
        call.run().sum().backward()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="os.fork exists on POSIX only")
def test_fork_after_use():
    """A child forked after the operators ran with threads computes what its parent does, as data loaders need."""
    script = """
import os, warnings
import torch
warnings.simplefilter("ignore")
import infsa_kernels

q = torch.randn(2, 4, 2000, 16)
compute = lambda: [op(q, q, q) for op in (torch.ops.infsa.linear, torch.ops.infsa.pure)]
torch.set_num_threads(1)
expected = compute()
child = os.fork()
if child == 0:
    os._exit(0 if all(map(torch.equal, compute(), expected)) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)

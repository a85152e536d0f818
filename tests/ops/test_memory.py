"""The memory that the CPU kernels keep for their next call: whose it is, how much, and that it comes back."""

import os
import subprocess
import sys
import threading

import pytest
import torch
from helpers.backends import backends_of
from helpers.sweep import swept

import infsa_kernels
from infsa_kernels.memory import kept_memory, most_kept_memory

pytestmark = pytest.mark.skipif("cpu" not in backends_of("cpu"), reason="the extension was not built")

MB = 1 << 20
# Its gradients are 4 MB each.
SIZE = 1, 4, 4096, 64


def gradients(q):
    """dq and dv of the linear operator, of which each is a piece of its own."""
    q, v = q.detach().requires_grad_(), q.detach().flip(2).requires_grad_()
    return torch.autograd.grad(infsa_kernels.linear_infsa(q, q, v).sum(), (q, v))


@pytest.fixture
def q():
    infsa_kernels.release_memory()
    yield torch.randn(SIZE)
    infsa_kernels.release_memory()


def test_a_freed_piece_is_lent_again(q):
    first = gradients(q)
    places = {t.data_ptr() for t in first}
    assert kept_memory() == 0
    wanted = [t.clone() for t in first]
    del first
    assert kept_memory() == 2 * 4 * MB
    again = gradients(q)
    assert {t.data_ptr() for t in again} == places
    assert kept_memory() == 0
    assert all(torch.equal(a, b) for a, b in zip(again, wanted))


def test_a_piece_that_a_view_still_needs_is_not(q):
    views = [t[0, 1, 7:9] for t in gradients(q)]
    before = [t.clone() for t in views]
    gradients(q)
    gradients(q * 3)
    assert all(torch.equal(a, b) for a, b in zip(views, before))
    del views
    assert kept_memory() == 4 * 4 * MB


def test_small_results_are_torchs_own(q):
    gradients(q[:, :1])
    assert kept_memory() == 0


def test_pieces_are_big_enough_and_not_a_quarter_too_big(q):
    gradients(q)
    gradients(q.repeat(2, 1, 1, 1))  # 8 MB each
    assert kept_memory() == 2 * 4 * MB + 2 * 8 * MB
    smaller = gradients(q[:, :, :3000])  # under 4 MB: none of them
    assert kept_memory() == 2 * 4 * MB + 2 * 8 * MB
    larger = gradients(torch.randn(1, 7, 4096, 64))  # 7 MB: those of 8
    assert kept_memory() == 2 * 4 * MB
    assert torch.stack([t.isfinite().all() for t in (*smaller, *larger)]).all()


def test_release_gives_everything_back(q):
    gradients(q)
    assert infsa_kernels.release_memory() == 2 * 4 * MB
    assert infsa_kernels.release_memory() == kept_memory() == 0


def test_fresh_and_lent_memory_is_filled_where_torch_is_asked_to(q):
    """The tests find outputs that a kernel forgets by this."""
    torch.ops.infsa.pure(q, q, q)
    assert kept_memory() >= 4 * MB
    masked = torch.ones(1, 4096, dtype=torch.bool)
    out = infsa_kernels.pure_infsa(q, q, q, key_padding_mask=masked, query_padding_mask=masked)
    assert not out.any()


def test_threads_lend_to_each_other(q):
    wanted = [t.clone() for t in gradients(q)]
    wrong = []

    def work():
        for _ in range(5):
            wrong.extend(1 for a, b in zip(gradients(q), wanted) if not torch.equal(a, b))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert kept_memory() <= most_kept_memory()


SCRIPT = """
import os, resource, sys
import torch, infsa_kernels
from infsa_kernels.memory import kept_memory, most_kept_memory
torch.set_num_threads(1)
MB = 1 << 20

def gradients(megabytes):
    q, v = (torch.randn(1, megabytes, 4096, 64, requires_grad=True) for _ in "qv")
    return torch.autograd.grad(infsa_kernels.linear_infsa(q, q, v).sum(), (q, v))

"""


def run(script, **environment):
    command = [sys.executable, "-c", SCRIPT + script]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)


@pytest.mark.parametrize("most, kept", [("0", 0), ("10", 8), swept(("30", 28))])
def test_the_environment_bounds_what_is_kept(most, kept):
    """Two pieces of 4 MB, then two of 12: the oldest go first, and what is above the bound by itself is never kept."""
    done = run(
        "gradients(4); gradients(12); print(kept_memory() / MB, most_kept_memory() / MB)", INFSA_CPU_POOL_MB=most
    )
    assert done.stdout.split() == [str(float(kept)), str(float(most))], done.stderr


@pytest.mark.parametrize("most", ["1GB", swept("-1")])
def test_a_bound_that_is_none(most):
    done = run("gradients(4)", INFSA_CPU_POOL_MB=most)
    assert done.returncode
    assert (
        f"ValueError: INFSA_CPU_POOL_MB is '{most}', expected the megabytes that may be kept, 0 for none" in done.stderr
    )


def test_kept_memory_is_no_reason_to_run_out_of_memory():
    script = """
gradients(100)
assert kept_memory() == 200 * MB
q = torch.randn(1, 200, 4096, 64, requires_grad=True)
held = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize")) << 10
most = held + 100 * MB  # of the 200 that the gradient takes
resource.setrlimit(resource.RLIMIT_AS, (most, most))
torch.autograd.grad(infsa_kernels.linear_infsa(q, q, q.detach()).sum(), q)
"""
    done = run(script, INFSA_CPU_POOL_MB="1000")
    assert done.returncode == 0, done.stderr


def test_a_fork_has_its_own():
    script = """
gradients(4)
child = os.fork()
torch.manual_seed(child == 0)
mine = gradients(4)  # in the pieces that both have kept
if child == 0:
    os._exit(kept_memory())
before = [t.clone() for t in mine]
code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
assert all(torch.equal(a, b) for a, b in zip(mine, before))
sys.exit(code)
"""
    done = run(script)
    assert done.returncode == 0, done.stderr

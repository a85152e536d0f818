"""The CPU operators have work for the threads of large machines, none of which runs these tests: their tasks are counted, and a
model of equal threads runs them (docs/pure.md and docs/pooled_linear.md, Many cores)."""

import pytest
import torch
from helpers.backends import backends_of
from helpers.cpu_tasks import busy_share, loops_of, tasks_of

pytestmark = pytest.mark.skipif("cpu" not in backends_of("cpu"), reason="the extension was not built")

EPS, RHO = 1e-6, 1.0
NONE = None, None, None  # head_rho and masks


def pure(ops, backward: bool, tied: bool):
    x, norm = torch.zeros(1, 16, 4096, 64), torch.ones(1, 16)
    k = None if tied else torch.zeros_like(x)
    if backward:
        ops.pure_bwd(x, x, k, x, x, norm, EPS, RHO, *NONE, [True, not tied, True, False])
    else:
        ops.pure_fwd(x, k, x, EPS, RHO, *NONE)


def linear(ops, backward: bool, token_major: bool):
    x = torch.zeros(1, 4096, 64, 16).transpose(1, 2) if token_major else torch.zeros(1, 64, 4096, 16)
    context, sums = torch.zeros(1, 64, 16), torch.ones(1, 64)
    if backward:
        ops.linear_bwd(context, x, x, x, context, context, sums, sums, EPS, RHO, *NONE, [True, True, True, False])
    else:
        ops.linear_fwd(x, x, x, EPS, RHO, *NONE)


def central_query(ops, backward: bool):
    x, weight, query, energy = (
        torch.zeros(1, 4096, 1024),
        torch.zeros(16, 64, 1024),
        torch.zeros(1, 16, 64),
        torch.ones(1, 16),
    )
    if backward:
        ops.central_query_bwd(query, x, weight, None, query, energy, None, EPS, None, [True, True, False])
    else:
        ops.central_query_fwd(x, weight, None, None, EPS, None)


def score_pool(ops, backward: bool):
    x, keys, numbers = torch.zeros(1, 4096, 1024), torch.zeros(1, 16, 1024), torch.ones(1, 16)
    if backward:
        ops.score_pool_bwd(keys, numbers, x, keys, None, keys, numbers, None, EPS, None, [True, True, False])
    else:
        ops.score_pool_fwd(x, keys, None, None, EPS, None)


# call, its arguments, kernel calls of its largest loop, and the share of the time that 64 threads are busy
CASES = {
    "pure, tied": (pure, (False, True), 576, 0.8),
    "pure": (pure, (False, False), 352, 0.88),
    "pure's gradients, tied": (pure, (True, True), 4800, 0.93),
    "pure's gradients": (pure, (True, False), 4000, 0.78),
    "linear": (linear, (False, False), 128, 0.99),
    "linear, token-major": (linear, (False, True), 128, 0.99),
    "linear's gradients": (linear, (True, False), 128, 0.99),
    "linear's gradients, token-major": (linear, (True, True), 128, 0.99),
    "central query": (central_query, (False,), 240, 0.88),
    "central query's gradients": (central_query, (True,), 640, 0.88),
    # Little work, of sums that are large (docs/pooled_linear.md).
    "score pool": (score_pool, (False,), 15, 0.22),
    "score pool's gradients": (score_pool, (True,), 15, 0.22),
}


@pytest.mark.parametrize("name", CASES)
def test_64_threads_are_busy(name):
    function, arguments, least_tasks, least_share = CASES[name]
    tasks = tasks_of(lambda ops: function(ops, *arguments), 64)
    assert max(map(len, loops_of(tasks))) >= least_tasks
    assert busy_share(tasks, 64) >= least_share


@pytest.mark.parametrize("name", CASES)
def test_the_work_is_the_same_for_any_number_of_threads(name):
    function, arguments, *_ = CASES[name]
    few, many = (tasks_of(lambda ops: function(ops, *arguments), threads) for threads in (2, 64))
    assert sum(task.work for task in few) == pytest.approx(sum(task.work for task in many), rel=0.05)

"""Linear-InfSA with a floor under its scores in Triton: the kernels of linear.py, with what the floor adds."""

from ..eager import linear_floor as eager
from . import linear, linear_backward
from .launch import planned


@planned
def forward(q, k, v, *numbers_and_more):
    if 0 in (*q.shape, *v.shape):
        return eager.forward
    run = linear.plan_forward(q, k, v, *numbers_and_more)
    return lambda q, k, v, eps, score_floor, rho, *more: run(q, k, v, *more)


@planned
def backward(
    dout, q, k, v, context, central_query, energy_sum, score_sum, absolute_sum, value_mean, *numbers_and_more
):  # fmt: skip
    if 0 in (*q.shape, *v.shape):
        return eager.backward
    run = linear_backward.plan_backward(dout, q, k, v, *numbers_and_more)

    def run_with_floor(*arguments):
        run(*arguments[:10], *arguments[13:])  # all but eps, score_floor and rho

    return run_with_floor

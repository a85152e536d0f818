"""Linear-InfSA with a floor under its scores in Triton: the kernels of linear.py, with what the floor adds."""

from ..eager import linear_floor as eager
from . import linear, linear_backward


def forward(q, k, v, *numbers_and_masks):
    run = eager.forward if 0 in (*q.shape, *v.shape) else linear.launch_forward
    return run(q, k, v, *numbers_and_masks)


def backward(dout, q, k, v, *saved_and_more):
    run = eager.backward if 0 in (*q.shape, *v.shape) else linear_backward.launch_backward
    run(dout, q, k, v, *saved_and_more)

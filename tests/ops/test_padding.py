"""Padding costs next to nothing: the time of a masked call is that of its real tokens, as ratios in one run, never a time."""

import timeit

import pytest
import torch
from helpers.calls import Call

pytestmark = pytest.mark.alone

# Of the tokens at the end of every sequence.
PADDED = (0.0, 0.25, 0.5, 0.75)

# What a call may take beyond its share of real tokens, of the time of a call without padding: reading the mask, zeros in
# outputs and gradients, and noise. Measured on a quiet CPU: up to 0.1.
SLACK = 0.2

SIZES = {"linear": (4, 8, 2048, 64), "pure": (2, 2, 768, 64)}  # B, H, N, d


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(False)  # which fills memory
    yield
    torch.set_num_threads(before)


def least(functions, rounds=25) -> list[float]:
    """The least of many turns for each, all in turn."""
    turns = [[timeit.timeit(function, number=1) for function in functions] for _ in range(rounds)]
    return [min(times) for times in zip(*turns)]


# Linear's backward pass writes the zeros of padding, in as many bytes as gradients: it is not proportional.
@pytest.mark.parametrize(("op", "direction"), [("linear", "forward"), ("pure", "forward"), ("pure", "backward")])
@pytest.mark.parametrize("layout", ["head_major", "token_major"])
@pytest.mark.only_backend("cpu")
def test_time_is_that_of_real_tokens(op, direction, layout, one_thread, device, backend):
    B, H, N, d = SIZES[op]
    shape = (B, N, H, d) if layout == "token_major" else (B, H, N, d)
    q, k, v = (torch.randn(shape) for _ in "qkv")
    if layout == "token_major":
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))

    def action(padded):
        mask = (torch.arange(N) >= N * (1 - padded)).expand(B, N).contiguous()
        call = Call(op, q, k, v, key_padding_mask=mask, query_padding_mask=mask)
        if direction == "forward":
            return call.run
        call = call.leaves()
        out, leaves = call.run(), list(call.tensors().values())
        dout = torch.randn_like(out)
        return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)

    whole, *rest = least([action(padded) for padded in PADDED])
    for padded, seconds in zip(PADDED[1:], rest):
        share = (1 - padded) ** (1 if op == "linear" else 2)
        assert seconds / whole < share + SLACK, f"{padded:.0%} padding: {seconds / whole:.2f} of the time without"

"""`python -m bench.varlen`: packed sequences beside the same tokens as a padded batch with masks, and beside a loop, in turn.

First the gate: packed equals the loop over sequences in float64, by the tests' rule. Then forward and forward + backward of both
operators (Linear's contexts) at D = 1024, tied, for batches of which a half and three quarters are padding, and for many short
sequences.
"""

import argparse
import statistics
import time
from itertools import accumulate

import torch
from torch import Tensor

from infsa_kernels import reference
from infsa_kernels.testing import FORWARD, assert_within, error_of_eager

from . import machine

REFERENCE = {"linear": reference.linear, "pure": reference.pure}
HEADS = {"linear": 64, "pure": 16}
DIM, EPS, RHO = 1024, 1e-6, 0.95

# Lengths of the sequences; the longest is that of the padded batch.
CASES = {
    "no padding": {"linear": [4096] * 4, "pure": [768] * 4},
    "50% padding": {"linear": [4096, 2048, 1536, 512], "pure": [768, 384, 256, 128]},
    "75% padding": {"linear": [4096, *[512] * 7, 512], "pure": [1024, *[128] * 8]},
    "short sequences": {"linear": list(range(16, 272)), "pure": list(range(16, 272, 4))},
}


class Tokens:
    """One draw of packed tokens (N, H, d), and the same as a padded batch (B, H, L, d) that is token-major."""

    def __init__(self, op: str, lengths: list[int]):
        self.op, heads = op, HEADS[op]
        self.dense, self.varlen = getattr(torch.ops.infsa, op), getattr(torch.ops.infsa, f"{op}_varlen")
        self.lengths, self.longest = lengths, max(lengths)
        random = torch.Generator().manual_seed(0)
        self.q, self.v = (torch.randn(sum(lengths), heads, DIM // heads, generator=random) for _ in range(2))
        self.cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        self.padding = torch.arange(self.longest) >= torch.tensor(lengths)[:, None]

    def packed(self, q: Tensor, v: Tensor) -> Tensor:
        return self.varlen(q, q, v, self.cu_seqlens, self.cu_seqlens, self.longest, self.longest, EPS, RHO)

    def masked(self, q: Tensor, v: Tensor) -> Tensor:
        return self.dense(q, q, v, EPS, RHO, self.padding, self.padding)

    def loop(self, q: Tensor, v: Tensor) -> Tensor:
        return self.each(q, v, lambda q, v: self.dense(q, q, v, EPS, RHO))

    def each(self, q: Tensor, v: Tensor, function) -> Tensor:
        """A dense function of one sequence after another."""
        pairs = zip(q.split(self.lengths), v.split(self.lengths))
        found = [function(*(t.transpose(0, 1)[None] for t in pair)) for pair in pairs]
        return torch.cat([out[0].transpose(0, 1) if self.op == "pure" else out for out in found])

    def batch(self, t: Tensor) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(t.split(self.lengths), batch_first=True).transpose(1, 2)

    def actions(self, train: bool) -> dict:
        def action(function, *tensors):
            q, v = (t.detach().requires_grad_(train) for t in tensors)
            dout = torch.randn_like(function(q, v))

            def run():
                out = function(q, v)
                if train:
                    torch.autograd.grad(out, (q, v), dout)

            return run

        padded = self.batch(self.q), self.batch(self.v)
        packed = self.q, self.v
        return {
            "packed": action(self.packed, *packed),
            "masked": action(self.masked, *padded),
            "loop": action(self.loop, *packed),
        }


def gate(op: str, lengths: list[int]) -> None:
    tokens = Tokens(op, lengths)

    def evaluate(dtype):
        q, v = tokens.q.to(dtype), tokens.v.to(dtype)
        return tokens.each(q, v, lambda q, v: REFERENCE[op](q, q, v, RHO, EPS))

    truth = evaluate(torch.float64)
    eager = error_of_eager(evaluate(torch.float32), truth, torch.float32)
    assert_within(tokens.packed(tokens.q, tokens.v), truth, eager, FORWARD, f"{op} packed")


def line(op: str, case: str, lengths: list[int], train: bool, turns: int) -> str:
    tokens = Tokens(op, lengths)
    actions = tokens.actions(train)
    times = {name: [] for name in actions}
    for turn in range(turns + 1):
        for name, run in actions.items():
            begin = time.perf_counter()
            run()
            if turn:  # the first warms up
                times[name].append(time.perf_counter() - begin)
    packed = statistics.median(times["packed"])
    ratios = {name: statistics.median(times[name]) / packed for name in ("masked", "loop")}
    what = "forward + backward" if train else "forward"
    return (
        f"{op:6}  {case:15}  {what:18}  {1e3 * packed:8.2f} ms packed, masked {ratios['masked']:.2f} x, "
        f"loop {ratios['loop']:.2f} x"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.varlen", description=__doc__.split("\n")[0])
    parser.add_argument("--turns", type=int, default=9)
    turns = parser.parse_args().turns
    load = machine.OtherLoad()
    print(machine.describe(machine.environment(torch.device("cpu"))))
    for op in REFERENCE:
        gate(op, [100, 0, 37, 1])
        for case, lengths in CASES.items():
            for train in (False, True):
                print(line(op, case, lengths[op], train, turns), flush=True)
    share = load.share()
    print(f"others took {share:.0%} of the processor" if share is not None else "what others took is not known")


if __name__ == "__main__":
    main()

"""Operators put together from their parts (ops/linear_steps.py, ops/pure_blocks.py), for tokens of which others have the rest."""

import itertools
from dataclasses import replace

import torch

from helpers.calls import accumulation, expected
from infsa_kernels.ops.linear_steps import choose_steps, floored_mean, key_count, mean
from infsa_kernels.ops.pure_blocks import choose_blocks
from infsa_kernels.testing import FORWARD, GRADIENT, assert_within


def _run(op, *arguments):
    return op(*arguments)


def parts(t, dim=2):
    """Three parts of the tokens, of which the second has none."""
    if t is None:
        return [None] * 3
    first = 2 * t.shape[dim] // 5
    return t.split([first, 0, t.shape[dim] - first], dim)


def linear_in_parts(call, dcontext, backend, record=_run):
    """z / rho and the gradients for a dcontext, from three parts of the tokens."""
    acc, tied = accumulation(call.q.dtype), call.k is None
    qs, ks, vs = parts(call.q), parts(call.q if tied else call.k), parts(call.v)
    query_masks, key_masks = parts(call.query_padding_mask, 1), parts(call.key_padding_mask, 1)
    steps = choose_steps(call.q, backend)
    sums = sum(record(steps.queries_fwd, q, m) for q, m in zip(qs, query_masks))
    central_query, energy_sum = mean(sums, call.eps, acc)
    floor = [call.score_floor] if call.score_floor else []
    keys_fwd, keys_bwd = (steps.keys_floor_fwd, steps.keys_floor_bwd) if floor else (steps.keys_fwd, steps.keys_bwd)
    sums = sum(record(keys_fwd, k, v, central_query, m) for k, v, m in zip(ks, vs, key_masks))
    if floor:
        sums = torch.cat([sums, sum(key_count(v, m) for v, m in zip(vs, key_masks))], -1)
        context, saved = floored_mean(sums, *floor, call.eps, acc)
    else:
        context, *saved = mean(sums, call.eps, acc)
    wanted = [not tied, True, True, tied]
    back = [
        record(keys_bwd, dcontext, k, v, context, central_query, *saved, call.eps, *floor, m, wanted)
        for k, v, m in zip(ks, vs, key_masks)
    ]
    dcentral = sum(dqbar for _, _, dqbar, *_ in back)
    dq = [
        record(
            steps.queries_bwd, dcentral, *(dscores if tied else (None, None)), q, central_query, energy_sum, call.eps, m
        )
        for q, m, (*_, dt, unit) in zip(qs, query_masks, back)
        for dscores in [(dt, unit)]
    ]
    gradients = {"q": torch.cat(dq, 2), "v": torch.cat([dv for _, dv, *_ in back], 2)}
    return context, gradients if tied else gradients | {"k": torch.cat([dk for dk, *_ in back], 2)}


def pure_in_blocks(call, dout, backend, record=_run):
    """The output before rho and the gradients for a dout, from blocks of two parts of the queries and three of the keys."""
    tied = call.k is None
    blocks, eps = choose_blocks(call.q, backend), call.eps
    qs, douts, query_masks = (
        [None] * 2 if t is None else t.split([3, t.shape[dim] - 3], dim)
        for t, dim in ((call.q, 2), (dout, 2), (call.query_padding_mask, 1))
    )
    ks, vs, key_masks = parts(call.q if tied else call.k), parts(call.v), parts(call.key_padding_mask, 1)
    found = [
        [record(blocks.fwd, q, k, v, eps, key_mask, mask) for k, v, key_mask in zip(ks, vs, key_masks)]
        for q, mask in zip(qs, query_masks)
    ]
    norm = sum(n.double().square() for row in found for _, n in row).sqrt()
    out = [sum(o * ((n + eps) / (norm + eps))[..., None, None] for o, n in row) for row in found]
    dout_out = sum((o * d).sum((-2, -1), dtype=torch.float64) for o, d in zip(out, douts))
    totals = [[0, 0, 0, 0] for _ in range(5)]
    norm = norm.to(accumulation(call.q.dtype))
    rho = torch.ones_like(norm)
    for (i, (q, d, mask)), (j, (k, v, key_mask)) in itertools.product(
        enumerate(zip(qs, douts, query_masks)), enumerate(zip(ks, vs, key_masks))
    ):
        dq, dk, dv, drho = record(blocks.bwd, d, q, k, v, dout_out, norm, eps, 1.0, rho, key_mask, mask, [True] * 4)
        assert dq.dtype == dk.dtype == dv.dtype == norm.dtype
        totals[i][0] = totals[i][0] + dq
        totals[2 + j][1], totals[2 + j][2] = totals[2 + j][1] + dk, totals[2 + j][2] + dv
        totals[0][3] = totals[0][3] + drho
    dq = torch.cat([t[0] for t in totals[:2]], 2)
    dk, dv = (torch.cat([t[n] for t in totals[2:]], 2) for n in (1, 2))
    gradients = {"q": dq + dk, "v": dv} if tied else {"q": dq, "k": dk, "v": dv}
    return torch.cat(out, 2).to(norm.dtype), gradients, totals[0][3]


def check_in_parts(call, backend, what=""):
    """The parts of a call with a rho of 1, put together, by the rule."""
    dtype, linear = call.q.dtype, call.op == "linear"
    call = replace(call, rho=torch.ones(call.q.shape[1], device=call.q.device))
    rows = [] if linear else [call.q.shape[2]]
    dout = torch.randn(*call.q.shape[:2], *rows, call.v.shape[3], device=call.q.device).to(dtype)
    if call.query_padding_mask is not None and not linear:
        dout.masked_fill_(call.query_padding_mask[:, None, :, None], 0)
    wanted = expected(call, dout)
    if linear:
        out, gradients = linear_in_parts(call, dout.to(accumulation(dtype)), backend)
    else:
        out, gradients, drho = pure_in_blocks(call, dout, backend)
        assert_within(drho.sum(0).float(), wanted["rho"].truth, wanted["rho"].eager_error, GRADIENT, f"drho {what}")
    assert out.dtype == accumulation(dtype)
    assert_within(out.to(dtype), wanted["out"].truth, wanted["out"].eager_error, FORWARD, f"out {what}")
    for name, gradient in gradients.items():
        assert gradient.dtype == (dtype if linear else accumulation(dtype))
        gradient = gradient.to(dtype)
        assert_within(gradient, wanted[name].truth, wanted[name].eager_error, GRADIENT, f"d{name} {what}")

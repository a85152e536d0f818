"""Results worked out by hand for one, two and three tokens, values and gradients.

The sizes are such that s = 1/sqrt(d) is 1 or 1/2, and eps is large: every number is a small fraction, and eps counts.
"""

from dataclasses import dataclass

import pytest
import torch
from helpers.calls import Call
from torch import Tensor


@dataclass
class Row:
    call: Call
    dout: Tensor
    out: Tensor
    gradients: dict[str, Tensor]


def tokens(*rows) -> Tensor:
    """(1, 1, tokens, channels); a plain number is a token of one channel."""
    return torch.tensor([[r] if isinstance(r, (int, float)) else r for r in rows], dtype=torch.float64)[None, None]


def number(*x) -> Tensor:
    return torch.tensor(x, dtype=torch.float64)


def context(*x) -> Tensor:
    return number(*x)[None, None]


TABLES = {
    # e = 1, E = e + eps = 2, w = 1/2, qbar = 1/2; r = qbar k = 1, R = 2, a = 1/2; z = 6/2 = 3.
    # dv = a = 1/2; dr = (6 - 3)/R = 3/2; dk = dr qbar = 3/4; dqbar = dr k = 3;
    # dq = w dqbar + (q - qbar) dqbar / E = 3/2 + 3/4; drho = 3.
    "linear, one token": Row(
        Call("linear", tokens(1), tokens(2), tokens(6), rho=number(1), eps=1.0),
        context(1),
        context(3),
        {"q": tokens(9 / 4), "k": tokens(3 / 4), "v": tokens(1 / 2), "rho": number(3)},
    ),
    # The same, K = Q: r = qbar q = 1/2, R = 3/2, a = 1/3; z = 6/3 = 2.
    # dv = 1/3; dr = (6 - 2)/R = 8/3; as key: dr qbar = 4/3; dqbar = dr q = 8/3; as query: 8/6 + (1/2)(8/3)/2 = 2.
    "linear, one token, tied": Row(
        Call("linear", tokens(1), None, tokens(6), rho=number(1), eps=1.0),
        context(1),
        context(2),
        {"q": tokens(10 / 3), "v": tokens(1 / 3), "rho": number(2)},
    ),
    # e = (1, 3), E = 8, w = (1/8, 3/8), qbar = 1/8 - 9/8 = -1; scores (2, -1): r = (2, 0), R = 6, a = (1/3, 0);
    # sum a v = 3, z = 2 * 3. dv = 2 a; dr_1 = 2 (9 - 3)/6 = 2, and 0 where the score is negative; dk = dr qbar;
    # dqbar = 2 * -2 = -4; dq_1 = -4/8 + (1 + 1)(-4)/8 = -3/2; dq_2 = -12/8 + (-3 + 1)(-4)/8 * sign(-3) = -5/2.
    "linear, two tokens, rho 2": Row(
        Call("linear", tokens(1, -3), tokens(-2, 1), tokens(9, 5), rho=number(2), eps=4.0),
        context(1),
        context(6),
        {"q": tokens(-3 / 2, -5 / 2), "k": tokens(-2, 0), "v": tokens(2 / 3, 0), "rho": number(3)},
    ),
    # s = 1/2: u = (1,0,0,0), (0,2,0,0), 0; e = (1, 2, 0), E = 4, w = (1/4, 1/2, 0), qbar = (1/4, 1, 0, 0);
    # r = (1/4, 2, 0), R = 13/4, a = (1/13, 8/13, 0); z = 1 + 16 = 17. dr = (13 - 17, 26 - 17)/R = (-16/13, 36/13), and 0
    # for the third, whose score is 0. dqbar = -16/13 u_1 + 36/13 u_2 = (-16/13, 72/13, 0, 0).
    # As query: du_1 = dqbar/4 + ((3/4, -1).dqbar / 4) u_1 = (-4/13, 18/13) + (-21/13, 0) = (-25/13, 18/13);
    #           du_2 = dqbar/2 + ((-1/4, 1).dqbar / 4) u_2/2 = (-8/13, 36/13) + (0, 19/13) = (-8/13, 55/13); du_3 = 0.
    # As key: dr qbar = (-4/13, -16/13), (9/13, 36/13), 0. Together, times s: (-29/26, 1/13), (1/26, 7/2), 0.
    "linear, three tokens, tied, one zero": Row(
        Call(
            "linear", tokens([2, 0, 0, 0], [0, 4, 0, 0], [0, 0, 0, 0]), None, tokens(13, 26, 39), rho=number(1), eps=1.0
        ),
        context(1),
        context(17),
        {
            "q": tokens([-29 / 26, 1 / 13, 0, 0], [1 / 26, 7 / 2, 0, 0], [0, 0, 0, 0]),
            "v": tokens(1 / 13, 8 / 13, 0),
            "rho": number(17),
        },
    ),
    # P = F = 3, F + eps = 4; O = 3 * 8/4 = 6. dv = 3/4; c = 6 / (3 * 4) = 1/2; dP = 8/4 - 3 c = 1/2.
    "pure, one token": Row(
        Call("pure", tokens(1), tokens(3), tokens(8), rho=number(1), eps=1.0),
        tokens(1),
        tokens(6),
        {"q": tokens(3 / 2), "k": tokens(1 / 2), "v": tokens(3 / 4), "rho": number(6)},
    ),
    # P = q^2 = 4, F + eps = 8; O = 4 * 6/8 = 3. dv = 1/2; c = 3 / (4 * 8) = 3/32; dP = 6/8 - 4 c = 3/8; dq = 2 * 2 dP.
    "pure, one token, tied": Row(
        Call("pure", tokens(2), None, tokens(6), rho=number(1), eps=4.0),
        tokens(1),
        tokens(3),
        {"q": tokens(3 / 2), "v": tokens(1 / 2), "rho": number(3)},
    ),
    # P = [[3, 0], [0, 4]], F = 5, F + eps = 10; P v = (15, 40), O = 2 P v / 10 = (3, 8); c = 11 / (5 * 10).
    # dP_11 = 2 * 5/10 - 3 c = 17/50, dP_22 = 2 * 10/10 - 4 c = 56/50; dv = 2 (3, 4)/10; drho = (3 + 8)/2.
    "pure, two tokens, rho 2": Row(
        Call("pure", tokens(1, -1), tokens(3, -4), tokens(5, 10), rho=number(2), eps=5.0),
        tokens(1, 1),
        tokens(3, 8),
        {"q": tokens(1.02, -4.48), "k": tokens(0.34, -1.12), "v": tokens(0.6, 0.8), "rho": number(5.5)},
    ),
    # s = 1/2: u = x, x, y with x = (1,1,1,0), y = (-2,-2,0,0), x.x = 3, x.y = -4, y.y = 8:
    # P = [[3,3,0],[3,3,0],[0,0,8]], F = 10, F + eps = 20; O = (120, 120, 40)/20.
    # c = <dO, O> / (10 * 20) = (6 + 12 + 8)/200 = 0.13.
    # dP = dO_i v_j / 20 - c P: [[0.11, 1.11, 0], [0.61, 2.61, 0], [0, 0, -0.04]].
    # du_1 = (0.11 + 1.11 + 0.11 + 0.61) x = 1.94 x, du_2 = (0.61 + 2.61 + 1.11 + 2.61) x = 6.94 x, du_3 = -0.08 y;
    # dq = du / 2. dv = P^T dO / 20 = (9, 9, 32)/20; drho = 26.
    "pure, three tokens, tied": Row(
        Call(
            "pure", tokens([2, 2, 2, 0], [2, 2, 2, 0], [-4, -4, 0, 0]), None, tokens(10, 30, 5), rho=number(1), eps=10.0
        ),
        tokens(1, 2, 4),
        tokens(6, 6, 2),
        {
            "q": tokens([0.97, 0.97, 0.97, 0], [3.47, 3.47, 3.47, 0], [0.08, 0.08, 0, 0]),
            "v": tokens(0.45, 0.45, 1.6),
            "rho": number(26),
        },
    ),
}

# Every number above has few enough digits that a dtype's own rounding is all that may differ.
PRECISION = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.fixture(params=TABLES.values(), ids=list(TABLES))
def row(request):
    return request.param


def same(actual: Tensor, wanted: Tensor, dtype: torch.dtype):
    tolerance = PRECISION[dtype]
    torch.testing.assert_close(actual.double(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", PRECISION, ids=str)
def test_tables(row, dtype, device, backend):
    call = move(row.call, device, dtype)
    same(call.run().cpu(), row.out, dtype)
    gradients = call.gradients(row.dout.to(device, dtype))
    assert gradients.keys() == row.gradients.keys()
    for name, gradient in gradients.items():
        same(gradient.cpu(), row.gradients[name], dtype)


def test_the_reference_agrees(row):
    same(row.call.reference(torch.float64), row.out, torch.float64)
    for name, gradient in row.call.reference_gradients(row.dout, torch.float64).items():
        same(gradient, row.gradients[name], torch.float64)


def test_tables_with_ignored_tokens(row, device, backend):
    """One token more, of NaN, in front, and ignored."""
    call = row.call

    def padded(t, value):
        return None if t is None else torch.cat([torch.full_like(t[:, :, :1], value), t], dim=2).to(device)

    def first(t):
        return (torch.arange(t.shape[2] + 1, device=device) == 0)[None]

    q, k, v = (padded(t, torch.nan) for t in call.qkv().values())
    masked = Call(call.op, q, k, v, call.rho.to(device), call.eps, first(call.v), first(call.q))
    out, dout, gradients = row.out, row.dout.to(device), {**row.gradients}
    if call.op == "pure":
        out, dout = padded(out, 0), padded(dout, torch.nan)
    for name in gradients.keys() - {"rho"}:
        gradients[name] = padded(gradients[name], 0)
    same(masked.run().cpu(), out.cpu(), torch.float64)
    for name, gradient in masked.gradients(dout).items():
        same(gradient.cpu(), gradients[name].cpu(), torch.float64)


def move(call: Call, device: str, dtype: torch.dtype) -> Call:
    q, k, v = (None if t is None else t.to(device, dtype) for t in call.qkv().values())
    return Call(call.op, q, k, v, call.rho.to(device), call.eps)

"""The pooled layer on Triton's kernels, through the public operator, in Triton's interpreter."""

import pytest
import torch
from helpers.interpreter import needs_interpreter
from helpers.pooled_linear_calls import check, layer, output_gradient, results
from helpers.sweep import some

import infsa_kernels
from infsa_kernels import pooled_linear_infsa

pytest.importorskip("triton")

pytestmark = [pytest.mark.interpreter, needs_interpreter]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMS = {
    "tied": dict(tied=True, norm="affine", rho="heads"),
    "tied masked": dict(tied=True, norm="affine", rho="heads", masked=True),
    "untied": dict(tied=False, norm="plain", rho="scalar"),
    "no bias": dict(tied=True, bias=False, norm="", masked=True, rho="number"),
    "untied, no bias": dict(tied=False, bias=False, norm="affine", rho="one"),
}


@pytest.fixture(autouse=True)
def triton(monkeypatch):
    """The backend in force, with few programs, so that each has several tiles, and backward in several blocks of tokens."""
    from infsa_kernels.triton import central_query, configs, score_pool

    monkeypatch.setattr(configs, "multiprocessors", lambda device: 2)
    monkeypatch.setattr(central_query, "BLOCK_TOKENS", 280)
    monkeypatch.setattr(score_pool, "BLOCK_BYTES", 1 << 14)
    with infsa_kernels.backend("triton"):
        yield


def with_nan(call: dict) -> dict:
    """The same with NaN in the tokens that are removed."""
    removed = call["padding_mask"][..., None]
    return {**call, "x": call["x"].detach().masked_fill(removed, torch.nan).requires_grad_()}


@pytest.mark.parametrize("floor", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.one_in(4)
def test_forms(form, dtype, floor):
    call = layer(dtype, **FORMS[form], shape=(2, 150, 24)) | {"eps": 1e-2, "score_floor": floor}
    dout = output_gradient(call)
    if "padding_mask" in call:
        call["padding_mask"][1, 70:] = True
        found, poisoned = (results(pooled_linear_infsa, c, dout) for c in (call, with_nan(call)))
        assert all(torch.equal(poisoned[name], t) for name, t in found.items())
        assert (found["dx"][call["padding_mask"]] == 0).all()
    check(call, dout)


# (B, N, D), heads, head_dim, value head_dim, output: single tokens, primes, tiles and one more, more heads than a program takes.
SIZES = [
    ((1, 1, 1), 1, 1, 1, 1),
    ((1, 197, 48), 3, 16, 16, 48),
    ((3, 5, 7), 1, 7, 3, 2),
    ((1, 129, 33), 2, 31, 9, 65),
    ((2, 67, 130), 13, 3, 5, 8),
    ((1, 40, 20), 33, 4, 1, 7),
    ((1, 33, 24), 2, 130, 4, 5),
]


@pytest.mark.parametrize("dtype", some(DTYPES, torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.one_in(2)
def test_sizes(size, dtype):
    shape, heads, head, v_head, out = size
    call = layer(dtype, tied=False, shape=shape, heads=heads, head=head, v_head=v_head, out=out) | {"eps": 1e-2}
    check(call, output_gradient(call))


STRIDES = {
    "every other channel": lambda x: torch.stack([x, torch.full_like(x, torch.nan)], -1).flatten(2)[..., ::2],
    "channel-major": lambda x: x.mT.contiguous().mT,
    "a slice": lambda x: torch.nn.functional.pad(x, (1, 4, 2, 3), value=torch.nan)[:, 2 : 2 + x.shape[1], 1 : 1 + x.shape[2]],
    "token-major": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "one sample for all": lambda x: x[:1].expand(x.shape),
}  # fmt: skip


@pytest.mark.parametrize("floor", [0.0, 0.3])
@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.one_in(2)
def test_strides(strides, floor):
    for dtype in (torch.float32, torch.bfloat16):
        call = layer(dtype, masked=True, shape=(2, 70, 26)) | {"eps": 1e-2, "score_floor": floor}
        call["x"] = STRIDES[strides](call["x"].detach()).requires_grad_()
        call["padding_mask"] = call["padding_mask"].repeat_interleave(2, 1)[:, ::2]
        check(call, output_gradient(call))


@pytest.mark.parametrize("floor", [0.0, 0.3])
@pytest.mark.parametrize("wanted", ["x", "q_weight", "k_bias"])
def test_gradients_that_nobody_wants_are_not_made(wanted, floor):
    call = layer(torch.float32, tied=False, shape=(2, 70, 24)) | {"score_floor": floor}
    dout = output_gradient(call)
    everything = results(pooled_linear_infsa, call, dout)
    call = {n: t.detach() if isinstance(t, torch.Tensor) and n != wanted else t for n, t in call.items()}
    assert torch.equal(results(pooled_linear_infsa, call, dout)[f"d{wanted}"], everything[f"d{wanted}"])


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8)], ids=str)
def test_nothing_to_do(shape):
    call = layer(torch.float32, shape=shape)
    found = results(pooled_linear_infsa, call, output_gradient(call))
    assert all(t.isfinite().all() for t in found.values()) and found["out"].shape[0] == shape[0]


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ({"dtype": torch.float32, "head": 260}, "head_dim 260 is above 256"),
        ({"dtype": torch.float64}, "float64 has no Triton kernel: it is there to check gradients"),
    ],
    ids=["wide", "float64"],
)
def test_what_triton_does_not_take_is_refused(form, words):
    call = layer(**form, shape=(1, 5, 8))
    with pytest.raises(RuntimeError, match=f"backend 'triton' cannot run this call: {words}"):
        pooled_linear_infsa(**call)

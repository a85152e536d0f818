"""A masked row counts as removed, whatever it holds; a padded batch is its samples, one by one."""

from dataclasses import replace

import pytest
import torch
from helpers.calls import OPS, Call, check, output_gradient
from helpers.sweep import swept

B, H, N, M, D, DV = 3, 2, 21, 26, 16, 24

pytestmark = pytest.mark.parametrize("op", OPS)

# What is ignored of the keys and of the queries.
MASKS = {
    "keys": ("some", None),
    "queries": (None, "some"),
    "both": ("some", "some"),
    "nothing": ("none", "none"),
    "all_keys": ("all", None),
    "all_queries": (None, "all"),
    "everything": ("all", "all"),
    "all_of_one_sample": ("all_of_one", "all_of_one"),
    "all_but_one": ("all_but_one", "all_but_one"),
}


def make_mask(kind, length, device):
    mask = torch.zeros(B, length, dtype=torch.bool, device=device)
    if kind is None:
        return None
    if kind == "some":
        mask = torch.rand(B, length, device=device) < 0.4
    elif kind == "all":
        mask[:] = True
    elif kind == "all_of_one":
        mask[1] = True
    elif kind == "all_but_one":
        mask[:] = True
        mask[torch.arange(B), torch.arange(B) * 3 + 1] = False
    return mask


def make(op, device, dtype=torch.float32, tied=False, masks=(None, None), poison=None, eps=4.0) -> Call:
    def rows(length, width, *ignored):
        t = torch.randn(B, H, length, width, dtype=dtype, device=device)
        if poison is not None:
            for mask in ignored:
                t = t if mask is None else t.masked_fill(mask[:, None, :, None], poison)
        return t

    length = N if tied else M
    key_mask, query_mask = make_mask(masks[0], length, device), make_mask(masks[1], N, device)
    if tied:
        # A row of the shared tensor that only one of its two roles ignores is still read in the other.
        both = key_mask & query_mask if key_mask is not None and query_mask is not None else None
        q, k = rows(N, D, both), None
    else:
        q, k = rows(N, D, query_mask), rows(M, D, key_mask)
    rho = torch.rand(H, device=device) + 0.5
    return Call(
        op, q, k, rows(length, DV, key_mask), rho.double() if dtype == torch.float64 else rho, eps, key_mask, query_mask
    )


@pytest.mark.parametrize("poison", [None, float("nan"), swept(float("inf"))], ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
@pytest.mark.one_in(4)
def test_against_the_reference(op, masks, tied, poison, device, backend):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        call = make(op, device, dtype, tied, masks, poison)
        dout = output_gradient(call)
        if op == "pure" and call.query_padding_mask is not None and poison is not None:
            dout = dout.masked_fill(call.query_padding_mask[:, None, :, None], poison)
        if poison is None:
            check(call, dout)
        else:
            # The truth of a poisoned call is that of the same call with zeros in the ignored rows.
            clean = replace(call, **{n: t.nan_to_num(0, 0, 0) for n, t in call.tensors().items() if n != "rho"})
            clean_dout = dout.nan_to_num(0, 0, 0)
            assert torch.equal(call.run(), clean.run())
            wanted = clean.gradients(clean_dout)
            for name, gradient in call.gradients(dout).items():
                assert torch.equal(gradient, wanted[name]), f"d{name}"
            check(clean, clean_dout)


@pytest.mark.parametrize("poison", [None, float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_ignored_rows_get_zero(op, tied, poison, device, backend):
    """Also where a row that counts is not finite."""
    call = make(op, device, tied=tied, masks=("some", "some"))
    if poison is not None:
        for t in {id(t): t for t in (call.q, call.k, call.v) if t is not None}.values():
            t[:, 0, :, 3] = poison
    gradients = call.gradients(output_gradient(call))
    ignored = {"v": call.key_padding_mask, "q": call.query_padding_mask, "k": call.key_padding_mask}
    if tied:
        ignored["q"] = call.query_padding_mask & call.key_padding_mask
    for name, gradient in gradients.items():
        if name in ignored:
            rows = ignored[name][:, None, :].expand(gradient.shape[:3])
            assert (gradient[rows] == 0).all(), name
            assert (gradient[~rows] != 0).any(), name
    if op == "pure":
        rows = call.query_padding_mask[:, None, :].expand(B, H, N)
        assert (call.run()[rows] == 0).all()


@pytest.mark.parametrize("strided", ["expanded", "transposed", "sliced"])
def test_strides_of_masks(op, strided, device, backend):
    call = make(op, device, masks=("some", "some"))

    def layout(mask):
        if strided == "expanded":
            return mask[:1].expand(mask.shape)
        if strided == "transposed":
            return mask.T.contiguous().T
        wide = torch.ones(B, 2 * mask.shape[1] + 1, dtype=torch.bool, device=device)
        wide[:, 1::2] = mask
        return wide[:, 1::2]

    call.key_padding_mask, call.query_padding_mask = layout(call.key_padding_mask), layout(call.query_padding_mask)
    check(call, output_gradient(call))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_padded_batch_is_its_samples(op, dtype, tied, device, backend):
    """Values and gradients, with NaN in the padding."""
    call = make(op, device, dtype, tied)
    query_lengths = torch.tensor([N, 13, 8], device=device)
    key_lengths = query_lengths if tied else torch.tensor([9, M, 17], device=device)
    call.query_padding_mask = torch.arange(N, device=device) >= query_lengths[:, None]
    call.key_padding_mask = torch.arange(call.v.shape[2], device=device) >= key_lengths[:, None]
    query_rows, key_rows = call.query_padding_mask[:, None, :, None], call.key_padding_mask[:, None, :, None]
    call.q = call.q.masked_fill(query_rows, torch.nan)
    call.k = None if tied else call.k.masked_fill(key_rows, torch.nan)
    call.v = call.v.masked_fill(key_rows, torch.nan)
    dout = output_gradient(call)
    out, gradients = call.run(), call.gradients(dout)

    drho = torch.zeros_like(gradients["rho"])
    tolerance = {torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float64: 1e-13}[dtype]

    def same(actual, wanted):
        torch.testing.assert_close(actual, wanted, rtol=tolerance, atol=tolerance)

    for b, (n, m) in enumerate(zip(query_lengths.tolist(), key_lengths.tolist())):
        one = slice(b, b + 1)
        k = None if tied else call.k[one, :, :m]
        sample = Call(op, call.q[one, :, :n], k, call.v[one, :, :m], call.rho, call.eps)
        sample_dout = dout[one, :, :n] if op == "pure" else dout[one]
        sample_out, sample_gradients = sample.run(), sample.gradients(sample_dout)
        same(out[one, :, :n] if op == "pure" else out[one], sample_out)
        for name, length in (("q", n), ("k", m), ("v", m)):
            if name in gradients:
                same(gradients[name][one, :, :length], sample_gradients[name])
                assert (gradients[name][one, :, length:] == 0).all()
        drho += sample_gradients["rho"]
    same(gradients["rho"], drho)

"""Pure's products with few columns, which the C++ kernels sum without storing a score: what row sums and centralities are."""

import pytest
import torch
from helpers.calls import Call, check

TIED = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


def make(N, columns, tied, dtype=torch.float32, d=20, **options):
    q, k = torch.randn(2, 2, 3, N, d, dtype=dtype).unbind()
    return Call("pure", q, None if tied else k, torch.randn(2, 3, N, columns, dtype=dtype), **options)


# A block of scores takes 192 to 240 tokens, a tile 6 or 12 keys and up to 32 queries.
@TIED
@pytest.mark.parametrize("N", [1, 11, 13, 17, 33, 193, 241, 435])
def test_sizes(N, tied, device, backend):
    for columns in (1, 2, 4, 5):
        check(make(N, columns, tied), draws=8 if N < 100 else 3)


@TIED
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype, tied, device, backend):
    for columns in (1, 3):
        check(make(70, columns, tied, dtype))


@TIED
def test_masked_strided_and_expanded_columns(tied, device, backend):
    call = make(50, 1, tied)
    mask = torch.rand(2, 50) < 0.3
    columns = torch.randn(2, 3, 50, 8)
    columns[mask[:, None, :, None].expand_as(columns)] = torch.nan
    for v in (columns[..., ::3], columns[..., :1], torch.randn(2, 1, 1, 1).expand(2, 3, 50, 2)):
        check(Call("pure", call.q, call.k, v, key_padding_mask=mask, query_padding_mask=mask))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e18])
@TIED
def test_values_out_of_range(value, tied, device, backend):
    """What is not finite spreads as in plain code; what is only large does not."""
    for place in ("q", "v"):
        call = make(45, 2, tied, d=3)
        getattr(call, place)[0, 1, 7] = value
        out, truth = call.run(), call.reference(torch.float64)
        torch.testing.assert_close(out.double(), truth, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("columns", [1, 4, 5])
def test_same_bits_whatever_the_threads(columns, device, backend):
    call, before = make(700, columns, True), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(call.run())
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])

"""The CUDA kernels of Linear-InfSA, as shipped, on the host: against float64 by the rule, without a GPU (tests/gpu/simt)."""

import sys
from dataclasses import replace

import pytest
import torch
from helpers.calls import Call, call_of_one_key, expected, output_gradient
from helpers.cuda_on_host import AMPERE, HOPPER, Emulated, plan
from helpers.sweep import some

from infsa_kernels.testing import FORWARD, GRADIENT, assert_within

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="fibers of the C library")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEAD_DIMS = ((8, 8), (17, 9), (64, 64), (128, 40), (1, 3), (256, 256), (8, 256))
GPUS = {"cluster": Emulated(), "grid": Emulated(shared=AMPERE)}
gpus = pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)


def make(*, B=1, H=3, N=150, M=70, d=16, dv=24, dtype=torch.bfloat16, tied=False, **options) -> Call:
    q, k, v = (torch.randn(B, H, n, size) for n, size in ((N, d), (M, d), (N if tied else M, dv)))
    return Call("linear", q.to(dtype), None if tied else k.to(dtype), v.to(dtype), **options)


def check(gpu: Emulated, call: Call, draws=4) -> None:
    dout = output_gradient(call)
    wanted = expected(call, dout, draws)
    for name, result in gpu.results(call, dout).items():
        factor = FORWARD if name == "out" else GRADIENT
        assert_within(result, wanted[name].truth, wanted[name].eager_error, factor, name)


# The paper's operator, and with a floor under its scores.
floors = pytest.mark.parametrize("floor", [0.0, 0.3], ids=["", "floor"])


@gpus
@floors
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("unaligned", [False, True], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("dtype", some(DTYPES, *DTYPES[:2]), ids=str)
@pytest.mark.one_in(5)
def test_rule(gpu, dtype, unaligned, tied, floor):
    check(replace(gpu, unaligned=unaligned), make(dtype=dtype, tied=tied, score_floor=floor))


@gpus
@pytest.mark.parametrize("d, dv", some(HEAD_DIMS, (17, 9), (64, 64), (8, 256)))
@pytest.mark.one_in(2)
def test_head_dims(gpu, d, dv):
    check(gpu, make(N=40, M=33, d=d, dv=dv, score_floor=0.3))
    check(gpu, make(N=40, d=d, dv=dv, tied=True, dtype=torch.float32))


@gpus
@pytest.mark.parametrize("N, M", [(1, 1), (1, 300), (257, 2), (197, 197), (255, 256), (1025, 511)])
@pytest.mark.one_in(2)
def test_lengths(gpu, N, M):
    check(gpu, make(N=N, M=M, H=1))
    # Of a single key the gradient is that of eps, beside which any rounding is large.
    check(gpu, make(N=N, H=1, tied=True, score_floor=0.3, eps=1.0))


@gpus
@pytest.mark.parametrize(
    "sizes", [{"N": 0, "M": 5}, {"N": 5, "M": 0}, {"N": 0, "tied": True}, {"d": 0}, {"dv": 0}], ids=str
)
@pytest.mark.one_in(2)
def test_nothing_to_sum(gpu, sizes):
    for floor in (0.0, 0.3):
        check(gpu, make(**{"N": 4, "M": 4, "d": 8, "dv": 8, "score_floor": floor, **sizes}))


@gpus
@pytest.mark.parametrize("H", [1, 5, 8])
def test_heads_of_a_token_side_by_side(gpu, H):
    """[B, N, H, d], where a unit is several heads; 5 is no multiple of them."""
    for tied in (False, True):
        call = make(B=2, H=H, N=90, M=60, d=8, dv=8, tied=tied, score_floor=0.3 * tied)
        swapped = {n: t.transpose(1, 2).contiguous().transpose(1, 2) for n, t in call.tensors().items() if n != "rho"}
        check(gpu, replace(call, **swapped))


@gpus
def test_strides(gpu):
    def every_other(t):
        return torch.full((*t.shape[:-1], 2 * t.shape[-1]), torch.nan, dtype=t.dtype)[..., ::2].copy_(t)

    def backwards(t):
        return t.mT.contiguous().mT

    def expanded(t):
        return t[:, :1].expand(t.shape)

    for layout in (every_other, backwards, expanded):
        for tied in (False, True):
            call = make(N=50, M=30, tied=tied, eps=1.0)
            check(gpu, replace(call, **{n: layout(t) for n, t in call.tensors().items() if n != "rho"}))


@gpus
@floors
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.one_in(2)
def test_masks_and_rho(gpu, tied, floor):
    call = make(B=2, N=90, M=90, tied=tied, rho=torch.rand(3) + 0.5, score_floor=floor)
    masks = {"key_padding_mask": torch.rand(2, 90) < 0.3, "query_padding_mask": torch.rand(2, 90) < 0.3}
    poisoned = {"v": call.v.masked_fill(masks["key_padding_mask"][:, None, :, None], torch.nan)}
    if not tied:
        poisoned["q"] = call.q.masked_fill(masks["query_padding_mask"][:, None, :, None], torch.nan)
        poisoned["k"] = call.k.masked_fill(masks["key_padding_mask"][:, None, :, None], torch.nan)
    dout = output_gradient(call)
    wanted = expected(replace(call, **masks), dout, 4)
    for name, result in gpu.results(replace(call, **masks, **poisoned), dout).items():
        factor = FORWARD if name == "out" else GRADIENT
        assert_within(result, wanted[name].truth, wanted[name].eager_error, factor, name)
    nothing = {name: torch.ones_like(mask) for name, mask in masks.items()}
    for result in gpu.results(replace(call, **nothing), dout).values():
        assert (result == 0).all()


@gpus
def test_nan_and_extremes(gpu):
    call = make(N=20, M=20)
    for name in ("q", "k", "v"):
        poisoned = getattr(call, name).clone()
        poisoned[0, 1, 7, 3] = torch.nan
        results = gpu.results(replace(call, **{name: poisoned}), output_gradient(call))
        assert results["out"][0, 1].isnan().any() and not results["out"][0, ::2].isnan().any()
    call = make(N=40, tied=True, dtype=torch.float16)
    for scale in (0.0, 2.0**-9, 2.0**9):
        check(gpu, replace(call, q=call.q * scale))


@gpus
def test_an_infinite_value_of_a_key_without_score_shows_with_a_floor(gpu):
    """Its weight is above 0, though its score be 0."""
    call = make(N=20, M=20, score_floor=0.3)
    call.k[0, 1, 7] = 0
    call.v[0, 1, 7, 3] = torch.inf
    out = gpu.results(call)["out"]
    assert out[0, 1, 3] == torch.inf and out.isinf().sum() == 1 and not out.isnan().any()


@gpus
def test_a_key_with_all_the_weight_has_weight_one(gpu):
    """Scores have the same bits in both directions."""
    call = call_of_one_key(8)
    dout = output_gradient(call)
    results = gpu.results(call, dout)
    positive = results["out"].abs().sum(-1) > 0
    assert positive.any()
    torch.testing.assert_close(results["v"][:, :, 0][positive], dout[positive], rtol=5e-7, atol=0)


@pytest.mark.parametrize("resident", some([1, 2, 3, 7], 1, 7))
def test_waves_of_a_grid(resident):
    """More units than blocks."""
    for tied in (False, True):
        check(Emulated(resident, AMPERE), make(B=3, H=3, N=40, M=40, tied=tied))


@pytest.mark.parametrize("resident", some([3, 4], 3))
@pytest.mark.sweep
def test_waves_of_several_blocks_each(resident):
    """A unit at a time on all blocks: partial sums of several waves are on their way at once, and some blocks are slow."""
    gpu = Emulated(resident, AMPERE, wave_bytes=1)
    for tied in (False, True):
        check(gpu, make(H=7, N=1500, M=1600, d=8, dv=16, tied=tied), draws=2)


@pytest.mark.sweep
def test_blocks_of_a_cluster_wait_for_each_other():
    """Eight blocks read each other's shared memory, slow ones from fast ones that have nothing left to do."""
    assert plan(1, 1, 500, 450, 256, 256)["splits"] == 8
    for tied in (False, True) * 2:
        check(Emulated(), make(H=1, N=500, M=450, d=256, dv=256, tied=tied), draws=2)


@gpus
def test_subgradients_are_those_of_torch(gpu):
    """Keys with a score of exactly 0, and queries of norm 0."""
    call = make(N=60, M=60)
    zeros = {name: getattr(call, name).clone() for name in ("q", "k")}
    for t in zeros.values():
        t[:, :, ::3] = 0
    check(gpu, replace(call, **zeros))
    check(gpu, replace(make(N=60, tied=True), q=zeros["q"]))


def test_both_ways_run():
    ran = set()
    for shared in (HOPPER, AMPERE):
        Emulated(shared=shared, clusters=ran).results(make())
    assert ran == {True, False}


@gpus
@pytest.mark.one_in(2)
def test_same_bits_in_every_order(gpu):
    """Fibers run in another order every time."""
    call = make(B=2, N=300, M=300)
    dout = output_gradient(call)
    first = gpu.results(call, dout)
    for _ in range(3):
        for name, result in gpu.results(call, dout).items():
            assert torch.equal(result, first[name]), name


SIZES = [
    (B, H, N, N, d, d)
    for B, H in ((1, 64), (1, 16), (32, 16), (1, 1), (3, 5), (1 << 20, 300))
    for N in (0, 1, 197, 1024, 4096, 65536, 331776)
    for d in (0, 1, 16, 64, 256)
]


@pytest.mark.parametrize("shared", [AMPERE, HOPPER], ids=["grid", "cluster"])
@pytest.mark.parametrize("token_major", [False, True])
def test_plans_cover_the_work_within_limits(shared, token_major):
    for sizes in SIZES:
        B, H, N, M, d, dv = sizes
        for width in (2, 4):
            p = plan(*sizes, bytes=width, token_major=token_major, keep_queries=True, shared=shared)
            where = f"{sizes}, {width} bytes: {p}"
            assert p["heads"] * p["lanes"] == p["columns"] <= 32 and 8 * p["lanes"] >= max(d, dv), where
            assert p["columns"] * p["slots"] == 256, where
            assert p["units"] == B * -(-H // p["heads"]), where
            assert p["splits"] * p["query_span"] >= N and p["splits"] * p["key_span"] >= M, where
            assert p["wave_units"] * p["waves"] >= p["units"] > p["wave_units"] * (p["waves"] - 1), where
            assert 1 <= p["blocks"] == p["wave_units"] * p["splits"] < 1 << 31, where
            assert p["part_size"] <= 288, where
            assert p["shared_bytes"] <= (HOPPER if p["cluster"] else 48 << 10), where
            if p["cluster"]:
                assert p["splits"] in (1, 2, 4, 8) and p["waves"] == 1 and shared, where
            else:
                # All blocks of the grid must be there at once.
                assert p["blocks"] <= 132, where


def test_plan_of_the_benchmarks():
    """The 4-layer model's heads: a cluster while a head group fits on chip, then the whole GPU at one head group at a time."""
    photo = plan(1, 64, 4096, 4096, 16, 16, token_major=True, keep_queries=True)
    assert photo["cluster"] and photo["heads"] == 4 and photo["blocks"] == 128
    extreme = plan(1, 64, 331776, 331776, 16, 16, token_major=True, keep_queries=True)
    assert not extreme["cluster"] and extreme["blocks"] == 132
    small = plan(32, 64, 197, 197, 16, 16, token_major=True, keep_queries=True)
    assert small["cluster"] and small["splits"] == 1 and small["blocks"] == 512

"""What the packed operators refuse, and in which words."""

import pytest
import torch
from helpers.calls import raw_op
from helpers.packed_calls import PACKED_OPS, make, offsets
from torch._subclasses.fake_tensor import FakeTensorMode

import infsa_kernels

by_op = pytest.mark.parametrize("op", PACKED_OPS)


def bad(**wrong) -> dict:
    q, k, v = torch.zeros(5, 2, 4), torch.zeros(6, 2, 4), torch.zeros(6, 2, 3)
    return {
        "q": q, "k": k, "v": v, "cu_seqlens_q": offsets((2, 3)), "cu_seqlens_k": offsets((6, 0)), "max_q": 3, "max_k": 6,
    } | wrong  # fmt: skip


BAD = [
    ({"q": torch.zeros(1, 5, 2, 4)}, ValueError, "q has shape [1, 5, 2, 4], expected (N, H, d); view it with 3 dimensions"),
    ({"k": torch.zeros(6, 1, 4)}, ValueError, "k has shape [6, 1, 4], expected (M, H, d) = [6, 2, 4]; broadcasting"),
    ({"v": torch.zeros(5, 2, 3)}, ValueError, "v has shape [5, 2, 3], expected (M, H, dv) = [6, 2, 3]"),
    ({"k": torch.zeros(6, 2, 4).half()}, TypeError, "k has dtype torch.float16, expected torch.float32"),
    ({"eps": 0.0}, ValueError, "eps is 0, expected a finite number above 0"),
    ({"rho": torch.ones(3)}, ValueError, "rho has shape [3], expected [], [1] or (H,) = [2]"),
    (
        {"cu_seqlens_q": offsets((2, 3), torch.float32)}, TypeError,
        "cu_seqlens_q has dtype torch.float32, expected torch.int32; convert it with .to(torch.int32)",
    ),
    (
        {"cu_seqlens_k": offsets((6, 0), torch.int16)}, TypeError,
        "cu_seqlens_k has dtype torch.int16, expected torch.int32; convert it with .to(torch.int32)",
    ),
    (
        {"cu_seqlens_q": offsets((2, 3), device="meta")}, ValueError,
        "cu_seqlens_q is on meta, expected cpu, where q is; move it with .to(q.device)",
    ),
    (
        {"cu_seqlens_q": offsets((2, 3))[None]}, ValueError,
        "cu_seqlens_q has shape [1, 3], expected (S+1); view it with 1 dimensions",
    ),
    (
        {"cu_seqlens_k": offsets((6, 0, 0))}, ValueError,
        "cu_seqlens_k has shape [4], expected (S+1) = [3]; one element for each sequence and one more",
    ),
    (
        {"cu_seqlens_q": offsets(())[:0], "cu_seqlens_k": offsets(())[:0]}, ValueError,
        "cu_seqlens_q has shape [0], expected (S+1): a 0, and where each of the S sequences ends",
    ),
    (
        {"cu_seqlens_q": offsets((2, 3)) + 1}, ValueError,
        "cu_seqlens_q starts at 1, expected 0, where the first sequence begins",
    ),
    (
        {"cu_seqlens_k": torch.tensor([0, 7, 6])}, ValueError,
        "cu_seqlens_k falls from 7 to 6 at position 2, expected no fall; give the lengths of the sequences summed up",
    ),
    (
        {"cu_seqlens_q": offsets((2, 2))}, ValueError,
        "cu_seqlens_q ends at 4, expected 5, the number of tokens of q; slice the tokens that belong to no sequence off",
    ),
    ({"cu_seqlens_k": offsets((6, 1))}, ValueError, "cu_seqlens_k ends at 7, expected 6, the number of tokens of k"),
    ({"max_q": 2}, ValueError, "max_q is 2, expected at least 3, the length of sequence 1"),
    ({"max_k": -1}, ValueError, "max_k is -1, expected at least 6, the length of sequence 0"),
]  # fmt: skip


@by_op
@pytest.mark.parametrize(("wrong", "error", "words"), BAD, ids=[words[:50] for _, _, words in BAD])
def test_bad_input(op, wrong, error, words):
    """The same words from the function, the operator, and the raw operator of every backend."""
    given = bad(**wrong)
    names = "q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_q", "max_k"
    arguments, eps, rho = [given[n] for n in names], given.get("eps", 1e-6), given.get("rho", 1.0)
    call, public = make(op), f"{op.removesuffix('_floor')}_varlen"
    calls = [
        lambda: call.function()(*arguments, rho, eps),
        lambda: getattr(torch.ops.infsa, public)(*arguments, eps, rho, **call.by_name()),
    ]
    if "rho" not in given:
        usable = infsa_kernels.explain_backend(call.raw_name, torch.device("cpu"), torch.float32, (5, 2, 4))
        for backend in (name for name, why in usable.items() if why is None):
            raw = raw_op(f"{call.raw_name}_fwd", backend)
            calls.append(lambda raw=raw: raw(*arguments, eps, *call.by_name().values(), 1.0, None))
    for run in calls:
        with pytest.raises(error) as caught:
            run()
        assert str(caught.value).startswith(f"infsa::{public}: {words}")


@by_op
@pytest.mark.parametrize(("name", "value", "words"), [
    ("cu_seqlens_k", None, "cu_seqlens_k is a NoneType, expected a Tensor"),
    ("max_q", 3.0, "max_q is a float, expected an int"),
    ("max_k", None, "max_k is a NoneType, expected an int"),
])  # fmt: skip
def test_wrong_types(op, name, value, words):
    with pytest.raises(TypeError, match=f"infsa::{op.removesuffix('_floor')}_varlen: {words}"):
        make(op).function()(**bad(**{name: value}))


@by_op
def test_offsets_without_values_are_taken_as_they_are(op):
    """Under a FakeTensorMode, as on a GPU, nothing waits for them."""
    with FakeTensorMode() as mode:
        given = {n: mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for n, t in bad(max_q=1).items()}
        assert make(op).function()(**given).shape == (5, 2, 3)


@pytest.mark.parametrize(("floor", "error", "words"), [
    (-0.1, ValueError, "score_floor is -0.1, expected a finite number of at least 0; 0 is the paper's operator"),
    (float("inf"), ValueError, "score_floor is inf, expected a finite number of at least 0"),
    ("0.1", TypeError, "score_floor is a str, expected a number"),
])  # fmt: skip
def test_bad_floors(floor, error, words, device, backend):
    calls = [infsa_kernels.linear_infsa_varlen, torch.ops.infsa.linear_varlen]
    given = bad()
    raw = raw_op("linear_varlen_floor_fwd", backend)
    if error is ValueError:
        calls.append(lambda score_floor, **given: raw(*given.values(), 1e-6, score_floor, 1.0, None))
    for call in calls[: 3 if error is ValueError else 1]:
        with pytest.raises(error, match=f"^infsa::linear_varlen: {words}"):
            call(**given, score_floor=floor)

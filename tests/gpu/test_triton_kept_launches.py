"""Launches that are kept (launch.py): the next of a kind starts what the first compiled, with the arguments that Triton gives."""

import pytest
import torch
from helpers.pooled_linear_calls import layer, output_gradient, results

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter starts nothing", allow_module_level=True)

from helpers.triton_target import starting  # noqa: E402

import infsa_kernels  # noqa: E402
from infsa_kernels import pooled_linear_infsa  # noqa: E402
from infsa_kernels.ops import backends  # noqa: E402
from infsa_kernels.triton import first_use, launch  # noqa: E402


@pytest.fixture
def gpu(monkeypatch):
    """An H100 on which nothing runs: to the package, that is where CPU tensors are."""
    monkeypatch.setattr(backends, "_why_not_triton", lambda *arguments: None)
    monkeypatch.setattr(first_use, "CHECKED", ())
    with starting("sm_90") as gpu, infsa_kernels.backend("triton"):
        yield gpu


def started(gpu, call: dict) -> list:
    """What a call starts, forward and backward: kernels, and arguments with tensors by what they are."""
    gpu.started.clear()
    results(pooled_linear_infsa, call, output_gradient(call))

    def told(value):
        if isinstance(value, tuple):
            return tuple(map(told, value))
        return (value.shape, value.stride(), value.dtype) if isinstance(value, torch.Tensor) else value

    return [(s.kernel, s.programs, s.stream, [(kind, told(value)) for kind, value in s.arguments]) for s in gpu.started]


def make(width=32, **form):
    return layer(torch.bfloat16, tied=False, masked=True, shape=(1, 70, width), heads=2, head=16, **form)


def test_the_next_of_a_kind_starts_what_triton_would(gpu, by_triton):
    first = started(gpu, make())
    by_triton.clear()
    assert started(gpu, make()) == first and by_triton == []
    launch.forget_kept()
    assert started(gpu, make()) == first
    assert 8 <= len(by_triton) <= len(first)  # both operators take the same statistics


@pytest.mark.parametrize("change", ["alignment", "mask", "norm", "strides"])
def test_another_kind_is_not_taken_for_it(change, gpu):
    call = make()
    started(gpu, call)
    if change == "alignment":
        call["x"] = torch.empty(call["x"].numel() + 1, dtype=torch.bfloat16)[1:].view_as(call["x"]).requires_grad_()
    elif change == "strides":
        call["x"] = call["x"].detach().mT.contiguous().mT.requires_grad_()
    elif change == "mask":
        del call["padding_mask"]
    else:
        call = make(norm="")
    found = started(gpu, call)
    launch.forget_kept()
    assert found == started(gpu, call)


def test_no_more_are_kept_than_may_be(gpu, monkeypatch):
    monkeypatch.setattr(launch, "MOST_KEPT", 3)
    started(gpu, make())
    assert 0 < len(launch._kept) <= 3

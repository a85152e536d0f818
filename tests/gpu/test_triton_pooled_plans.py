"""Plans of the pooled layer: the next call of a kind starts what the first compiled, with the arguments that Triton gives."""

import gc
import weakref

import pytest
import torch
from helpers.pooled_linear_calls import layer, output_gradient, results

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter has no plans", allow_module_level=True)


import infsa_kernels  # noqa: E402
from infsa_kernels import pooled_linear_infsa  # noqa: E402
from infsa_kernels.ops import plans  # noqa: E402
from infsa_kernels.triton import central_query, score_pool  # noqa: E402


@pytest.fixture
def gpu(planned_gpu):
    with infsa_kernels.backend("triton"):
        yield planned_gpu


def started(gpu, call: dict) -> list:
    """What a call starts, forward and backward: kernels, and arguments with tensors by what they are."""
    gpu.started.clear()
    results(pooled_linear_infsa, call, output_gradient(call))

    def told(value):
        if isinstance(value, tuple):
            return tuple(map(told, value))
        return (value.shape, value.stride(), value.dtype) if isinstance(value, torch.Tensor) else value

    return [(s.kernel, s.programs, s.stream, [(kind, told(value)) for kind, value in s.arguments]) for s in gpu.started]


def make(width=32, samples=1, **form):
    form = {"masked": True, **form}
    return layer(torch.bfloat16, tied=False, shape=(samples, 70, width), heads=2, head=16, **form)


KINDS = {
    "one block": {},
    "samples": {"samples": 3},
    "plain": {"masked": False, "norm": "", "bias": False},
    "floor": {"score_floor": 0.25},
}


def of_kind(kind: str) -> dict:
    form = dict(KINDS[kind])
    floor = {"score_floor": form.pop("score_floor", 0.0)}
    return make(**form) | floor


@pytest.mark.parametrize("tokens", [1 << 14, 30], ids=["whole", "blocks"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_next_of_a_kind_starts_what_triton_would(kind, tokens, gpu, by_triton, monkeypatch):
    monkeypatch.setattr(central_query, "BLOCK_TOKENS", tokens)
    monkeypatch.setattr(score_pool, "BLOCK_BYTES", tokens * 32 * 2)
    first = started(gpu, of_kind(kind))
    by_triton.clear()
    assert started(gpu, of_kind(kind)) == first and by_triton == []
    plans.forget()
    assert started(gpu, of_kind(kind)) == first
    assert len(by_triton) == len(first) >= (5 if tokens > 70 else 12)


CHANGES = ["alignment", "mask", "norm", "strides", "eps", "floor", "wanted"]


@pytest.mark.parametrize("change", CHANGES)
def test_another_kind_is_not_taken_for_it(change, gpu):
    call = make()
    started(gpu, call)
    if change == "alignment":
        call["x"] = torch.empty(call["x"].numel() + 1, dtype=torch.bfloat16)[1:].view_as(call["x"]).requires_grad_()
    elif change == "strides":
        call["x"] = call["x"].detach().mT.contiguous().mT.requires_grad_()
    elif change == "mask":
        del call["padding_mask"]
    elif change == "norm":
        call = make(norm="")
    elif change == "wanted":
        call["x"] = call["x"].detach()
    else:
        call |= {"eps": 0.5} if change == "eps" else {"score_floor": 0.25}
    found = started(gpu, call)
    plans.forget()
    assert found == started(gpu, call)


def test_plans_hold_no_tensor(gpu):
    call = make(samples=2)
    started(gpu, call)
    tensors = [weakref.ref(t) for t in call.values() if isinstance(t, torch.Tensor)]
    del call
    gpu.started.clear()
    gc.collect()
    assert [t for t in tensors if t() is not None] == []

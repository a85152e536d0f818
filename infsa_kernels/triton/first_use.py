"""The check that a kernel passes before its first use on a machine.

A kernel that is right in its source, and as compiled where it was tested, may still be wrong on another GPU, driver or compiler.
So each variant of a kernel first computes what is known: from integers, of which every sum of Pure's forward pass is exact; three
tiles and one row of them, and a whole number of tiles; the same in every head, where a race shows as heads that differ; in the
middle of NaN; three times. What fails, or raises, is left to torch operations from then on, with one warning.

A verdict on the numbers is kept on disk (verdicts.py): a second process does not check again. `INFSA_TRITON=1` trusts every
kernel unchecked, `INFSA_TRITON=0` uses none. The compiled kernels of CUDA C++ are checked by the same calls before they are
chosen (ops/launch_bound.py).
"""

import importlib
import itertools
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from types import ModuleType

import torch
from torch import Tensor

from ..ops.extension import torch_ops
from . import known_attention, known_pooled, verdicts
from .known_calls import PARENT, raw_of

Variant = known_attention.Variant | known_pooled.Variant

# Where a kernel that fails is to be reported.
REPORT = "please report it with the output of `python -m infsa_kernels.info --check`"

# Devices whose kernels are checked. The interpreter, on the CPU, is what tests try them in.
CHECKED = ("cuda",)

# Runs of one call, whose bits have to be equal.
RUNS = 3

_verdicts: dict[tuple[Variant, torch.device], str | None] = {}


def failure(op: str, direction: str, arguments: tuple) -> str | None:
    """Why the Triton kernels are not to make this call of `infsa::<op>_fwd` or `_bwd`; None if they are.

    The first call of a variant is checked here.

    Raises:
        RuntimeError: that first call is inside the capture of a CUDA graph, where nothing can be compiled, loaded or compared.
    """
    device = arguments[0].device
    if device.type not in CHECKED or os.environ.get("INFSA_TRITON") == "1":
        return None
    variant = of(op, direction, arguments)
    try:
        return _verdicts[variant, device]
    except KeyError:
        pass
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"infsa::{op}: its first call with such arguments is inside the capture of a CUDA graph, where no kernel can be "
            "loaded; make the same call once before the capture (torch.cuda.graph's documentation calls that a warm-up)"
        )
    return first_verdict(variant, device)


def checked(variant: Variant, device: torch.device) -> str | None:
    """What is wrong with a variant, which is checked here if it never was."""
    try:
        return _verdicts[variant, device]
    except KeyError:
        return first_verdict(variant, device)


def cached(variant: Variant, device: torch.device) -> str | None:
    """The same of one that was checked before.

    Raises:
        LookupError: it was not.
    """
    try:
        return _verdicts[variant, device]
    except KeyError:
        return verdicts.read(variant, device)


def first_verdict(variant: Variant, device: torch.device) -> str | None:
    """What is wrong with a variant that this process asks for the first time; said once, in a warning."""
    reason = _verdicts[variant, device] = verdict(variant, device)
    if reason:
        kernel, instead = (
            ("CUDA C++ kernel", "Triton's in its stead")
            if variant.backend == "cuda"
            else ("Triton kernel", "torch operations in its stead, which are slower")
        )
        warnings.warn(
            f"infsa_kernels does not use its {kernel} for {variant} on {verdicts.gpu_name(device)}, and runs {instead}: "
            f"{reason}; {REPORT}",
            stacklevel=2,
        )
    return reason


def known(device: torch.device) -> dict[str, str | None]:
    """Every verdict on this device, of any process: what failed, by variant in words; None for what passed."""
    here = {str(variant): reason for (variant, where), reason in _verdicts.items() if where == device}
    return dict(sorted((dict(verdicts.all_of(device)) | here).items()))


def check_all(device: torch.device) -> Iterator[tuple[Variant, str | None]]:
    """Checks the usual variants now, whatever was known. Each in a process of its own: an illegal access ends only that one."""
    for variant in usual(device):
        command = [sys.executable, "-m", __name__, str(device), json.dumps(asdict(variant))]
        run = subprocess.run(command, capture_output=True, text=True)
        last = (run.stderr.strip().splitlines() or ["it said nothing"])[-1]
        yield variant, json.loads(run.stdout)["failure"] if run.returncode == 0 else f"its process ended: {last}"


def usual(device: torch.device) -> list[Variant]:
    """The operators as attention layers call them."""
    return [*known_attention.usual(device), *known_pooled.usual(device)]


def of(op: str, direction: str, arguments) -> Variant:
    """The variant of a call."""
    return _calls_of(op).of(op, direction, arguments)


def _calls_of(op: str) -> ModuleType:
    """Where the known calls of an operator are."""
    return known_pooled if op in known_pooled.OPS else known_attention


def verdict(variant: Variant, device: torch.device) -> str | None:
    """That of the disk, or of a check now, which is then written there; what raised may be mended at any time, and is not."""
    try:
        return verdicts.read(variant, device)
    except LookupError:
        return _new_verdict(variant, device)


def _new_verdict(variant: Variant, device: torch.device) -> str | None:
    try:
        reason = check(variant, device)
    except Exception as error:
        return f"it raised {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
    verdicts.write(variant, device, reason)
    return reason


@torch.no_grad()
def check(variant: Variant, device: torch.device) -> str | None:
    """Runs a variant on known input: what is wrong, or None.

    Raises:
        Exception: whatever compiling, loading or running it raised.
    """
    kernels, plain, calls = _kernels(variant), raw_of(variant.op).kernels["eager"], _calls_of(variant.op)
    for where, arguments, around in calls.calls(variant, device):
        if variant.direction == "backward":
            arguments = calls.backward(variant, arguments, plain)
        expected = _run(variant, plain, calls.alone(variant, arguments))
        first = None
        for _ in range(RUNS):
            with around():
                results = _run(variant, kernels, arguments)
            if reason := _wrong(variant, results, expected, first):
                return f"{reason}, at {where}"
            first = results
    return None


def _kernels(variant: Variant):
    """What has the ``forward`` and ``backward`` that are checked."""
    raw = raw_of(variant.op)
    return _Compiled(raw) if variant.backend == "cuda" else importlib.import_module(raw.kernels["triton"], PARENT)


class _Compiled:
    """The compiled kernels of a raw operator, called as those in Python are."""

    def __init__(self, raw):
        self.forward, self._backward = raw.ops["cuda"], getattr(torch_ops, f"{raw.name}_bwd").default

    def backward(self, *arguments) -> None:
        *taken, gradients = arguments
        wanted = [gradient is not None for gradient in gradients]
        _leave_nan(gradients)
        for gradient, result in itertools.compress(zip(gradients, self._backward(*taken, wanted)), wanted):
            gradient.copy_(result)


def _leave_nan(arguments) -> None:
    """In memory that the next tensors of such sizes are given."""
    tensors = [t for t in arguments if isinstance(t, Tensor)]
    sizes = [t.numel() * t.element_size() for t in (*tensors, *tensors)]
    held = [torch.full((size // 4 + 1,), torch.nan, dtype=torch.float32, device=tensors[0].device) for size in sizes]
    del held


def _run(variant: Variant, module, arguments: list) -> dict[str, Tensor]:
    """The results of a call by name, in memory that held NaN: what a kernel does not write shows."""
    raw = raw_of(variant.op)
    if variant.direction == "forward":
        _leave_nan(arguments)
        return dict(zip(raw.forward.results, module.forward(*arguments)))
    gradients = raw.gradients((*arguments, [True] * len(raw.inputs)))
    for gradient in filter(lambda t: t is not None, gradients):
        gradient.fill_(torch.nan)
    module.backward(*arguments, gradients)
    return {name: t for name, t in zip(raw.backward.results, gradients) if t is not None}


def _wrong(variant: Variant, results, expected, first) -> str | None:
    calls = _calls_of(variant.op)
    for number, (result_name, result) in enumerate(results.items()):
        name = f"result {number}"
        head, right = (calls.one_head(variant, t, result_name) for t in (result, expected[result_name]))
        largest = right.double().abs().max().item()
        error = (head.double() - right.double()).abs().max().item()
        if not error <= calls.tolerance(variant, result) * largest:
            return f"{name} is off by {error:.3g} where its largest element is {largest:.3g}"
        if not torch.equal(result, head.expand_as(result)):
            return f"{name} differs between heads of the same content"
        if first is not None and not torch.equal(result, first[result_name]):
            return f"{name} differs between runs"
    return None


if __name__ == "__main__":
    given = json.loads(sys.argv[2])
    asked = _calls_of(given["op"]).Variant(**given)
    print(json.dumps({"failure": _new_verdict(asked, torch.device(sys.argv[1]))}))

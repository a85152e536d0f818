"""Runs the cases: the gate first, then every candidate in turn, and a row for each that says what came of it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from . import machine, rows
from .cases import Case
from .measure import Action, Observation, available_memory, interleave, observe
from .truth import Truth
from .ways import WAYS

# A training step is timed in two laps: it gives the rows of the backward pass and of the whole step.
PHASES = {"fwd": ("fwd",), "train": ("bwd", "fwd+bwd")}

# Seconds that one call of an operator may take, as a multiple of what one of a comparator may.
OWN_LIMIT_FACTOR = 6
WARM_UP_BELOW_SECONDS = 2.0
MEMORY_SHARE = 0.8


@dataclass(frozen=True)
class Settings:
    device: torch.device
    dtype: torch.dtype
    peers: tuple[str, ...]
    budget: float
    limit: float


class Sweep:
    """What the cases share: settings, the machine's ceilings, and what each candidate took so far."""

    def __init__(self, settings: Settings, ceilings: dict, progress: Callable[[str], None]):
        self.settings, self.ceilings, self.progress = settings, ceilings, progress
        self._history: dict[tuple[str, str, str], tuple[int, float, int]] = {}

    def run(self, case: Case, flat: tuple[Tensor, Tensor, Tensor]) -> list[dict]:
        """All rows of one case; ``flat`` holds its q, k and v as (N, D)."""
        run = CaseRun(self, case, case.inputs(*flat, device=self.settings.device))
        return [row for phase in PHASES for row in run.phase(phase)]

    def foresee(self, case: Case, name: str, phase: str) -> tuple[float, int]:
        """Seconds and bytes that one call will take: scaled from the last N measured, else the least that it can be."""
        exponent = WAYS[name].EXPONENT[case.op]
        if (key := (case.op, name, phase)) in self._history:
            N, seconds, peak = self._history[key]
            of_memory = exponent if WAYS[name].HOLDS_SCORES else 1
            return seconds * (case.N / N) ** exponent, int(peak * (case.N / N) ** of_memory)
        if exponent == 1:
            return 0.0, 0
        scores = case.N**2 * case.H
        products = {"fwd": 4, "train": 14}[phase] * scores * case.d
        held = 3 * scores * case.dtype.itemsize if WAYS[name].HOLDS_SCORES else 0
        return products / self.ceilings["gemm"], held

    def skip(self, case: Case, name: str, phase: str) -> dict | None:
        """Status and reason, if a call would take too long or too much memory."""
        seconds, peak = self.foresee(case, name, phase)
        if peak > MEMORY_SHARE * available_memory(self.settings.device):
            return {"status": "out of memory", "reason": f"would need ~{peak / 1e9:.0f} GB"}
        if seconds > self.settings.limit * (OWN_LIMIT_FACTOR if name == "infsa" else 1):
            return {"status": "skipped", "reason": f"would take ~{seconds:.0f} s"}
        return None

    def remember(self, case: Case, name: str, phase: str, seen: Observation) -> None:
        self._history[case.op, name, phase] = case.N, seen.seconds, max(seen.peaks or [0])


class CaseRun:
    """One case, forward and then training step: candidates that pass, beside what the machine needs at least."""

    def __init__(self, sweep: Sweep, case: Case, inputs: dict[str, Tensor]):
        self.sweep, self.case, self.inputs = sweep, case, inputs
        self.limits: dict[str, float] = {}
        shape = (1, case.H, case.d) if case.op == "linear" else inputs["q"].shape
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        # A gradient arrives in the layout of the output: for Pure that of q.
        self.dout = noise.to(inputs["q"]) if case.op == "linear" else torch.empty_like(inputs["q"]).copy_(noise)

    @cached_property
    def truth(self) -> Truth:
        gradients = self.sweep.skip(self.case, "infsa", "train") is None
        return Truth(self.case, self.inputs, self.dout, gradients)

    def phase(self, phase: str) -> list[dict]:
        settings = self.sweep.settings
        self.sweep.progress(f"{self.case.op} {self.case.pixels}px {self.case.variant} {phase}")
        found, actions, seen, verdicts = [], {}, {}, {}
        for name in self.candidates():
            refusal = self.sweep.skip(self.case, name, phase)
            if refusal is None:
                try:
                    actions[name] = self.action(name, phase)
                    seen[name], verdicts[name] = self.examine(name, phase, actions[name])
                except Exception as error:
                    refusal = rows.failure(error)
            if name == "infsa" and refusal is None and not verdicts[name].right:
                wrong = verdicts[name]
                refusal = {
                    "status": "wrong",
                    "reason": f"{wrong.what}: error {wrong.error:.1e} of its largest entry, allowed {wrong.bound:.1e}",
                    **rows.accuracy(wrong, self.truth),
                }
            if refusal is None:
                self.sweep.remember(self.case, name, phase, seen[name])
            else:
                actions.pop(name, None)
                found += [{**self.describe(name, direction), **refusal} for direction in PHASES[phase]]

        limits = self.machine_limits(phase)
        for name, action in limits.items():
            seen[name] = observe(action, settings.device, warm_up=True)[0]
        interleave(actions | limits, seen, settings.budget, settings.device)
        for name in limits:
            direction = PHASES[phase][0]
            found.append({**self.describe(name, direction), **rows.times(seen[name], direction)})
            self.limits[name] = found[-1]["median_s"]
            if name in machine.GEMM_WAYS[settings.device.type]:
                found[-1]["flops_per_s"] = machine.gemm_flops(settings.device) / self.limits[name]
        for name in actions:
            for direction in PHASES[phase]:
                found.append(self.row(name, direction, seen[name], verdicts[name]))
        return found

    def candidates(self) -> list[str]:
        # Compiling takes longer than all the rest: only for the rows that make the curves.
        sweep = self.describe("infsa", "fwd")["sweep"]
        return ["infsa", *(name for name in self.sweep.settings.peers if sweep or name != "compile")]

    def action(self, name: str, phase: str) -> Action:
        function = WAYS[name].prepare(self.case.op)
        if phase == "fwd":
            q, v = self.inputs["q"], self.inputs["v"]
            k = self.inputs.get("k", q)

            def forward(lap):
                with torch.no_grad():
                    return [function(q, k, v)]

            return forward

        leaves = {n: t.detach().requires_grad_() for n, t in self.inputs.items()}
        k = leaves.get("k", leaves["q"])
        dout = self.dout if WAYS[name].SAME_FUNCTION else torch.randn_like(self.inputs["v"])

        def train(lap):
            out = function(leaves["q"], k, leaves["v"])
            lap()
            return [out.detach(), *torch.autograd.grad(out, list(leaves.values()), dout)]

        return train

    def examine(self, name: str, phase: str, action: Action):
        """One call: what it took, and how far its result is from float64."""
        short = self.sweep.foresee(self.case, name, phase)[0] < WARM_UP_BELOW_SECONDS
        seen, results = observe(action, self.sweep.settings.device, warm_up=short or name == "compile")
        if not WAYS[name].SAME_FUNCTION:
            return seen, None
        return seen, self.truth.judge(dict(zip(["out", *("d" + n for n in self.inputs)], results)))

    def machine_limits(self, phase: str) -> dict[str, Action]:
        """What the machine needs at least: a read of the inputs, a copy of them for the gradients, a matrix product."""
        if self.case.op == "pure":
            ways = {"torch.mm", self.sweep.ceilings["gemm_way"]}
            products = {way: machine.gemm(way, self.sweep.settings.device, self.case.dtype) for way in ways}
            return {way: lambda lap, product=product: [product()] for way, product in products.items()}
        tensors = list(self.inputs.values())
        if phase == "train":
            targets = [torch.empty_like(t) for t in tensors]
            return {
                "clone": lambda lap: [t.clone() for t in tensors],
                "copy": lambda lap: [target.copy_(t) for target, t in zip(targets, tensors)],
            }
        way = self.sweep.ceilings["read_way"]
        limits = {"read": lambda lap: machine.read(way, tensors)}
        if self.case.tied and self.case.layout == "bnhd":
            # Rows of one head lie H * d apart: Q cannot stay in cache between the two passes over it.
            limits["read Q, Q, V"] = lambda lap: machine.read(way, [tensors[0], *tensors])
        return limits

    def describe(self, name: str, direction: str) -> dict:
        return rows.describe(self.case, name, direction, self.sweep.settings.dtype)

    def row(self, name: str, direction: str, seen: Observation, verdict) -> dict:
        row = {**self.describe(name, direction), **rows.times(seen, direction), **rows.memory(seen, direction)}
        if not WAYS[name].SAME_FUNCTION:
            return row
        if self.case.op == "pure":
            limit = self.sweep.ceilings["gemm_way"]
            products = self.case.flops(direction) / machine.gemm_flops(self.sweep.settings.device)
            seconds = self.limits[limit] * products
        else:
            limit = {"fwd": "read", "bwd": "copy", "fwd+bwd": "read+copy"}[direction]
            seconds = sum(self.limits[part] for part in limit.split("+"))
        return {
            **row,
            **rows.rates(self.case, direction, row["median_s"], limit, seconds),
            **rows.accuracy(verdict, self.truth),
        }

"""Times on a GPU for the figures the kernels are to reach there: graph replays with a cold L2, candidates in turn, medians.

A call is captured into a CUDA graph, so that the host's launch cost, the same for everybody, does not hide the kernels'. What
cannot be captured is called directly and says so.
"""

import contextlib
import functools
import statistics
import time

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import infsa_kernels
from infsa_kernels import reference

from . import machine, roofline

# The paper's heads at D = 1024, as in cases.py, which needs packages that a lent machine lacks.
HEADS = {"linear": (64, 16), "pure": (16, 64)}
# The backends whose kernels are ours.
OURS = ("triton", "cuda")
PASSES = ("tied", "untied", "bwd tied", "bwd untied")
LINEAR_SIZES = (
    (197, 1), (197, 32), (1024, 1), (1024, 32), (4096, 1), (4096, 32), (16384, 1), (16384, 32), (65536, 1), (331776, 1),
)  # fmt: skip
COLD_CACHE_BYTES = 256 << 20
SECONDS = 0.4
FLUSHED: dict[torch.device, torch.Tensor] = {}
SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


def reasons(op: str, device: torch.device) -> dict[str, str | None]:
    """Each of our backends, and why it cannot run an operator here; None where it can."""
    found = infsa_kernels.explain_backend(op, device, torch.bfloat16, (1, 1, 16, 16))
    return {name: found[name] for name in OURS}


def backends(op: str, device: torch.device) -> list[str]:
    """Which of our backends run an operator here."""
    return [name for name, reason in reasons(op, device).items() if reason is None]


@functools.cache
def capture_stream():
    """The one stream of all captures: autograd runs a backward pass on the stream of its forward pass, which has to be it."""
    return torch.cuda.Stream()


def capture(run, keep_graph=False):
    """A graph of one call, and the tensors that a replay writes. ``keep_graph`` leaves it open to inspection."""
    stream = capture_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph(keep_graph=keep_graph)
    with torch.cuda.graph(graph, stream=stream):
        results = run()
    return graph, results


def measure(candidates: dict, device: torch.device) -> dict[str, float | None]:
    """Median seconds of each candidate; None where it does not run here."""
    ready, seconds = {}, dict.fromkeys(candidates)
    for name, run in candidates.items():
        try:
            run()
            ready[name] = run
            if device.type == "cuda":
                ready[name] = capture(run)[0].replay
        except Exception as error:
            print(f"  {name}: {'called directly' if name in ready else 'does not run'}: {str(error)[:100]}", flush=True)
    samples = {name: [_sample(run, device)] for name, run in ready.items()}
    rounds = max(1, min(100, int(SECONDS * len(ready) / max(1e-9, sum(s[0] for s in samples.values())))))
    for _ in range(rounds if device.type == "cuda" else 1):
        for name, run in ready.items():
            samples[name].append(_sample(run, device))
    return seconds | {name: statistics.median(s[1:]) for name, s in samples.items()}


def _sample(run, device) -> float:
    if device.type == "cpu":
        began = time.perf_counter()
        run()
        return time.perf_counter() - began
    if device not in FLUSHED:
        FLUSHED[device] = torch.empty(COLD_CACHE_BYTES, dtype=torch.int8, device=device)
    FLUSHED[device].zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _heads(op, N, B, device, dry):
    H, d = (2, HEADS[op][1]) if dry else HEADS[op]
    return [torch.randn(B, N, H, d, device=device, dtype=torch.bfloat16).transpose(1, 2) for _ in range(3)]


def _dense(t):
    return t.transpose(1, 2).reshape(-1).view(torch.float32)


def _backward(function, q, k, v, dout):
    """The backward pass alone, of a graph of autograd kept between calls."""
    leaves = [t.detach().requires_grad_() for t in ([q, v] if k is q else [q, k, v])]
    with _on_capture_stream(q.device):
        out = function(leaves[0], leaves[0] if k is q else leaves[1], leaves[-1])
    return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)


@contextlib.contextmanager
def _on_capture_stream(device):
    if device.type == "cpu":
        yield
        return
    capture_stream().wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(capture_stream()):
        yield
    torch.cuda.current_stream().wait_stream(capture_stream())


def _gate(what, actual, expected, bound=2e-2) -> None:
    """No time counts for a wrong result."""
    error = ((actual.float() - expected.float()).abs().max() / expected.float().abs().max()).item()
    if not error <= bound:
        raise AssertionError(f"{what}: error {error:.3g} of the largest entry, allowed {bound}")


def _ours(op, backend):
    operator = getattr(torch.ops.infsa, op)

    def run(q, k, v):
        with infsa_kernels.backend(backend):
            return operator(q, k, v, 1e-6, 0.95)

    return run


def ceilings(args) -> dict:
    """Empty launch, read, copy and the 8192^3 bfloat16 product of this very run."""
    n = 256 if args.dry_run else 8192
    x = torch.randn(1 << (16 if args.dry_run else 28), device=args.device)
    a, b = torch.randn(2, n, n, device=args.device, dtype=torch.bfloat16).unbind()
    found = measure(
        {"launch": _empty_launch(args.device), "copy": x.clone, "gemm": lambda: a @ b, **_reads({"": [x]})}, args.device
    )
    read = min(s for name, s in found.items() if name.startswith("read"))
    rates = {"read": x.nbytes / read, "copy": 2 * x.nbytes / found["copy"], "gemm": 2 * n**3 / found["gemm"]}
    return {"launch": found["launch"], **rates}


def _empty_launch(device):
    """As little as a kernel can do: one addition."""
    one = torch.zeros(1, device=device)
    return lambda: one.add_(1)


def _reads(groups: dict) -> dict:
    """Every way to read the tensors of each group once."""
    ways = machine.READ_WAYS.items()
    return {
        f"read{g} {name}": lambda way=way, ts=ts: [way(t) for t in ts] for g, ts in groups.items() for name, way in ways
    }


def linear(args) -> dict:
    """Goals 1 to 5. The times by backend stand in "backends", and the smallest of them as "tied", "bwd tied" and so on."""
    rows = []
    for N, B in ((40, 1),) if args.dry_run else LINEAR_SIZES:
        q, k, v = _heads("linear", N, B, args.device, args.dry_run)
        eager, candidates = lambda q, k, v: reference.linear(q, k, v, 0.95, 1e-6), {}
        names = backends("linear", args.device)
        expected = reference.linear(q.float(), q.float(), v.float(), 0.95, 1e-6)
        for name in names:
            ours = _ours("linear", name)
            _gate(f"linear {name} N={N}", ours(q, q, v), expected)
            candidates[f"{name} tied"] = lambda ours=ours: [ours(q, q, v)]
            candidates[f"{name} untied"] = lambda ours=ours: [ours(q, k, v)]
            candidates[f"{name} bwd tied"] = _backward(ours, q, q, v, torch.randn_like(v[:, :, 0]))
            candidates[f"{name} bwd untied"] = _backward(ours, q, k, v, torch.randn_like(v[:, :, 0]))
        candidates |= {
            "eager": lambda: [eager(q, q, v)],
            **_reads({" tied": [_dense(t) for t in (q, v)], " untied": [_dense(t) for t in (q, k, v)]}),
            "copy tied": lambda: [q.clone(), v.clone()],
            "copy untied": lambda: [q.clone(), k.clone(), v.clone()],
            "launch": _empty_launch(args.device),
        }
        if not args.dry_run:
            torch._dynamo.reset()
            compiled = torch.compile(eager, dynamic=False)
            candidates["compiled"] = lambda: [compiled(q, q, v)]
        found = measure(candidates, args.device)
        for kind in ("tied", "untied"):
            found[f"read {kind}"] = min(found.pop(n) for n in list(found) if n.startswith(f"read {kind}"))
        by_backend = {name: {kind: found.pop(f"{name} {kind}") for kind in PASSES} for name in names}
        for kind in PASSES:
            found[kind] = min((times[kind] for times in by_backend.values() if times[kind]), default=None)
        rows.append({"N": N, "B": B, **found, "backends": by_backend})
    return {"rows": rows}


def pure(args) -> dict:
    """Goals 6 to 9, in FLOP/s of 4 N^2 D forward and 10 N^2 D backward."""
    rows = []
    for N, B in ((40, 1),) if args.dry_run else ((197, 32), (4096, 1), (4096, 8), (16384, 1), (65536, 1), (331776, 1)):
        q, k, v = _heads("pure", N, B, args.device, args.dry_run)
        ours, dout = _ours("pure", "triton"), torch.randn_like(v)
        forward = 4 * q.shape[0] * q.shape[1] * N * N * q.shape[3]
        if N <= 16384:
            _gate(f"pure N={N}", ours(q, k, v), _ours("pure", "eager")(q.float(), k.float(), v.float()))
        candidates = {"tied": lambda: [ours(q, q, v)], "untied": lambda: [ours(q, k, v)]}
        if N <= 65536:
            candidates["bwd tied"] = _backward(ours, q, q, v, dout)
            candidates["bwd untied"] = _backward(ours, q, k, v, dout)
        for name, kind in SDPA.items() if N <= 65536 else ():
            candidates[name] = _with_sdpa(kind, lambda: [F.scaled_dot_product_attention(q, k, v)])
            try:
                with sdpa_kernel(kind):
                    candidates[f"bwd {name}"] = _backward(F.scaled_dot_product_attention, q, k, v, dout)
            except RuntimeError as error:
                print(f"  {name}: {str(error)[:100]}")
        found = measure(candidates, args.device)
        rates = {n: s and forward * (2.5 if n.startswith("bwd") else 1) / s for n, s in found.items()}
        peak = None
        if args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            ours(q, k, v)
            peak = torch.cuda.max_memory_allocated() - before
        rows.append({"N": N, "B": B, "seconds": found, "flops_per_s": rates, "peak_bytes": peak})
    return {"rows": rows}


def _with_sdpa(kind, run):
    def forced():
        with sdpa_kernel(kind):
            return run()

    return forced


def beside_the_floor(parts: dict) -> list[dict]:
    """Every time of ours with its distance to the least that the machine allows, and with what was predicted."""
    ceilings, found = parts.get("ceilings", {}), []
    if not {"launch", "read", "copy", "gemm"} <= ceilings.keys():
        return found
    for op, (H, d) in HEADS.items():
        for row in parts.get(op, {}).get("rows", []):
            seconds = row.get("seconds", row)
            for name in PASSES:
                if seconds.get(name):
                    direction = "bwd" if name.startswith("bwd") else "fwd"
                    sizes = op, direction, not name.endswith("untied"), row["B"], H, row["N"], d, 2, ceilings
                    found.append(
                        {
                            "what": f"{op} {name} N={row['N']} x{row['B']}",
                            "seconds": seconds[name],
                            "floor": roofline.floor(*sizes) / seconds[name],
                            "predicted": roofline.predict(*sizes),
                        }
                    )
    return found


def ratios(parts: dict) -> list[dict]:
    """Linear's CUDA C++ kernels beside Triton's at every size, and each backend beside an empty launch at the smallest."""
    found = []
    for row in parts.get("linear", {}).get("rows", []):
        at, times = f"N={row['N']} x{row['B']}", row.get("backends", {})
        cuda, triton = times.get("cuda", {}), times.get("triton", {})
        for kind in PASSES:
            if cuda.get(kind) and triton.get(kind):
                found.append({"what": f"linear {kind}: CUDA / Triton, {at}", "value": cuda[kind] / triton[kind]})
        if row["N"] == 197 and row.get("launch"):
            for name, seconds in times.items():
                if seconds["tied"]:
                    what = f"linear tied: {name} / empty launch, {at}"
                    found.append({"what": what, "value": seconds["tied"] / row["launch"]})
    return found


def at_most(target: float, what: str, value: float | None, over: float | None) -> dict:
    value = value / over if value and over else None
    return {"goal": what, "target": f"<= {target:g}", "value": value, "reached": value and value <= target}


def at_least(target: float, what: str, value: float | None, over: float | None) -> dict:
    value = value / over if value and over else None
    return {"goal": what, "target": f">= {target:g}", "value": value, "reached": value and value >= target}


def compare(parts: dict) -> list[dict]:
    """Each goal beside what was measured."""
    rates, ahead, behind = parts.get("ceilings", {}), parts.get("linear", {}), parts.get("pure", {})
    lin = {(r["N"], r["B"]): r for r in ahead.get("rows", [])}
    squared = {(r["N"], r["B"]): r["flops_per_s"] for r in behind.get("rows", [])}
    gemm = rates.get("gemm")

    def over(rows, key, a, b):
        return (rows.get(key, {}).get(a), rows.get(key, {}).get(b))

    goals = []
    for key in ((4096, 32), (65536, 1), (331776, 1)):
        at = f"N={key[0]} x{key[1]}"
        goals += [
            at_most(1.15, f"1 Linear forward tied / read, {at}", *over(lin, key, "tied", "read tied")),
            at_most(1.15, f"2 Linear forward untied / read, {at}", *over(lin, key, "untied", "read untied")),
            at_least(5, f"4 Linear forward: eager / ours, {at}", *over(lin, key, "eager", "tied")),
            at_least(1.4, f"4 Linear forward: compiled / ours, {at}", *over(lin, key, "compiled", "tied")),
        ]
    # A clone reads and writes: tied, Q is read twice, 5 of its 4 units of bytes; untied all that is moved is what it moves.
    for kind, units in (("tied", 5 / 4), ("untied", 1)):
        ours, copied = over(lin, (65536, 1), f"bwd {kind}", f"copy {kind}")
        goals.append(
            at_most(1.25, f"5 Linear backward {kind} / copy of its bytes, N=65536", ours, copied and units * copied)
        )
    goals += [
        at_most(1.5, "3 Linear forward / empty launch, N=197", *over(lin, (197, 1), "tied", "launch")),
        at_least(8, "3 Linear forward: eager / ours, N=197", *over(lin, (197, 1), "eager", "tied")),
    ]
    for key in ((4096, 8), (16384, 1), (65536, 1)):
        at = f"N={key[0]} x{key[1]}"
        goals += [
            at_least(0.65, f"6 Pure forward / GEMM rate, {at}", squared.get(key, {}).get("untied"), gemm),
            at_least(1.25, f"7 Pure forward / cuDNN SDPA, {at}", *over(squared, key, "untied", "cudnn")),
            at_least(1.6, f"7 Pure forward / FA2, {at}", *over(squared, key, "untied", "flash")),
            at_least(1.1, f"8 Pure backward untied / FA2, {at}", *over(squared, key, "bwd untied", "bwd flash")),
            at_least(1.1, f"8 Pure backward tied / cuDNN, {at}", *over(squared, key, "bwd tied", "bwd cudnn")),
        ]
    return [
        *goals,
        at_most(
            1.6,
            "9 Pure forward N=331776: time / 4 N^2 D at GEMM rate",
            gemm,
            squared.get((331776, 1), {}).get("untied"),
        ),
    ]

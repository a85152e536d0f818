"""What has to be right on a GPU: our backends beside eager and the CPU, in every configuration, stream, graph and size."""

import ctypes
import itertools
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

import infsa_kernels

from . import machine, timer

# Tests with a `backend` fixture, and with no package that a lent machine lacks.
SUITES = (
    "test_operators.py", "test_masks.py", "test_tables.py", "test_gradients.py", "test_numerics.py", "test_autograd_features.py",
    "test_transforms.py", "test_autocast.py", "test_bad_input.py", "test_library.py",
)  # fmt: skip
SUITE_SECONDS = 300
RUNS = 250
TIES_AND_MASKS = [(tied, masked) for tied in (True, False) for masked in (True, False)]
HEADS = {"linear": (64, 16), "pure": (16, 64)}
# The backends whose kernels are ours.
OURS = ("triton", "cuda")
BOUNDS = {"float32": 1e-4, "tf32": 4e-3, "bfloat16": 2e-2, "float16": 4e-3}


def reasons(op: str, device: torch.device) -> dict[str, str | None]:
    """Each of our backends, and why it cannot run an operator here; None where it can."""
    found = infsa_kernels.explain_backend(op, device, torch.bfloat16, (1, 1, 16, 16))
    return {name: found[name] for name in OURS}


def running(op: str, device: torch.device) -> list[str]:
    """Which of our backends run an operator here."""
    return [name for name, reason in reasons(op, device).items() if reason is None]


def inputs(op, device, N=197, B=1, dtype=torch.bfloat16, tied=True, H=None, d=None):
    """q, k, v as views of [B, N, H, d], with the paper's heads unless told otherwise; k is q where tied."""
    H, d = (own or paper for own, paper in zip((H, d), HEADS[op]))
    q, k, v = (torch.randn(B, N, H, d, device=device).to(dtype).transpose(1, 2) for _ in range(3))
    return q, q if tied else k, v


def step(op, q, k, v, *masks):
    """A forward and backward pass: [out, dq, (dk), dv]."""
    leaves = [t.detach().requires_grad_() for t in ([q, v] if k is q else [q, k, v])]
    # With a small eps the gradients of a head with few positive scores all but cancel, and digits differ for no fault.
    out = getattr(torch.ops.infsa, op)(leaves[0], leaves[0] if k is q else leaves[1], leaves[-1], 1.0, 0.95, *masks)
    dout = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def distance(actual, expected) -> float:
    """Largest difference beside the largest entry; NaN where either is not finite."""
    return ((actual.float() - expected.float()).abs().max() / expected.float().abs().max()).item()


def backends(args) -> dict:
    """That each of our backends runs what it has kernels for; on the CPU none is expected to but Triton's interpreter."""
    found = {op: reasons(op, args.device) for op in HEADS}
    needed = [("linear", "triton"), ("pure", "triton"), ("linear", "cuda")]
    wrong = [f"{op} on {name}: {found[op][name]}" for op, name in needed if found[op][name]]
    if args.dry_run:
        return {"passed": None, "reason": "no GPU is asked for", "reasons": found}
    return {"passed": not wrong, "wrong": wrong, "reasons": found}


def graph(args) -> dict:
    """Nodes of a captured call at N = 197: one launch each of the CUDA kernels, at most two of a forward pass of Triton's."""
    if args.dry_run:
        return {"passed": None, "reason": "the CPU has no graphs"}
    nodes = {}
    for name in running("linear", args.device):
        q, _, v = inputs("linear", args.device)
        leaves = [t.detach().requires_grad_() for t in (q, v)]

        def forward(name=name, leaves=leaves):
            with infsa_kernels.backend(name):
                return [torch.ops.infsa.linear(leaves[0], leaves[0], leaves[1])]

        with torch.cuda.stream(timer.capture_stream()):
            (out,) = forward()
        torch.cuda.synchronize()
        dout = torch.ones_like(out)
        nodes[f"{name} fwd"] = _nodes(forward)
        nodes[f"{name} bwd"] = _nodes(lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True))
    most = {"triton fwd": 2, "cuda fwd": 1, "cuda bwd": 1}
    return {"passed": all(nodes[name] <= most.get(name, nodes[name]) for name in nodes), "nodes": nodes}


def _nodes(run) -> int:
    captured, _ = timer.capture(run, keep_graph=True)
    count = ctypes.c_size_t()
    raw = ctypes.c_void_p(captured.raw_cuda_graph())
    status = ctypes.CDLL("libcuda.so.1").cuGraphGetNodes(raw, None, ctypes.byref(count))
    assert status == 0, f"cuGraphGetNodes gives {status}"
    return count.value


def ours(device) -> list[tuple[str, str]]:
    """(operator, backend) of our kernels that run here."""
    return [(op, name) for op in HEADS for name in running(op, device)]


def suite(args) -> dict:
    """The shared tests on each of our backends on this device, a process for each file."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **({"TRITON_INTERPRET": "1"} if args.dry_run else {})}
    chosen = "cpu-triton and linear and float32" if args.dry_run else "(cuda-triton or cuda-cuda) and not float64"
    began, logs = time.perf_counter(), {}
    for name in ("test_tables.py",) if args.dry_run else SUITES:
        options = ["-m", "pytest", "-p", "no:cacheprovider", "-k", chosen]
        command = [sys.executable, *options, str(machine.ROOT / "tests" / "ops" / name)]
        log = (args.out / f"suite_{name.removesuffix('.py')}.log").open("w")
        logs[name] = subprocess.Popen(command, env=environment, cwd=machine.ROOT, stdout=log, stderr=log), log
    found, right, passed = {}, True, 0
    for name, (process, log) in logs.items():
        try:
            code = process.wait(max(1, SUITE_SECONDS - (time.perf_counter() - began)))
        except subprocess.TimeoutExpired:
            process.kill()
            code = "timed out"
        log.close()
        counts = re.findall(r"\d+ (?:passed|failed|skipped|error)", Path(log.name).read_text())
        passed += sum(int(count.split()[0]) for count in counts if count.endswith("passed"))
        found[name] = ", ".join([*counts, *([] if code == 0 else [f"exit {code}"])])
        right = right and code in (0, 5)  # 5: no test of this file is for a GPU
    return {"passed": right and passed > 0, "files": found}


def shapes(dry: bool) -> list[tuple[str, int, int]]:
    """(operator, head dimension, N): every tile of configs.py, lengths that fill tiles and that do not."""
    if dry:
        return [("linear", 16, 33), ("pure", 16, 33)]
    linear = [("linear", d, N) for d in (16, 64, 200) for N in (33, 197, 1000, 4097)]
    return linear + [("pure", d, N) for d in (32, 64, 128, 256) for N in (33, 197, 1024, 2049)]


def agreement(args) -> dict:
    """Our backends beside eager on the GPU and beside the CPU's own kernels: every tile, dtype, tie and masks."""
    worst = {}
    for op, d, N in shapes(args.dry_run):
        for dtype in ("float32", "bfloat16") if args.dry_run else BOUNDS:
            torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
            for tied, masked in ((True, False), (False, True)) if args.dry_run else TIES_AND_MASKS:
                kind = getattr(torch, dtype.replace("tf32", "float32"))
                q, k, v = inputs(op, args.device, N, 2, kind, tied, H=2, d=d)
                masks = [torch.rand(2, N, device=args.device) < 0.3 if masked else None] * 2
                results = {}
                for name in running(op, args.device):
                    with infsa_kernels.backend(name):
                        results[name] = step(op, q, k, v, *masks)
                torch.set_float32_matmul_precision("highest")
                with infsa_kernels.backend("eager"):
                    others = {"eager": step(op, q, k, v, *masks)}
                if d <= 64 or args.dry_run:
                    cpu = [t.cpu() for t in (q, k, v)]
                    on_cpu = [None if m is None else m.cpu() for m in masks]
                    others["cpu"] = step(op, cpu[0], cpu[0] if tied else cpu[1], cpu[2], *on_cpu)
                for (backend, mine), (other, theirs) in itertools.product(results.items(), others.items()):
                    far = max(distance(a.cpu(), b.cpu()) for a, b in zip(mine, theirs))
                    name = f"{op} d={d} {dtype} {backend} / {other}"
                    worst[name] = max(worst.get(name, 0.0), far / BOUNDS[dtype], key=lambda x: (x != x, x))
    return {"passed": all(share <= 1 for share in worst.values()), "share_of_bound": worst}


def repeatability(args) -> dict:
    """Bitwise the same over many runs, on another stream, from NaN-filled memory, and replayed from a CUDA graph."""
    differing = []
    for op, backend in ours(args.device):
        for tied in (True, False):
            # 65536 tokens are more than a cluster holds.
            for N in (33,) if args.dry_run else (197, 4096, *([65536] if backend == "cuda" else [])):
                q, k, v = inputs(op, args.device, N, tied=tied, H=2 if args.dry_run else None)
                with infsa_kernels.backend(backend):
                    first = step(op, q, k, v)
                    checks = {f"run {i}": lambda: step(op, q, k, v) for i in range(2 if args.dry_run else RUNS)}
                    checks["poisoned memory"] = lambda: _poisoned(lambda: step(op, q, k, v), args.device)
                    if args.device.type == "cuda":
                        checks["side stream"] = lambda: _on_side_stream(lambda: step(op, q, k, v))
                        checks["graph"] = lambda: _replayed(lambda: step(op, q, k, v))
                    for name, run in checks.items():
                        if not all(torch.equal(a, b) for a, b in zip(first, run())):
                            differing.append(f"{op} {backend} N={N} {'tied' if tied else 'untied'}: {name}")
    return {"passed": not differing, "differing": differing}


def _poisoned(run, device):
    rubbish = [torch.full((1 << (14 if device.type == "cpu" else 24),), float("nan"), device=device) for _ in range(8)]
    del rubbish  # to the allocator, which hands it out again
    return run()


def _on_side_stream(run):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        results = run()
    stream.synchronize()
    return results


def _replayed(run):
    graph, results = timer.capture(run)
    for t in results:
        t.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    return results


def large(args) -> dict:
    """Sizes beyond 32 bits: huge strides, more than 2^31 elements of tokens, and more than 65535 heads."""
    wrong = []

    def compare(what, ours, theirs):
        if not all(distance(a, b) < BOUNDS["bfloat16"] for a, b in zip(ours, theirs)):
            wrong.append(what)

    for op, backend in ours(args.device):
        d = HEADS[op][1]
        N, stride = (40, 1 << 10) if args.dry_run else (600, 1 << 22)  # 600 * 2^22 > 2^31
        store = torch.empty(N * stride, dtype=torch.bfloat16, device=args.device)
        q, v = (store.as_strided((1, 2, N, d), (0, d, stride, 1), offset) for offset in (0, stride // 2))
        for t in (q, v):
            t.copy_(torch.randn(t.shape, device=args.device))
        alone = q.contiguous()
        with infsa_kernels.backend(backend):
            compare(f"{op} {backend}: huge strides", step(op, q, q, v), step(op, alone, alone, v.contiguous()))
        del store, q, v
        B, N = (5, 7) if args.dry_run else (70_000, 33)
        q, _, v = inputs(op, args.device, N, B, H=2 if args.dry_run else None)
        first_and_last = torch.tensor([0, B // 2, B - 1], device=args.device)
        few = q[first_and_last]
        with infsa_kernels.backend(backend):
            # dout is a function of the element's place in the output, so only the forward passes are of equal inputs.
            some, alone = step(op, q, q, v)[0][first_and_last], step(op, few, few, v[first_and_last])[0]
            compare(f"{op} {backend}: {B} images", [some], [alone])
        del q, v
    N = 100 if args.dry_run else (1 << 21) + 5
    q, _, v = inputs("linear", args.device, N, H=2 if args.dry_run else None)
    with infsa_kernels.backend("eager"):
        expected = [step("linear", q[:, h], q[:, h], v[:, h]) for h in (0, q.shape[1] - 1)]
    for backend in running("linear", args.device):
        with infsa_kernels.backend(backend):
            (out, *_) = step("linear", q, q, v)
        for h, theirs in zip((0, q.shape[1] - 1), expected):
            compare(f"linear {backend}: {N} tokens, head {h}", [out[:, h]], theirs[:1])
    return {"passed": not wrong, "wrong": wrong}


def devices(args) -> dict:
    """Tensors on a device that is not the current one."""
    if args.device.type == "cuda" and torch.cuda.device_count() < 2:
        return {"passed": None, "reason": "there is one GPU only"}
    other = torch.device("cpu") if args.dry_run else torch.device("cuda", torch.cuda.device_count() - 1)
    wrong = []
    for op, backend in ours(other):
        q, k, v = inputs(op, other, 33, tied=False, H=2)
        with infsa_kernels.backend(backend):
            results = step(op, q, k, v)
        with infsa_kernels.backend("eager"):
            far = max(distance(a, b) for a, b in zip(results, step(op, q, k, v)))
        wrong += [] if far < BOUNDS["bfloat16"] and results[0].device == other else [f"{op} {backend}"]
    return {"passed": not wrong, "wrong": wrong}


def sanitizer(args) -> dict:
    """compute-sanitizer's memcheck, racecheck and synccheck over every kernel at small shapes."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if args.dry_run:
        touch(args.device, (33,))
    if args.dry_run or not Path(tool).exists():
        return {"passed": None, "reason": "no compute-sanitizer here"}
    found = {}
    # Without torch's cache of freed blocks every access beyond a tensor is one beyond an allocation.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for check in ("memcheck", "racecheck", "synccheck"):
        command = [tool, "--tool", check, "--error-exitcode", "9", sys.executable, "-m", "bench.gpu_check", "--touch"]
        run = subprocess.run(command, env=environment, cwd=machine.ROOT, capture_output=True, text=True, timeout=150)
        (args.out / f"{check}.log").write_text(run.stdout + run.stderr)
        found[check] = (run.stdout.strip().splitlines() or ["nothing"])[-1]
        found[f"{check} code"] = run.returncode
    return {"passed": not any(v for k, v in found.items() if k.endswith("code")), **found}


def touch(device: torch.device, lengths: tuple[int, ...] = (33, 700)) -> None:
    """Every kernel once, at small odd sizes: what the sanitizer watches."""
    for op, backend in ours(device):
        # The last is more than a cluster holds: one grid.
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for tied in (True, False):
                for N in (*lengths, *([30_001] if backend == "cuda" else [])):
                    q, k, v = inputs(op, device, N, dtype=dtype, tied=tied, H=2)
                    with infsa_kernels.backend(backend):
                        step(op, q, k, v)
    if device.type == "cuda":
        torch.cuda.synchronize()

"""`python -m bench.graph [--tokens N] [--out FILE]`: the token graph's solver beside one product, and beside dense algebra.

First the gate: Katz against a dense float64 solution and scipy; Katz, PageRank and eigenvector against networkx. Then, at H = 16,
d = 64, gamma = 0.9, tol = 1e-6 and tied random tokens: katz_centrality beside the dense float32 solution by torch, in turn; and
at 65,536 tokens its time in products with the matrix, and its memory beyond q.
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from infsa_kernels import pure_infsa_scores
from infsa_kernels.graph import TokenGraph, eigenvector_centrality, fundamental_matmul, katz_centrality, pagerank

from . import machine

H, D, GAMMA, TOL = 16, 64, 0.9, 1e-6
DENSE_TOKENS = (1024, 4096)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.graph", description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=65536, help="of the largest graph")
    parser.add_argument("--out", type=Path, help="a file to write the lines to, too")
    args = parser.parse_args()
    lines = []
    for line in measurements(args.tokens):
        print(line, flush=True)
        lines.append(line)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text("\n".join(lines) + "\n")


def measurements(tokens: int) -> Iterator[str]:
    load = machine.OtherLoad()
    yield machine.describe(machine.environment(torch.device("cpu")))
    yield from gate()
    for number in DENSE_TOKENS:
        yield beside_dense(number)
    yield large(tokens)
    share = load.share()
    yield f"others took {share:.0%} of the processor" if share is not None else "what others took is not known"


def queries(tokens: int, heads: int = H, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(1, heads, tokens, D, generator=torch.Generator().manual_seed(0), dtype=dtype)


def dense(q: Tensor) -> Tensor:
    """Katz centrality by a matrix and a solution per head: (B, H, N)."""
    ones = q.new_ones(*q.shape[:3], 1)
    system = torch.eye(q.shape[2], dtype=q.dtype) - GAMMA * pure_infsa_scores(q, q, 1.0).mT
    return torch.linalg.solve(system, ones).squeeze(-1)


def gate() -> list[str]:
    """Lines of errors, of which none exceeds what was asked for by more than float32's rounding."""
    import networkx
    from scipy.sparse.linalg import LinearOperator, gmres

    q = queries(1024, 2)
    truth = dense(q.double())
    found = katz_centrality(TokenGraph(q), GAMMA, tol=TOL).double()
    errors = {
        "Katz, 1,024 tokens, beside dense float64": ((found - truth).norm(dim=-1) / truth.norm(dim=-1)).max().item()
    }

    exact = TokenGraph(q.double())
    one = exact.linear_operator(0, 1)
    system = LinearOperator(one.shape, lambda x: x - GAMMA * one.rmatvec(x), dtype=one.dtype)
    theirs, code = gmres(system, torch.ones(1024, dtype=torch.float64).numpy(), rtol=1e-12)
    assert code == 0
    theirs = torch.from_numpy(theirs)
    ours = katz_centrality(exact, GAMMA, tol=1e-9)[0, 1]
    errors["the same in float64, beside scipy's gmres"] = ((ours - theirs).norm() / theirs.norm()).item()

    small = TokenGraph(queries(60, 1, torch.float64))
    graph = networkx.from_numpy_array(small.dense()[0, 0].numpy(), create_using=networkx.DiGraph)
    options = dict(tol=1e-12, normalized=False, weight="weight", max_iter=5000)
    for name, mine, values in (
        ("Katz", katz_centrality(small, GAMMA, tol=1e-9), networkx.katz_centrality(graph, GAMMA, 1.0, **options)),
        ("PageRank", pagerank(small, tol=1e-10), networkx.pagerank(graph, tol=1e-14)),
        (
            "eigenvector",
            eigenvector_centrality(small, tol=1e-9),
            networkx.eigenvector_centrality_numpy(graph, "weight"),
        ),
    ):
        expected = torch.tensor(list(values.values()), dtype=torch.float64).abs()
        errors[f"{name}, 60 tokens, beside networkx"] = ((mine[0, 0] - expected).norm() / expected.norm()).item()
    errors["gradients of fundamental_matmul, float64"] = _gradient_error()
    wrong = {name: error for name, error in errors.items() if error > (5e-6 if "dense float64" in name else 1e-7)}
    if wrong:
        raise SystemExit(f"wrong: {wrong}")
    return [f"{name:48} error {error:.1e}" for name, error in errors.items()]


def _gradient_error() -> float:
    """Of q, x and gamma, beside autograd through the dense inverse."""
    leaves = [
        queries(100, 2, torch.float64),
        torch.randn(1, 2, 100, 3, dtype=torch.float64),
        torch.tensor(GAMMA).double(),
    ]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    q, x, gamma = leaves
    seed = torch.randn_like(x)
    system = torch.eye(100, dtype=q.dtype) - gamma * pure_infsa_scores(q, q, 1.0)
    solutions = fundamental_matmul(TokenGraph(q), x, gamma, tol=1e-12), torch.linalg.solve(system, x)
    ours, theirs = (torch.autograd.grad((y * seed).sum(), leaves) for y in solutions)
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(ours, theirs))


def beside_dense(tokens: int, turns: int = 3) -> str:
    q = queries(tokens)
    g = TokenGraph(q)
    times = {"ours": [], "dense": []}
    for _ in range(turns):
        times["ours"].append(_seconds(lambda: katz_centrality(g, GAMMA, tol=TOL)))
        # One head after the other: as a batch, the matrices' fresh memory would cost it more than a tenth.
        times["dense"].append(_seconds(lambda: [dense(head) for head in q.split(1, 1)]))
    product = _seconds(g.column_sums)
    _, info = katz_centrality(g, GAMMA, tol=TOL, return_info=True)
    ours, theirs = (1e3 * statistics.median(t) for t in times.values())
    ratios = sorted(b / a for a, b in zip(*times.values()))
    return (
        f"{tokens:,} tokens: Katz {ours:.1f} ms, dense solution {theirs:.0f} ms: {statistics.median(ratios):.1f} x faster "
        f"({ratios[0]:.1f} to {ratios[-1]:.1f} in {turns} turns); {info.products} products, one takes {1e3 * product:.1f} ms"
    )


def large(tokens: int) -> str:
    g = TokenGraph(queries(tokens))
    before = _memory("VmRSS")
    _forget_peak()
    product = _seconds(g.column_sums)
    begin = time.perf_counter()
    _, info = katz_centrality(g, GAMMA, tol=TOL, return_info=True)
    seconds = time.perf_counter() - begin
    extra = (_memory("VmHWM") - before) / 1024
    return (
        f"{tokens:,} tokens: Katz {seconds:.1f} s, a product {product:.1f} s: {seconds / product:.1f} products' time for "
        f"{info.products} products, error below {info.error.max():.0e}; {extra:.0f} MB beyond q"
    )


def _seconds(call) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _memory(name: str) -> int:
    """kB, of Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    main()

"""The token graph and its centralities, against dense float64 algebra, networkx and scipy."""

import networkx
import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from scipy.stats import spearmanr

import infsa_kernels
from infsa_kernels import reference
from infsa_kernels.graph import (
    TokenGraph,
    absorption_probability,
    eigenvector_alignment,
    eigenvector_centrality,
    fundamental_matmul,
    katz_centrality,
    multi_hop_infsa,
    pagerank,
)
from infsa_kernels.memory import kept_memory

TIED = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


def tokens(*shape, tied=True, dtype=torch.float64, offset=0.3):
    q = torch.randn(shape, dtype=dtype) + offset
    return q, (q if tied else torch.randn(shape, dtype=dtype) + offset)


def dense(q, k, key_padding_mask=None, query_padding_mask=None):
    return reference.pure_scores(q.double(), k.double(), 1.0, 1e-6, key_padding_mask, query_padding_mask)


def inverse(A, gamma):
    return torch.linalg.inv(
        torch.eye(A.shape[-1], dtype=A.dtype) - torch.as_tensor(gamma, dtype=A.dtype).reshape(-1, 1, 1) * A
    )


def values(by_token):
    return torch.tensor(list(by_token.values()), dtype=torch.float64)


def close(got, expected, rtol=1e-9):
    torch.testing.assert_close(got.double(), expected.double(), rtol=rtol, atol=rtol * float(expected.abs().max()))


@TIED
def test_products_norm_and_rows_are_those_of_the_matrix(tied):
    q, k = tokens(2, 3, 37, 5, tied=tied)
    k = k if tied else torch.randn(2, 3, 23, 5, dtype=torch.float64)
    g, A = TokenGraph(q, k), dense(q, k)
    x, y = torch.randn(2, 3, k.shape[2], 4, dtype=q.dtype), torch.randn(2, 3, 37, 4, dtype=q.dtype)
    close(g.matmul(x), A @ x)
    close(g.rmatmul(y), A.mT @ y)
    close(g.dense(), A)
    close(g.row_sums(), A.sum(-1))
    close(g.column_sums(), A.sum(-2))
    close(g.norm, torch.relu(q @ k.mT / 5).norm(dim=(-2, -1)))
    close(g.scores([3, -1, 3]), A[:, :, [3, -1, 3]])
    weights, ends = g.neighbors(torch.tensor([0, 36]), 4)
    close(weights, A[:, :, [0, 36]].topk(4).values)
    close(A[:, :, [0, 36]].gather(-1, ends), weights)


@TIED
def test_one_head_as_a_linear_operator_of_scipy(tied):
    q, k = tokens(2, 3, 40, 5, tied=tied)
    operator, A = TokenGraph(q, k).linear_operator(1, 2), dense(q, k)[1, 2].numpy()
    x = np.random.default_rng(0).standard_normal((40, 3))
    np.testing.assert_allclose(operator @ x, A @ x, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(operator.H @ x[:, 0], A.T @ x[:, 0], rtol=1e-10, atol=1e-12)
    if tied:
        largest = scipy.sparse.linalg.eigsh(operator, 1, return_eigenvectors=False)
        np.testing.assert_allclose(largest, np.linalg.eigvalsh(A)[-1:], rtol=1e-8)


@TIED
@pytest.mark.parametrize("gamma", [0.1, 0.9, 0.999])
def test_fundamental_matrix_against_the_dense_inverse(tied, gamma):
    q, k = tokens(2, 3, 61, 6, tied=tied)
    x = torch.randn(2, 3, 61, 4, dtype=q.dtype)
    y, info = fundamental_matmul(TokenGraph(q, k), x, gamma, tol=1e-10, return_info=True)
    expected = inverse(dense(q, k), gamma) @ x
    assert ((y - expected).norm(dim=-2) <= 1e-10 * expected.norm(dim=-2)).all()
    assert info.error.shape == (2, 3)
    assert (info.error <= 1e-10).all()
    assert 2 < info.products < 100


@TIED
@pytest.mark.parametrize("direction", ["in", "out"])
def test_katz_against_the_dense_inverse_and_networkx(tied, direction):
    q, k = tokens(1, 2, 30, 6, tied=tied)
    gamma = torch.tensor([0.5, 0.9], dtype=torch.float64)
    found = katz_centrality(TokenGraph(q, k), gamma, direction, tol=1e-10)
    N = inverse(dense(q, k), gamma)
    close(found, N.sum(-2 if direction == "in" else -1), 1e-8)
    if direction == "in":
        graph = networkx.from_numpy_array(dense(q, k)[0, 1].numpy(), create_using=networkx.DiGraph)
        theirs = networkx.katz_centrality(graph, 0.9, 1.0, tol=1e-12, normalized=False, weight="weight", max_iter=5000)
        close(found[0, 1], values(theirs), 1e-8)


@TIED
def test_eigenvector_centrality_and_pagerank_are_those_of_networkx(tied):
    q, k = tokens(1, 2, 30, 6, tied=tied)
    g = TokenGraph(q, k)
    ranks, central = pagerank(g, tol=1e-12), eigenvector_centrality(g, tol=1e-12)
    personal = torch.rand(30, dtype=torch.float64)
    personal_ranks = pagerank(g, 0.7, personal, tol=1e-12)
    for head in range(2):
        graph = networkx.from_numpy_array(dense(q, k)[0, head].numpy(), create_using=networkx.DiGraph)
        close(ranks[0, head], values(networkx.pagerank(graph, tol=1e-14)), 1e-9)
        theirs = networkx.pagerank(graph, 0.7, dict(enumerate(personal.tolist())), tol=1e-14)
        close(personal_ranks[0, head], values(theirs), 1e-9)
        theirs = networkx.eigenvector_centrality_numpy(graph, "weight")
        close(central[0, head], values(theirs).abs(), 1e-8)


def test_eigenvector_of_a_graph_whose_cycles_are_all_even():
    """Keys are the queries with their two halves exchanged: without a shift the iteration swings for ever."""
    q = torch.eye(2, dtype=torch.float64).repeat_interleave(3, 0)[None, None]
    k = q.flip(-1)
    q = torch.cat([q[:, :, :3], 2 * q[:, :, 3:]], 2)
    central = eigenvector_centrality(TokenGraph(q, k), tol=1e-10)
    A = dense(q, k)
    assert (A[0, 0, :3, :3] == 0).all() and (A[0, 0, 3:, 3:] == 0).all()
    values, vectors = np.linalg.eig(A[0, 0].T.numpy())
    close(central[0, 0], torch.tensor(np.abs(vectors[:, values.real.argmax()].real)), 1e-8)


def test_pagerank_of_tokens_that_no_edge_leaves():
    q, k = tokens(1, 1, 20, 4, tied=False)
    q[:, :, 5:8] = 0
    g = TokenGraph(q, k)
    assert (g.row_sums()[..., 5:8] == 0).all()
    graph = networkx.from_numpy_array(dense(q, k)[0, 0].numpy(), create_using=networkx.DiGraph)
    close(pagerank(g, tol=1e-12)[0, 0], values(networkx.pagerank(graph, tol=1e-14)), 1e-9)


@TIED
@pytest.mark.parametrize("hops", [1, 3, None])
def test_multi_hop_is_the_sum_of_powers(tied, hops):
    q, k = tokens(2, 3, 25, 5, tied=tied)
    v = torch.randn(2, 3, 25, 7, dtype=q.dtype)
    A, gamma = dense(q, k), torch.tensor([0.3, 0.6, 0.9], dtype=q.dtype)
    steps = gamma[:, None, None] * A
    expected = sum(torch.linalg.matrix_power(steps, t) @ v for t in range(1, (hops or 400) + 1))
    close(multi_hop_infsa(q, k, v, gamma, hops, tol=1e-11), expected, 1e-9)
    if hops == 1:
        close(multi_hop_infsa(q, k, v, 0.5, hops), 0.5 * infsa_kernels.pure_infsa(q, k, v, rho=1.0), 1e-12)


@TIED
@pytest.mark.parametrize("per_head", [True, False], ids=["per_head", "one"])
@pytest.mark.one_in(2)
def test_gradients_of_every_order(tied, per_head):
    q, k = (t.clone().requires_grad_() for t in tokens(1, 2, 4, 2, tied=tied, offset=0.8))
    x = torch.randn(1, 2, 4, 1, dtype=torch.float64, requires_grad=True)
    gamma = torch.tensor([0.4, 0.8] if per_head else 0.7, dtype=torch.float64, requires_grad=True)

    def solved(q, k, x, gamma):
        return fundamental_matmul(TokenGraph(q, q if tied else k), x, gamma, tol=1e-13)

    def hopped(q, k, x, gamma):
        return multi_hop_infsa(q, q if tied else k, x, gamma, hops=3)

    for function in (solved, hopped):
        assert torch.autograd.gradcheck(function, (q, k, x, gamma), atol=1e-7)
        assert torch.autograd.gradgradcheck(function, (q, k, x, gamma), atol=1e-6)


@TIED
def test_implicit_gradients_are_those_of_the_dense_inverse(tied):
    q, k = tokens(2, 2, 33, 4, tied=tied)
    x, seed = torch.randn(2, 2, 2, 33, 3, dtype=q.dtype).unbind()
    gamma = torch.tensor([0.5, 0.9], dtype=q.dtype)
    leaves = [t.clone().requires_grad_() for t in (q, k, x, gamma)]

    def gradients(solve):
        a, b, x, gamma = leaves
        y = solve(a, a if tied else b, x, gamma)
        return torch.autograd.grad((y * seed).sum(), leaves, allow_unused=True)

    ours = gradients(lambda q, k, x, gamma: fundamental_matmul(TokenGraph(q, k), x, gamma, tol=1e-12))
    theirs = gradients(lambda q, k, x, gamma: inverse(dense(q, k), gamma) @ x)
    for got, expected in zip(ours, theirs):
        if expected is not None:
            close(got, expected, 1e-7)


@TIED
def test_padding_is_removed_whatever_it_holds(tied):
    q, k = tokens(2, 3, 20, 5, tied=tied)
    mask = torch.zeros(2, 20, dtype=torch.bool)
    mask[1, 13:] = True
    v = torch.randn(2, 3, 20, 4, dtype=q.dtype)
    alone = [t[1:, :, :13].clone() for t in (q, k, v)]
    for t in {id(t): t for t in (q, k, v)}.values():
        t[1, :, 13:] = torch.nan
    g = TokenGraph(q, k, key_padding_mask=mask, query_padding_mask=mask)
    one = TokenGraph(alone[0], alone[0] if tied else alone[1])
    functions = (katz_centrality, pagerank, eigenvector_centrality, lambda g: katz_centrality(g, 0.5, "out"))
    for function in functions:
        found = function(g)
        close(found[1:, :, :13], function(one), 1e-5)
        assert (found[1, :, 13:] == 0).all()
    close(fundamental_matmul(g, v)[1:, :, :13], fundamental_matmul(one, alone[2]), 1e-5)
    for found in (g.row_sums(), g.column_sums(), absorption_probability(g, 0.1), g.norm[..., None], g.scores([3])):
        assert found.isfinite().all()
    close(g.norm[1:], one.norm)
    close(g.scores([3])[1:, ..., :13], one.scores([3]))
    weights, ends = g.neighbors([3], 20)
    assert (ends[1][weights[1] > 0] < 13).all()
    close(multi_hop_infsa(q, k, v, 0.9, 2, 1e-6, mask, mask)[1:, :, :13], multi_hop_infsa(*(
        (alone[0], alone[0]) if tied else alone[:2]), alone[2], 0.9, 2))  # fmt: skip


def test_heads_without_a_positive_score():
    q = torch.ones(1, 2, 9, 3)
    k = torch.stack([torch.ones(1, 9, 3), -torch.ones(1, 9, 3)], 1)
    g = TokenGraph(q, k)
    assert (g.row_sums()[0, 1] == 0).all()
    assert (katz_centrality(g)[0, 1] == 1).all()
    assert (absorption_probability(g)[0, 1] == 1).all()
    torch.testing.assert_close(pagerank(g)[0, 1], torch.full((9,), 1 / 9))
    torch.testing.assert_close(eigenvector_centrality(g)[0, 1], torch.full((9,), 1 / 3))
    assert (multi_hop_infsa(q, k, torch.ones(1, 2, 9, 3))[0, 1] == 0).all()


def test_one_token():
    q = torch.full((1, 1, 1, 4), 2.0, dtype=torch.float64)
    g = TokenGraph(q)
    close(katz_centrality(g, 0.9), torch.tensor([[[1 / (1 - 0.9 * 4 / (4 + 1e-6))]]], dtype=torch.float64), 1e-6)
    assert pagerank(g).item() == eigenvector_centrality(g).item() == 1


def test_a_hub_has_no_absorption_probability():
    """One token that scores with all others: its edges sum to more than 1, so 1 - gamma sum is no probability."""
    q = torch.zeros(1, 1, 50, 50, dtype=torch.float64)
    q[0, 0, 0] = 1
    k = torch.eye(50, dtype=torch.float64)[None, None]
    g = TokenGraph(q, k)
    assert g.row_sums()[0, 0, 0] > 7
    lost = absorption_probability(g, 0.5)
    assert lost[0, 0, 0].isnan()
    close(lost[0, 0, 1:], torch.ones(49))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_lower_precision_is_that_of_its_input(dtype):
    q, k = tokens(1, 2, 300, 16, tied=False, dtype=dtype)
    expected = inverse(dense(q, k), 0.9).sum(-2)
    found = katz_centrality(TokenGraph(q, k))
    assert found.dtype == torch.float32
    assert (found.double() - expected).norm() <= 3e-6 * expected.norm()
    v = torch.randn(1, 2, 300, 8, dtype=dtype)
    assert multi_hop_infsa(q, k, v).dtype == dtype


def test_alignment_with_the_perron_vector():
    q, _ = tokens(2, 3, 40, 5)
    mask = torch.zeros(2, 40, dtype=torch.bool)
    mask[1, 30:] = True
    q[1, :, 30:] = torch.nan
    found = eigenvector_alignment(q, mask, tol=1e-12)
    for b, length in ((0, 40), (1, 30)):
        for h in range(3):
            part = q[b : b + 1, h : h + 1, :length]
            perron = np.abs(np.linalg.eigh(dense(part, part)[0, 0].numpy())[1][:, -1])
            weights = reference.linear_scores(part, part)[0, 0].numpy()
            cosine = weights @ perron / np.linalg.norm(weights)
            np.testing.assert_allclose(found["cosine"][b, h], cosine, rtol=1e-6)
            np.testing.assert_allclose(found["spearman"][b, h], spearmanr(perron, weights)[0], rtol=1e-6)
            np.testing.assert_allclose(found["uniform_cosine"][b, h], perron.sum() / length**0.5, rtol=1e-6)


def test_nothing_as_large_as_the_matrix_is_held():
    """Allocations of a Katz centrality, counted: N = 8192 would take 256 MiB as a float32 matrix per head."""
    q = torch.randn(1, 2, 8192, 16)
    infsa_kernels.release_memory()
    with torch.profiler.profile(profile_memory=True) as profiler:
        katz_centrality(TokenGraph(q))
    largest = max(e.nbytes() for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]")
    # The profiler does not see what the CPU kernels keep: all that they took and that is big.
    assert 0 < largest < 16 * 2**20 and kept_memory() < 16 * 2**20


BAD = [
    (lambda g, x: katz_centrality(g, 1.0), "gamma is 1.0, expected between 0 and 1"),
    (lambda g, x: katz_centrality(g, torch.tensor([0.5, 1.5])), r"gamma is \[0.5, 1.5\]"),
    (lambda g, x: katz_centrality(g, torch.rand(3)), r"gamma has shape \[3\], expected \[\], \[1\] or \(H,\) = \[2\]"),
    (lambda g, x: katz_centrality(g, direction="up"), "direction is 'up', expected 'in'"),
    (lambda g, x: pagerank(g, 1.5), "damping is 1.5"),
    (lambda g, x: pagerank(g, personalization=torch.ones(5)), r"personalization has shape \[5\]"),
    (lambda g, x: pagerank(g, personalization=torch.zeros(9)), "0 everywhere"),
    (lambda g, x: g.matmul(x[:, :, 1:]), r"x has shape \[1, 2, 8, 3\], expected \(B, H, rows, c\) = \[1, 2, 9\]"),
    (lambda g, x: fundamental_matmul(g, x[..., 0]), r"x has shape \[1, 2, 9\]"),
    (lambda g, x: fundamental_matmul(TokenGraph(x, x[:, :, 1:]), x), "9 queries and 8 keys"),
    (lambda g, x: pagerank(TokenGraph(x, x[:, :, 1:])), "9 queries and 8 keys"),
    (lambda g, x: TokenGraph(x[0]), r"q has shape \[2, 9, 3\], expected \(B, H, N, d\)"),
    (lambda g, x: TokenGraph(x, x[:, :1]), "k has shape"),
    (lambda g, x: g.scores([9]), "expected indices below N = 9"),
    (lambda g, x: g.neighbors(0, 10), "top is 10, expected an int, 1 to 9"),
    (lambda g, x: g.linear_operator(1, 0), "batch is 1, expected an index below 1"),
    (lambda g, x: multi_hop_infsa(x, x, x, hops=0), "hops is 0, expected an int, 1 or more"),
    (lambda g, x: multi_hop_infsa(x, x, x, hops=2.0), "hops is 2.0, expected an int, 1 or more"),
    (lambda g, x: katz_centrality(g, tol=0), "tol is 0, expected a number above 0"),
    (lambda g, x: multi_hop_infsa(x, x, x, tol=float("nan")), "tol is nan, expected a number above 0"),
    (lambda g, x: pagerank(g, tol=-1.0), "tol is -1.0, expected a number above 0"),
    (lambda g, x: eigenvector_centrality(g, tol="small"), "tol is 'small', a str, expected a number above 0"),
    (lambda g, x: eigenvector_centrality(g, max_products=0), "max_products is 0, expected an int, 1 or more"),
    (lambda g, x: pagerank(g, max_products=True), "max_products is True, expected an int, 1 or more"),
    (lambda g, x: pagerank(g, "high"), "damping is 'high', a str, expected a number between 0 and 1"),
    (lambda g, x: absorption_probability(g, "0.9"), "gamma is '0.9', a str, expected between 0 and 1"),
    (lambda g, x: absorption_probability(TokenGraph(x, x[:, :, 1:])), "9 queries and 8 keys"),
    (lambda g, x: eigenvector_centrality(TokenGraph(x, x[:, :, 1:])), "9 queries and 8 keys"),
    (lambda g, x: g.matmul(x + 0j), "x has dtype torch.complex64, expected real numbers"),
    (lambda g, x: fundamental_matmul(g, x + 0j), "x has dtype torch.complex64, expected real numbers"),
    (lambda g, x: g.linear_operator(0, 0) @ np.full(9, 1j), "x has dtype torch.complex128, expected real numbers"),
]


@pytest.mark.parametrize("call, message", BAD, ids=[message for _, message in BAD])
def test_bad_input_is_named(call, message):
    x = torch.randn(1, 2, 9, 3)
    with pytest.raises((ValueError, TypeError), match=message):
        call(TokenGraph(x), x)


def test_no_convergence_names_products_and_error():
    q, k = tokens(1, 1, 60, 3, tied=False, dtype=torch.float32)
    with pytest.raises(RuntimeError, match=r"after 3 products the error is bounded by .*, expected tol = 1.0e-12"):
        eigenvector_centrality(TokenGraph(q, k), tol=1e-12, max_products=3)


@pytest.mark.parametrize("function", [katz_centrality, eigenvector_centrality, pagerank])
def test_nan_stays_in_its_head(function):
    q = torch.rand(1, 2, 9, 3)
    expected = function(TokenGraph(q))
    q[0, 1, 4] = torch.nan
    found = function(TokenGraph(q))
    assert found[0, 1].isnan().any()
    torch.testing.assert_close(found[0, 0], expected[0, 0], rtol=1e-5, atol=1e-6)


@TIED
def test_nan_stays_in_its_column(tied):
    q, k = tokens(1, 2, 9, 3, tied=tied)
    x = torch.randn(1, 2, 9, 3, dtype=q.dtype)
    expected = fundamental_matmul(TokenGraph(q, k), x)
    x[0, 1, 4, 2] = torch.nan
    found = fundamental_matmul(TokenGraph(q, k), x)
    assert found[0, 1, :, 2].isnan().all()
    expected[0, 1, :, 2] = torch.nan
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_columns_of_zeros_and_graphs_of_no_token():
    g = TokenGraph(tokens(1, 2, 9, 3)[0])
    assert (fundamental_matmul(g, torch.zeros(1, 2, 9, 2, dtype=torch.float64)) == 0).all()
    empty = TokenGraph(torch.zeros(1, 2, 0, 3))
    assert katz_centrality(empty).shape == (1, 2, 0)
    assert fundamental_matmul(g, torch.zeros(1, 2, 9, 0, dtype=torch.float64)).shape == (1, 2, 9, 0)


@TIED
@pytest.mark.parametrize("dtype, tol, bound", [(torch.float64, 1e-12, 2e-12), (torch.float32, 1e-6, 1e-5)])
def test_columns_that_are_done_early_stay_right(tied, dtype, tol, bound):
    """A few tokens: some columns are solved to the last bit while others still iterate."""
    for N in (2, 3, 5, 9):
        q, k = tokens(1, 100, N, 8, tied=tied, dtype=dtype, offset=0)
        x = torch.randn(1, 100, N, 8, dtype=dtype)
        y = fundamental_matmul(TokenGraph(q, k), x, 0.95, tol)
        expected = inverse(dense(q, k), 0.95) @ x.double()
        assert ((y - expected).norm(dim=-2) <= bound * expected.norm(dim=-2)).all()

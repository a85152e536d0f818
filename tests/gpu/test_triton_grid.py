"""What is decided before a Triton kernel starts: grids, sizes that are refused, the device. On meta tensors, so at any size."""

import ast
import itertools
from pathlib import Path

import pytest
import torch
from helpers.calls import OPS
from helpers.triton_resources import read
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

from infsa_kernels.eager import pure as eager
from infsa_kernels.ops import linear as linear_op
from infsa_kernels.ops import pure as pure_op
from infsa_kernels.triton import (
    central_query,
    configs,
    launch,
    linear,
    linear_backward,
    linear_fold,
    pure,
    pure_backward,
    pure_tied,
    score_pool,
)

RAW = {"linear": linear_op.raw, "pure": pure_op.raw}
by_op = pytest.mark.parametrize("op", OPS)
by_tie = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
LIMIT = (1 << 31) - 1


class Recorder:
    """Stands for every kernel: notes its grids."""

    def __init__(self):
        self.grids, self.inside = [], None

    def __getitem__(self, grid):
        return lambda *args, **options: self.grids.append((*grid, self.inside))


@pytest.fixture
def kernels(monkeypatch):
    recorder = Recorder()
    for module in (linear, linear_backward, linear_fold, pure, pure_backward, pure_tied):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, recorder)
    return recorder


def run(op, B, H, N, d=16, tied=False, layout="bhnd", M=None):
    """Forward and backward of a call of this size, none of whose tokens takes memory."""

    def tensor(length):
        if layout == "nbhd":
            return torch.empty(length, B, H, d, dtype=torch.float16, device="meta").permute(1, 2, 0, 3)
        return torch.empty(B, H, 1, d, dtype=torch.float16, device="meta").expand(B, H, length, d)

    q, k, v = tensor(N), None if tied else tensor(M or N), tensor(N if tied else M or N)
    forward, backward = {"linear": (linear.forward, linear.backward), "pure": (pure.forward, pure.backward)}[op]
    out, *saved = forward(q, k, v, 1e-6, 1.0, None, None, None)
    saved = [out, *saved] if op == "pure" else saved
    arguments = torch.empty_like(out), q, k, v, *saved, 1e-6, 1.0, None, None, None
    backward(*arguments, RAW[op].gradients((*arguments, [True] * 4)))


@by_op
@by_tie
@pytest.mark.parametrize(("B", "H"), [(70000, 1), (1, 70000), (350, 200)])
@pytest.mark.parametrize("layout", ["bhnd", "nbhd"])
def test_many_heads_fit_into_one_dimension_of_the_grid(op, tied, B, H, layout, kernels):
    run(op, B, H, 600, tied=tied, layout=layout)
    assert len(kernels.grids) >= 3
    heads_each = 4 if op == "linear" else 1  # 128 bytes of 16 float16
    for programs, _ in kernels.grids:
        assert 70000 // heads_each <= programs <= LIMIT


@by_op
def test_long_sequences_keep_every_token_countable(op, kernels):
    run(op, 1, 1, 1 << 30)
    assert all(programs <= LIMIT for programs, _ in kernels.grids)
    config = configs.Linear(heads=1, tokens=32, num_warps=4, programs=792)
    for groups in (1, 3, 100, 791):
        splits, split_tokens = config.splits(1 << 30, groups)
        assert (splits - 1) * split_tokens < 1 << 30 <= splits * split_tokens
        assert splits * split_tokens + config.tokens <= LIMIT  # the farthest token a program ever names


# As sold and as cut: a slice of an H100, one for PCIe, for SXM; an A100; RTX 4060 and 5090; and what no table knows.
DEVICES = [
    ("sm_90", 16),
    ("sm_90", 114),
    ("sm_90", 132),
    ("sm_80", 108),
    ("sm_120", 24),
    ("sm_120", 170),
    ("sm_100", 1),
]


@pytest.mark.parametrize(("arch", "size"), DEVICES)
@pytest.mark.parametrize("H", [1, 4, 64])
def test_linear_fills_the_gpu_once(arch, size, H, monkeypatch, kernels):
    """With as many programs as its multiprocessors hold, by the registers in the table of what the kernels compile to."""
    monkeypatch.setattr(configs, "arch_of", lambda device: arch)
    monkeypatch.setattr(configs, "multiprocessors", lambda device: size)
    N = 1 << 24  # so many steps that rounding hardly shows
    fits = {
        direction: min(
            int(row["per_SM"])
            for row in read()[1]
            if row["arch"] == arch
            and row["kernel"] == f"linear_{direction}_keys"
            and row["tile"].endswith("/w4")
            and row["case"].startswith(("bf16", "fp16"))
            and not {"packed", "floor", "d256"} & set(row["case"].split("/"))
        )
        for direction in ("fwd", "bwd")
    }
    run("linear", 1, H, N)
    found = iter([programs for programs, _ in kernels.grids])
    for direction in ("fwd", "bwd"):
        programs, each = next(found), max(1, size * fits[direction] // H)
        assert 0.95 * each * H <= programs <= each * H
        if programs * (programs // H) * 17 * 4 > size * fits[direction] * (32 << 10):
            assert next(found) == H
        if direction == "bwd" or each > 1:  # a whole head group in one program needs no second launch forward
            assert next(found) == programs
    assert next(found, None) is None


def test_what_fits_on_a_multiprocessor_is_what_the_table_says():
    of_direction = {"forward": "linear_fwd_keys", "backward": "linear_bwd_keys"}
    larger = "/d72", "/d256"
    rows = [r for r in read()[1] if r["tile"].endswith("/w4") and not any(d in r["case"] for d in larger)]
    for (arch, direction), by_kind in configs.RESIDENT.items():
        found = {}
        for row in rows:
            if (row["arch"], row["kernel"]) == (arch, of_direction[direction]):
                kind = 2 * ("/packed" in row["case"]) + ("/floor" in row["case"]), row["case"].startswith("fp32")
                found[kind] = min(found.get(kind, 99), int(row["per_SM"]))
        assert found == {(kind, wide): by_kind[kind][wide] for kind in range(4) for wide in (False, True)}
    assert {arch for arch, _ in configs.RESIDENT} == set(configs.MULTIPROCESSORS)


# Bytes of partial sums that the programs of the second launch read, H100 SXM, d = 16 in bfloat16: docs/triton.md has these.
READ = {
    # H, N: forward, and with a launch of its own; backward
    (64, 65536): (10.4, 10.4, 6.9, 6.9),
    (16, 65536): (38.0, 0.4, 25.6, 0.3),
    (4, 65536): (126.9, 0.4, 67.1, 0.3),
    (1, 65536): (17.8, 17.8, 16.8, 16.8),
    (64, 4096): (8.0, 8.0, 4.2, 4.2),
    (4, 4096): (4.5, 4.5, 4.2, 4.2),
}


@pytest.mark.parametrize(("H", "N"), READ)
def test_partial_sums_that_are_read(H, N, kernels, monkeypatch):
    q = torch.empty(1, N, H, 16, dtype=torch.bfloat16, device="meta").transpose(1, 2)
    monkeypatch.setattr(configs, "arch_of", lambda device: "sm_90")
    found = []
    for direction, width in (("forward", 17), ("backward", 16)):
        config = configs.linear(q, q, N, direction)
        groups = -(-H // config.heads)
        splits, _ = config.splits(N, groups)
        each = splits * config.heads * width * 4  # of a program that adds up for itself
        folded = 2 * groups * each  # each part once, and a total per program
        by_all = groups * splits * each
        found += [by_all, folded if config.folds(splits, 16, groups * splits) else by_all]
    assert [round(count / 1e6, 1) for count in found] == list(READ[H, N])


@pytest.mark.parametrize("size", [24, 132, 170])
@pytest.mark.parametrize("d", [1, 16, 64, 256])
@pytest.mark.parametrize("layout", ["bhnd", "nbhd"])
def test_a_gpu_reads_few_partial_sums(size, d, layout, monkeypatch):
    """However long the sequence and however few the heads: 192 KB a multiprocessor that holds 6 programs."""
    monkeypatch.setattr(configs, "arch_of", lambda device: "sm_90")
    monkeypatch.setattr(configs, "multiprocessors", lambda device: size)
    for H, N in itertools.product((1, 4, 64), (513, 4096, 65536, 1 << 20)):
        steps = (d, H * d) if layout == "nbhd" else (N * d, d)
        q = torch.empty(1, device="meta", dtype=torch.bfloat16).as_strided((1, H, N, d), (0, *steps, 1))
        config = configs.linear(q, q, N, "forward")
        groups = -(-H // config.heads)
        splits, _ = config.splits(N, groups)
        parts = 1 if config.folds(splits, d, groups * splits) else splits
        assert groups * splits * parts * config.heads * (d + 1) * 4 <= size * 192 << 10


@by_op
@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"N": (1 << 31) + 1}, "N is 2147483649"),
        ({"N": 5, "M": (1 << 30) + 1}, "M is 1073741825"),
        ({"B": 1 << 16, "H": 1 << 15}, r"B \* H is 2147483648"),
        ({"H": 1 << 27}, r"H \* d is 2147483648"),
    ],
)
def test_sizes_past_32_bits_are_refused_before_a_launch(op, sizes, words, kernels):
    with pytest.raises(ValueError, match=f"infsa::{op}: {words}, the Triton kernels take up to 1073741824; split"):
        run(op, **{"B": 1, "H": 1, "N": 5} | sizes)
    assert kernels.grids == []


@pytest.mark.parametrize(
    ("op", "sizes", "words"),
    [
        ("central_query", (1, (1 << 30) + 1, 1, 16), "N is 1073741825"),
        ("central_query", (1, 5, 1 << 27, 16), r"H \* d is 2147483648"),
        ("score_pool", (1 << 16, 5, 1 << 15, 1), r"B \* H is 2147483648"),
    ],
)
def test_sizes_of_the_pooled_layer_past_32_bits_are_refused_before_a_launch(op, sizes, words):
    B, N, H, d = sizes
    x = torch.empty(B, 1, 8, device="meta").expand(B, N, 8)
    module, of_heads = {"central_query": (central_query, (H, d, 8)), "score_pool": (score_pool, (B, H, 8))}[op]
    with pytest.raises(ValueError, match=f"infsa::{op}: {words}, the Triton kernels take up to 1073741824; split"):
        module.forward(x, torch.empty(1, 1, 1, device="meta").expand(of_heads), None, None, 1e-6, None)


def test_too_many_programs_are_refused_before_a_launch(kernels):
    # 2^26 heads of 64 blocks of 128 rows or of 32 of 256.
    with pytest.raises(
        ValueError, match="programs of a Triton kernel, the GPU starts up to 2147483647 at a time; split"
    ):
        run("pure", 1 << 26, 1, 8192)
    assert kernels.grids == []


def test_the_output_is_laid_out_as_q_also_where_q_is_copied(kernels):
    q = torch.empty(8, 1 << 20, 2, 16, dtype=torch.float16, device="meta").permute(1, 2, 0, 3)
    out, _ = pure.forward(q, None, q, 1e-6, 1.0, None, None, None)
    assert out.stride() == eager.output_like(q, q).stride()


def test_steps_between_tokens_of_pure_that_tiles_cannot_take(kernels):
    with pytest.raises(
        ValueError, match=r"16777216 elements from token to token, .* fewer than 8388608; pass q.contig"
    ):
        run("pure", 1, 1 << 20, 5, layout="nbhd")
    assert kernels.grids == []


@pytest.mark.parametrize(("hip", "largest"), [(None, LIMIT), ("7.0", ((1 << 32) - 1) // 512)])
def test_the_largest_grid(hip, largest, monkeypatch, kernels):
    monkeypatch.setattr(torch.version, "hip", hip)
    kernel = Recorder()
    launch.Launch(kernel, largest, torch.device("cpu"), num_warps=8)()
    with pytest.raises(ValueError, match=f"needs {largest + 1} programs"):
        launch.Launch(kernel, largest + 1, torch.device("cpu"), num_warps=8)
    assert kernel.grids == [(largest, None)]


@pytest.mark.parametrize(("at", "guarded"), [("cuda:1", 1), ("cuda:0", None), ("cpu", None)])
def test_kernels_start_on_the_device_of_their_tensors(at, guarded, monkeypatch):
    kernel = Recorder()

    class Guard:
        def __init__(self, device):
            self.index = device

        def __enter__(self):
            kernel.inside = self.index

        def __exit__(self, *exception):
            kernel.inside = None

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", Guard)
    launch.Launch(kernel, 1, torch.device(at), num_warps=4)()
    assert kernel.grids == [(1, guarded)] and kernel.inside is None


def test_every_launch_goes_through_the_checks():
    for file in Path(launch.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                assert file.name == "launch.py", f"{file.name}:{node.lineno} starts a kernel past launch()"


@by_op
@pytest.mark.parametrize("name", ["k", "v", "key_padding_mask"])
def test_tensors_on_different_gpus_are_refused(op, name):
    with FakeTensorMode():
        sizes = {"q": (1, 2, 5, 4), "k": (1, 2, 6, 4), "v": (1, 2, 6, 4), "key_padding_mask": (1, 6)}
        tensors = {
            n: torch.empty(s, dtype=torch.bool if n.endswith("mask") else None, device=f"cuda:{int(n == name)}")
            for n, s in sizes.items()
        }
        q, k, v, mask = tensors.values()
        with pytest.raises(ValueError, match=f"{name} is on cuda:1, expected cuda:0, where q is; move it with .to"):
            getattr(torch.ops.infsa, f"{op}_fwd_triton")(q, k, v, 1e-6, 1.0, None, mask, None)


def test_no_kernel_transposes_the_result_of_a_product():
    """Triton 3.4 to 3.7.0 silently miscompile it on Hopper: only what came from memory is transposed."""
    transposed = 0
    for file in Path(launch.__file__).parent.glob("*.py"):
        for function in ast.walk(ast.parse(file.read_text())):
            if not isinstance(function, ast.FunctionDef):
                continue
            nodes = list(ast.walk(function))
            loaded, made = set(), set()
            for node in nodes:
                if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                    call = node.value.func if isinstance(node.value, ast.Call) else None
                    of_memory = isinstance(call, ast.Name) and call.id == "load_rows"
                    (loaded if of_memory else made).add(node.targets[0].id)
            for node in nodes:
                assert not (isinstance(node, ast.Attribute) and node.attr in ("T", "permute")), file.name
                if isinstance(node, ast.Attribute) and node.attr == "trans":
                    call = next(n for n in nodes if isinstance(n, ast.Call) and n.func is node)
                    (argument,) = call.args
                    assert argument.id in loaded - made, f"{file.name}:{node.lineno} transposes {argument.id}"
                    transposed += 1
    assert transposed >= 7


# heads, channels -> the elements in which strides of (1, N, heads, channels) are passed
UNITS = {(16, 64): 1, (14, 72): 8, (25, 40): 8, (3, 20): 4, (4, 20): 4, (2, 9): 1, (1, 6): 2, (16, 1): 1}


@pytest.mark.parametrize(("heads", "d"), UNITS)
def test_strides_in_units(heads, d):
    t = torch.empty(1, 100, heads, d, device="meta").transpose(1, 2)
    unit = launch.unit_of([t.stride(), (0, 0, 0, 0)])
    assert unit == UNITS[heads, d] and all(step % unit == 0 for step in t.stride()[:3])


def test_strides_too_large_for_units():
    """What a kernel multiplies in 32 bits."""
    assert launch.unit_of([(8, 8, (1 << 31) - 8, 1)]) == 8
    assert launch.unit_of([(8, 8, 1 << 31, 1)]) == 1

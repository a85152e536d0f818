"""Which calls CUDA C++ takes by default, the check before it does, and what follows from either; on the CPU, as if it were a GPU.

There `infsa::linear_fwd` is the C++ kernel for CPUs: what is tested is the check, and what it is asked.
"""

import warnings

import pytest
import torch

pytest.importorskip("triton")

import infsa_kernels
from infsa_kernels import info
from infsa_kernels.ops import backends, launch_bound, linear, linear_floor, pure, qkv
from infsa_kernels.triton import first_use

CPU = torch.device("cpu")
HOPPER = launch_bound.SIZES[0]
FORWARD = "infsa::linear forward, bfloat16, head dimensions 64 and 64, tied, token-major, CUDA C++"

pytestmark = pytest.mark.skipif(
    infsa_kernels.explain_backend("linear", CPU, torch.float32, (1, 1, 1, 64))["cpu"] is not None,
    reason="no extension was built here",
)


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    """The CPU is a GPU with clusters, for which CUDA C++ was built; Triton is there too, and never runs."""
    real = backends.why_not
    monkeypatch.setattr(
        backends, "why_not", lambda op, name, *more: None if name in ("cuda", "triton") else real(op, name, *more)
    )
    monkeypatch.setattr(launch_bound, "sizes_on", lambda device: HOPPER)
    monkeypatch.setattr(launch_bound, "_decided", {})
    monkeypatch.setattr(first_use, "_verdicts", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setenv("INFSA_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("INFSA_CUDA", raising=False)


@pytest.fixture
def checks(gpu, monkeypatch):
    """What is checked, in words; every check says what the last element of ``says`` is."""
    seen, says = [], [None]

    def check(variant, device):
        seen.append(str(variant))
        if isinstance(says[-1], Exception):
            raise says[-1]
        return says[-1]

    monkeypatch.setattr(first_use, "check", check)
    return seen, says


def tokens(N=100, B=1, H=4, d=64, dtype=torch.bfloat16):
    return torch.zeros(B, N, H, d, dtype=dtype).transpose(1, 2)


def takes(q, k=None, v=None, raw=linear.raw, masks=(None, None)):
    return launch_bound.takes(raw, q, q if k is None else k, q if v is None else v, *masks)


def new_process(monkeypatch):
    monkeypatch.setattr(launch_bound, "_decided", {})
    monkeypatch.setattr(first_use, "_verdicts", {})


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({}, True),
        ({"N": 4096, "d": 64, "H": 4}, True),
        ({"N": 4096, "d": 64, "H": 12}, False),  # 12.6 MB
        ({"N": 197, "B": 32, "H": 12}, False),  # 19 MB
        ({"N": 12288, "H": 1, "d": 16}, True),
        ({"N": 12289, "H": 1, "d": 16}, False),  # longer than a cluster holds
        ({"N": 1536, "H": 1, "d": 256, "dtype": torch.float32}, True),
        ({"N": 1537, "H": 1, "d": 256, "dtype": torch.float32}, False),
    ],
    ids=str,
)
def test_the_table_goes_by_bytes(sizes, expected, checks):
    assert takes(tokens(**sizes)) is expected
    assert bool(checks[0]) is expected


def test_untied_keys_count_too(checks):
    q = tokens(4096, H=6)
    assert takes(q) and not takes(q, q.clone())


def test_gpus_without_clusters_stay_with_triton(gpu, monkeypatch):
    """By capability; and no other machine is asked for more than that once."""
    monkeypatch.undo()
    monkeypatch.setattr(backends, "why_not", lambda *arguments: None)
    for capability, row in (((8, 0), 1), ((8, 9), 1), ((9, 0), 0), ((10, 0), 0), ((12, 0), 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert launch_bound.sizes_on.__wrapped__(torch.device("cuda", 0)) is launch_bound.SIZES[row]
    assert launch_bound.SIZES[1].most_bytes == 0
    assert launch_bound.sizes_on(CPU) is None


def test_operators_without_compiled_kernels_are_never_taken(checks):
    assert not takes(tokens(), raw=pure.raw) and takes(tokens(), raw=linear_floor.raw)
    assert {name.split()[0] for name in checks[0]} == {"infsa::linear_floor"}


def test_both_directions_are_checked_once_on_a_machine(checks, monkeypatch):
    seen, _ = checks
    for _ in range(2):
        assert takes(tokens()) and takes(tokens(200, B=2))
        new_process(monkeypatch)
    assert seen == [FORWARD, FORWARD.replace("forward", "backward")]
    mask = torch.zeros(1, 100, dtype=torch.bool)
    assert takes(tokens(), masks=(mask, None)) and takes(tokens(), tokens()) and takes(tokens().contiguous())
    assert len(seen) == 8


def test_a_verdict_is_true_for_one_build_of_the_library(checks, monkeypatch, tmp_path):
    seen, _ = checks
    assert takes(tokens())
    new_process(monkeypatch)
    other = tmp_path / "library.so"
    other.write_bytes(b"another build")
    monkeypatch.setattr(first_use.verdicts, "LIBRARY", other)
    first_use.verdicts.machine.cache_clear()
    try:
        assert takes(tokens()) and len(seen) == 4
    finally:
        first_use.verdicts.machine.cache_clear()


@pytest.mark.parametrize("says", ["result 0 is off by 3", RuntimeError("no kernel image is available")], ids=str)
def test_a_failure_is_told_once_and_triton_runs(says, checks):
    checks[1].append(says)
    with pytest.warns(UserWarning, match=r"does not use its CUDA C\+\+ kernel for infsa::linear forward") as told:
        assert not takes(tokens())
    assert len(told) == 1
    assert "runs Triton's in its stead" in str(told[0].message) and str(says) in str(told[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not takes(tokens())


def test_the_environment_decides(checks, monkeypatch):
    monkeypatch.setenv("INFSA_CUDA", "0")
    assert not takes(tokens())
    monkeypatch.setenv("INFSA_CUDA", "1")
    assert takes(tokens()) and not takes(tokens(1 << 16))
    assert not checks[0]


def test_inside_a_capture_what_ran_before_decides(checks, monkeypatch):
    seen, _ = checks
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not takes(tokens()) and not seen
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert takes(tokens())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert takes(tokens())


@pytest.mark.parametrize("how", ["vmap", "fake"])
def test_while_tracing_a_verdict_of_before_decides(how, checks, monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    answers = []

    def ask(x):
        answers.append(takes(x.transpose(-2, -3)))
        return x

    def traced():
        if how == "vmap":
            return torch.vmap(ask)(torch.zeros(2, 1, 100, 4, 64, dtype=torch.bfloat16))
        with FakeTensorMode():
            return ask(torch.zeros(1, 100, 4, 64, dtype=torch.bfloat16))

    traced()
    assert answers == [False] and not checks[0]
    assert takes(tokens())
    new_process(monkeypatch)
    traced()
    assert answers == [False, True] and len(checks[0]) == 2


def test_info_says_what_happens(gpu, monkeypatch):
    device = torch.device("cuda", 0)
    (line,) = info._choice(device)
    assert "by default CUDA C++ takes calls of linear with up to 8 MB of q, k and v, 1536 KB a head: one launch" in line
    monkeypatch.setenv("INFSA_CUDA", "1")
    assert "calls of linear unchecked (INFSA_CUDA=1)" in info._choice(device)[0]
    monkeypatch.setenv("INFSA_CUDA", "0")
    assert "takes no call (INFSA_CUDA=0)" in info._choice(device)[0]
    monkeypatch.delenv("INFSA_CUDA")
    monkeypatch.setattr(launch_bound, "sizes_on", lambda device: launch_bound.SIZES[1])
    assert "takes no call here: without clusters" in info._choice(device)[0]


def variant(op="linear", direction="forward", dtype="float32", d=16, tied=False, masked=""):
    precision = "ieee" if dtype == "float32" else ""
    return first_use.known_attention.Variant(
        op, direction, dtype, precision, d, d, tied, masked, True, False, backend="cuda"
    )


@pytest.mark.parametrize("op", ["linear", "linear_floor"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(
    "case", [{"tied": True}, {"dtype": "bfloat16", "d": 20, "masked": "keys and queries"}], ids=str
)
def test_right_kernels_pass(op, direction, case):
    assert first_use.check(variant(op, direction, **case), CPU) is None


def last_channel_is_forgotten(call, *arguments):
    out, *rest = call(*arguments)
    return torch.cat([out[..., :-1], torch.full_like(out[..., -1:], torch.nan)], -1), *rest


def heads_race(call, *arguments):
    out, *rest = call(*arguments)
    out = out.clone()
    out[0, 1] = out[0, 1].nextafter(torch.tensor(1e9))
    return out, *rest


def the_last_split_is_lost(call, q, k, v, *rest):
    return call(q, k, v, *rest) if q.shape[2] < 1000 else call(q[:, :, :1000], k, v, *rest)


def unaligned_rows_are_read_wrongly(call, q, *rest):
    return call(q if q.stride(2) % 8 == 0 else q.roll(1, -1), *rest)


PLANTED = {
    last_channel_is_forgotten: "result 0 is off by nan where",
    heads_race: "result 0 differs between heads",
    the_last_split_is_lost: "at 1025 queries",
    unaligned_rows_are_read_wrongly: "is off by",
}


@pytest.mark.parametrize("fault", PLANTED, ids=lambda fault: fault.__name__)
def test_a_wrong_kernel_fails(fault, monkeypatch):
    right = linear.raw.ops["cuda"]
    monkeypatch.setitem(linear.raw.ops, "cuda", lambda *arguments: fault(right, *arguments))
    assert PLANTED[fault] in first_use.check(variant(), CPU)


def test_a_wrong_gradient_fails(monkeypatch):
    class Wrong(first_use._Compiled):
        def backward(self, *arguments):
            super().backward(*arguments)
            arguments[-1][1].mul_(1.01)

    monkeypatch.setattr(first_use, "_Compiled", Wrong)
    assert "result 1 is off by" in first_use.check(variant(direction="backward"), CPU)


def test_an_operator_runs_what_was_decided(checks, monkeypatch):
    """attend asks for calls on a GPU that nobody has asked a backend for, and runs both directions there."""
    ran = []

    class OnGpu(torch.Tensor):
        is_cuda = True

    monkeypatch.setattr(linear.raw, "forwards", {n: lambda *a, n=n: ran.append(n) or (a[2],) for n in linear.raw.ops})
    q = tokens().as_subclass(OnGpu)
    for asked in ("", "triton", "eager"):
        qkv.attend(linear.raw, q, q, q, 1e-6, 1.0, None, None, asked)
    checks[1].append("result 0 is off by 3")
    q = tokens(d=32).as_subclass(OnGpu)
    with pytest.warns(UserWarning, match="CUDA C"):
        qkv.attend(linear.raw, q, q, q, 1e-6, 1.0, None, None, "")
    assert ran == ["cuda", "triton", "eager", "cpu"]  # of a CPU Triton is no default


def test_the_usual_variants_have_those_of_cuda(gpu, monkeypatch):
    found = first_use.usual(CPU)
    ours = [v for v in found if v.backend == "cuda"]
    assert {v.op for v in ours} == {"linear", "linear_floor"} and len(ours) == 48
    monkeypatch.setattr(launch_bound, "sizes_on", lambda device: None)
    assert {v.backend for v in first_use.usual(CPU)} == {"triton"}

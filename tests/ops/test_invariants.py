"""Whatever reaches a compiled raw operator, with no Python in between, is refused or answered: never a crash.

Random calls with wrong shapes, dtypes, devices, strides, empty and missing arguments, in a process of their own. The eager
operator, whose arguments Python checks, says which of them are right, and what is then the answer.
"""

import itertools
import random
import subprocess
import sys

import pytest
import torch

import infsa_kernels  # noqa: F401

PACKED = ("linear_varlen", "linear_varlen_floor", "pure_varlen")
OPS = ("linear", "linear_floor", "pure", *PACKED, "central_query", "score_pool", "score_pool_floor")
# Of operators for tokens in parts. All that forward and backward take is an argument.
PARTS = (
    "linear_steps_queries_fwd", "linear_steps_keys_fwd", "linear_steps_keys_bwd", "linear_steps_queries_bwd",
    "linear_steps_keys_floor_fwd", "linear_steps_keys_floor_bwd", "pure_blocks_fwd", "pure_blocks_bwd",
)  # fmt: skip
CALLS = 300
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OTHER_DTYPES = (*DTYPES, torch.int32, torch.bool, torch.uint8, torch.complex64)


def compiled() -> set[str]:
    """The operators that have C++ kernels for CPUs."""
    names = torch._C._dispatch_get_registrations_for_dispatch_key("CPU")
    return {name.removeprefix("infsa::") for name in names if name.startswith("infsa::") and "triton" not in name}


@pytest.mark.skipif(not compiled(), reason="there is no extension")
@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(n, marks=pytest.mark.sweep) for n in (2, 3))])
def test_no_call_crashes(seed):
    assert compiled() == {f"{op}_{way}" for op in OPS for way in ("fwd", "bwd")} | {*PARTS}
    run = subprocess.run([sys.executable, __file__, str(seed)], capture_output=True, text=True)
    calls = run.stdout.splitlines()
    assert run.returncode == 0, f"{calls[-1:]}\n{run.stderr[-2000:]}"
    answered = sum(call.endswith("answered") for call in calls)
    assert CALLS // 10 < answered < len(calls) - CALLS // 10, "the calls are all right, or all wrong"


def good(op: str, rng: random.Random) -> dict:
    """Arguments of forward by name, all of them right."""
    dtype = rng.choice(DTYPES)
    acc = torch.float64 if dtype == torch.float64 else torch.float32

    def numbers(*shape, dtype=dtype):
        return torch.randn(shape, dtype=torch.float64).to(dtype)

    def maybe(t):
        return t if rng.random() < 0.5 else None

    B, H, N, M, d, v = rng.randint(1, 3), rng.randint(1, 3), *(rng.choice([1, 2, 5, 16, 33]) for _ in range(4))
    floor = {"score_floor": rng.choice([0.0, 0.1, 2.0])} if op.endswith("_floor") else {}
    if op in PACKED:
        index = rng.choice([torch.int32, torch.int64])
        queries, keys = ([rng.choice([0, 1, 2, 5, 16, 33]) for _ in range(B)] for _ in range(2))
        tied = rng.random() < 0.5
        keys = queries if tied else keys
        cu_q, cu_k = (torch.tensor([0, *itertools.accumulate(lengths)], dtype=index) for lengths in (queries, keys))
        tensors = {"q": numbers(sum(queries), H, d), "k": None if tied else numbers(sum(keys), H, d)}
        tensors |= {"v": numbers(sum(keys), H, v), "cu_seqlens_q": cu_q, "cu_seqlens_k": None if tied else cu_k}
        rest = {"max_q": max(queries), "max_k": max(keys) + 3, "eps": 1e-3} | floor | {"rho": 0.9}
        return tensors | rest | {"head_rho": maybe(numbers(B, H, dtype=acc))}
    if op in ("linear", "linear_floor", "pure"):
        k = maybe(numbers(B, H, M, d))
        M = N if k is None else M
        masks = {"key_padding_mask": maybe(torch.rand(B, M) < 0.3), "query_padding_mask": maybe(torch.rand(B, N) < 0.3)}
        tensors = {"q": numbers(B, H, N, d), "k": k, "v": numbers(B, H, M, v)}
        rest = {"rho": 0.9, "head_rho": maybe(numbers(B, H, dtype=acc))}
        return tensors | {"eps": 1e-3} | floor | rest | masks
    if op == "central_query":
        tensors = {"weight": numbers(H, d, v), "bias": maybe(numbers(H, d, dtype=acc))}
    else:
        tensors = {"keys": numbers(B, H, v, dtype=acc), "key_bias": maybe(numbers(B, H, dtype=acc))}
    numbers_of_call = {"norm_eps": maybe(1e-3), "eps": 1e-3} | floor
    return {"x": numbers(B, N, v)} | tensors | numbers_of_call | {"padding_mask": maybe(torch.rand(B, N) < 0.3)}


def backward(op, arguments: dict, rng: random.Random) -> dict:
    """Those of backward: its schema tells what it takes of forward's results, and of which it takes a gradient."""
    forward, names = (getattr(torch.ops.infsa, f"{op}_{way}").default for way in ("fwd", "bwd"))
    found = dict(zip((r.name for r in forward._schema.returns), forward(*arguments.values())))
    found |= {f"d{name}": torch.randn_like(t) for name, t in found.items()} | arguments
    found["output_mask"] = [rng.random() < 0.7 for _ in names._schema.returns]
    return {a.name: found[a.name] for a in names._schema.arguments}


def good_part(name: str, rng: random.Random) -> dict:
    """Arguments of an operator of PARTS by name, all of them right."""
    dtype = rng.choice(DTYPES)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    B, H, N, M, d, v = rng.randint(1, 3), rng.randint(1, 3), *(rng.choice([1, 2, 5, 16, 33]) for _ in range(4))

    def numbers(*shape, dtype=dtype):
        return torch.randn(shape, dtype=torch.float64).to(dtype)

    def maybe(t):
        return t if rng.random() < 0.5 else None

    k, dscores = numbers(B, H, M, d), maybe(numbers(B, H, N, dtype=acc))
    if name.startswith("pure") and maybe(k) is None:
        k, M = None, N
    sums = ("energy_sum", "score_sum", "absolute_sum", "key_count", "dscores_unit")
    sums = {n: torch.rand(B, H, dtype=torch.float64) + 0.5 for n in sums}
    found = {
        "q": numbers(B, H, N, d), "k": k, "v": numbers(B, H, M, v), "dout": numbers(B, H, N, v), "dscores": dscores,
        "dcontext": numbers(B, H, v, dtype=acc), "context": numbers(B, H, v, dtype=acc),
        "value_mean": numbers(B, H, v, dtype=acc), "score_floor": 0.3,
        "central_query": numbers(B, H, d, dtype=acc), "dcentral_query": numbers(B, H, d, dtype=torch.float64),
        "dout_out": numbers(B, H, dtype=torch.float64), "norm": torch.rand(B, H).to(acc) + 0.5, "rho": 0.9, "eps": 1e-3,
        "head_rho": maybe(numbers(B, H, dtype=acc)), "key_padding_mask": maybe(torch.rand(B, M) < 0.3),
        "query_padding_mask": maybe(torch.rand(B, N) < 0.3), "output_mask": [rng.random() < 0.7 for _ in range(4)], **sums,
    }  # fmt: skip
    if dscores is None:
        found["dscores_unit"] = None
    return {a.name: found[a.name] for a in getattr(torch.ops.infsa, name).default._schema.arguments}


def another(name: str, value, rng: random.Random):
    """Something else in the place of an argument: mostly wrong, at times as good."""
    if isinstance(value, list):
        return rng.choice([[not x for x in value], value[1:], [*value, True], []])
    if isinstance(value, float):
        return rng.choice([0.0, -1.0, 1.0, float("nan"), float("inf"), -float("inf"), 1e-30])
    if isinstance(value, int):
        return rng.choice([0, -1, value - 1, value + 1, -(1 << 63), (1 << 63) - 1])
    if value is None:
        return None if name.endswith("eps") else torch.zeros([rng.randint(0, 3) for _ in range(rng.randint(0, 5))])
    shape = list(value.shape)
    at = rng.randrange(len(shape))
    other_size = [*shape[:at], rng.choice([0, 1, shape[at] + 1, max(shape[at] - 1, 0), 7]), *shape[at + 1 :]]
    if name.startswith("cu_seqlens") and rng.random() < 0.7:
        order, far = torch.randperm(len(value)), torch.iinfo(value.dtype).max
        return rng.choice(
            [value + 1, value - 1, -value, value[order], value.flip(0), value[:-1], value.new_empty(0), value * 2,
             value.clone().fill_(far), value.index_fill(0, order[:1], far), value.index_fill(0, order[:1], -far - 1),
             value.long(), torch.stack((value, value + 7), 1)[:, 0]]
        )  # fmt: skip
    freed = value.clone()
    freed.untyped_storage().resize_(0)
    return rng.choice(
        [
            None,
            value.to("meta"),
            value.to(rng.choice(OTHER_DTYPES)),
            value.new_zeros(other_size),
            value.new_zeros([rng.randint(0, 6) for _ in range(rng.randint(0, 5))]),
            value.transpose(at, -1),
            value.mT.contiguous().mT if value.dim() > 1 else value,
            value.new_zeros(value.numel() * 3 + 1)[1::3].view(shape).copy_(value),
            value.flatten()[:1].expand(shape) if value.numel() else value,
            value[None],
            value.select(at, 0) if shape[at] else value.squeeze(at)[..., None],
            value.to_sparse() if value.dtype != torch.bfloat16 else value.new_empty(0),
            freed,
        ]
    )


def answer(function, arguments):
    """The results; None where the call is refused."""
    try:
        with torch._C._AutoDispatchBelowAutograd():
            return function(*arguments)
    except Exception as error:
        refusal = str(error)
    assert "INTERNAL ASSERT" not in refusal, refusal
    return None


def only_compiled_code_sees(name: str, value, gradients: int) -> bool:
    """What Python does not look at: memory that was freed below a tensor, how many gradients are wanted or not."""
    if name == "output_mask":
        return len(value) != gradients
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.is_meta:
        return False
    return value.numel() > 0 and value.untyped_storage().nbytes() == 0


def main(seed: int):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for i in range(CALLS):
        op = rng.choice([*(f"{op}_{way}" for op in OPS for way in ("fwd", "bwd")), *PARTS])
        dense, way = op[:-4], op[-3:]
        arguments = good_part(op, rng) if op in PARTS else good(dense, rng)
        if op not in PARTS and way == "bwd":
            arguments = backward(dense, arguments, rng)
        changed = rng.sample(list(arguments), min(rng.choice([0, 1, 1, 1, 2, 3]), len(arguments)))
        arguments |= {name: another(name, arguments[name], rng) for name in changed}
        print(i, op, {n: getattr(arguments[n], "shape", arguments[n]) for n in changed}, end=" ", flush=True)
        actual = answer(getattr(torch.ops.infsa, op), arguments.values())
        gradients = 4 if op in PARTS else len(getattr(torch.ops.infsa, f"{dense}_bwd").default._schema.returns)
        wrong = any(only_compiled_code_sees(name, value, gradients) for name, value in arguments.items())
        wanted = None if wrong else answer(getattr(torch.ops.infsa, f"{op}_eager"), arguments.values())
        assert (actual is None) == (wanted is None), f"the eager operator {'refuses' if wanted is None else 'answers'}"
        results = [() if t is None else (t,) if isinstance(t, torch.Tensor) else t for t in (actual, wanted)]
        if op.startswith("linear_steps_keys") and way == "bwd" and all(results) and results[1][3].dim() == 3:
            # dscores are in a unit of every head, which goes with them and is a backend's own.
            results = [(*r[:3], r[3].double() * r[4][..., None]) for r in results]
        for a, w in zip(*results):
            assert (a.shape, a.dtype, a.device) == (w.shape, w.dtype, w.device)
            # Statistics that were put in the place of forward's own have no right gradient, and a key of equal elements scores a
            # normalised token 0, but for rounding.
            if not a.is_meta and ((way == "fwd" and "keys" not in changed) or not changed):
                size = float(w.abs().nan_to_num(0, 0).max()) if w.numel() else 0.0
                torch.testing.assert_close(a.double(), w.double(), rtol=0, atol=0.05 * size, equal_nan=True)
        print("refused" if actual is None else "answered", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))

"""What torch asks of a registered operator: schema, autograd, fake tensors, FLOPs."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from functorch.compile import make_boxed_func
from helpers.calls import DTYPES, OPS, raw_op
from helpers.framework_calls import DV, FORMS, LAYOUTS, B, D, H, M, N, make_call
from helpers.sweep import some
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

import infsa_kernels
from infsa_kernels.ops import central_query, linear, linear_floor, pure, score_pool, score_pool_floor, varlen
from infsa_kernels.ops.backends import OPERATORS, SUFFIXES

ROOT = Path(__file__).parents[2]

RAW_FORMS = [form for form in FORMS if form != "three_dimensions"]
OUTPUT_MASKS = [[w == "1" for w in wanted] for wanted in ("1111", "0000", "1010", "0101", "1001")]
STATISTICS = {"linear": slice(1, None), "pure": slice(0, None)}


def public_arguments(call):
    k = call.q if call.k is None else call.k
    overload = "default" if isinstance(call.rho, torch.Tensor) else "scalar_rho"
    op = getattr(getattr(torch.ops.infsa, call.op), overload)
    return op, (call.q, k, call.v, call.eps, call.rho, call.key_padding_mask, call.query_padding_mask)


def backward_arguments(call, backend, output_mask=(True,) * 4):
    q, k, v, *rest = call.raw()
    outputs = raw_op(f"{call.op}_fwd", backend)(q, k, v, *rest)
    dout = torch.randn_like(outputs[0])
    return dout, q, k, v, *outputs[STATISTICS[call.op]], *rest, list(output_mask)


def cases(forms):
    """Every form in float32 and in one dtype more, so that over the forms every dtype meets every layout.

    Without the sweep, each form in one of the two.
    """
    for i, form in enumerate(forms):
        for j, dtype in enumerate((DTYPES[0], DTYPES[1 + i % 3])):
            layout = LAYOUTS[(i // 3 + DTYPES.index(dtype)) % len(LAYOUTS)]
            yield pytest.param(form, dtype, layout, marks=() if j == i % 2 else pytest.mark.sweep)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("form", "dtype", "layout"), list(cases(FORMS)), ids=str)
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.one_in(4)
def test_opcheck_public(op, form, dtype, layout, requires_grad, device, backend):
    call = make_call(op, form, dtype, device, layout)
    torch.library.opcheck(*public_arguments(call.leaves() if requires_grad else call))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("form", "dtype", "layout"), list(cases(RAW_FORMS)), ids=str)
@pytest.mark.parametrize("requires_grad", some([False, True], False))
@pytest.mark.one_in(4)
def test_opcheck_raw(op, form, dtype, layout, requires_grad, device, backend):
    call = make_call(op, form, dtype, device, layout)
    forward, backward = raw_op(f"{op}_fwd", backend).default, raw_op(f"{op}_bwd", backend).default
    arguments = backward_arguments(call, backend)
    torch.library.opcheck(forward, with_gradients(call.raw(), requires_grad))
    # Tracing the second derivative takes seconds: below, for fewer cases.
    utils = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    differentiable = (*with_gradients(arguments[:4], requires_grad), *arguments[4:])
    torch.library.opcheck(backward, differentiable, test_utils=utils[:3] if requires_grad else utils)


SECOND = [("head_rho", torch.float64), ("tied_masked_one_rho", torch.bfloat16)]


@pytest.mark.parametrize("op", some(OPS, "linear"))
@pytest.mark.parametrize(("form", "dtype"), some(SECOND, SECOND[0]))
def test_opcheck_second_derivative(op, form, dtype, device):
    """It is the reference's, whatever the backend."""
    backend = infsa_kernels.choose_backend(op, torch.device(device), dtype, (B, H, N, D))
    arguments = backward_arguments(make_call(op, form, dtype, device, "gaps"), backend)
    differentiable = (*with_gradients(arguments[:4]), *arguments[4:])
    torch.library.opcheck(raw_op(f"{op}_bwd", backend).default, differentiable)


def with_gradients(arguments, requires_grad=True):
    def leaf(t):
        return t.detach().requires_grad_(requires_grad and t.is_floating_point())

    return tree_map_only(torch.Tensor, leaf, arguments)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.one_in(4)
def test_fakes_tell_the_truth(op, dtype, device, backend):
    """Shape, strides, dtype and device of every output, for every form, layout and choice of gradients."""
    for form in RAW_FORMS:
        for layout in LAYOUTS:
            call = make_call(op, form, dtype, device, layout)
            assert_fake_is_like_real(raw_op(f"{op}_fwd", backend), call.raw())
            for output_mask in OUTPUT_MASKS:
                assert_fake_is_like_real(raw_op(f"{op}_bwd", backend), backward_arguments(call, backend, output_mask))


def assert_fake_is_like_real(op, arguments):
    def describe(outputs):
        return [(t.shape, t.stride(), t.storage_offset(), t.dtype, t.device) for t in outputs]

    with FakeTensorMode() as mode:
        fakes = tree_map_only(torch.Tensor, mode.from_tensor, arguments)
        fake = describe(op(*fakes))
    assert fake == describe(op(*arguments))


@pytest.mark.parametrize("op", OPS)
def test_fakes_validate(op, device, backend):
    call = make_call(op, "head_rho", torch.float32, device)
    wrong = {
        "k": (call.k[..., :-1], ValueError),
        "v": (call.v.double(), TypeError),
        "rho": (torch.ones(H + 1), ValueError),
        "eps": (0.0, ValueError),
        "key_padding_mask": (torch.zeros(B, M + 1, dtype=torch.bool), ValueError),
        "query_padding_mask": (torch.zeros(B, N), TypeError),
    }
    for name, (value, error) in wrong.items():
        bad = make_call(op, "head_rho", torch.float32, device)
        setattr(bad, name, value)
        function, arguments = public_arguments(bad)
        with FakeTensorMode() as mode, pytest.raises(error, match=rf"infsa::{op}: {name}"):
            function(*tree_map_only(torch.Tensor, mode.from_tensor, arguments))


@pytest.mark.parametrize("op", OPS)
def test_schemas(op):
    """Nothing is keyword-only (autocast could not take it), nothing aliases or is written to."""
    names = [op, *(f"{op}_{direction}{suffix}" for direction in ("fwd", "bwd") for suffix in set(SUFFIXES.values()))]
    for name in names:
        packet = getattr(torch.ops.infsa, name)
        for overload in packet.overloads():
            schema = getattr(packet, overload)._schema
            assert not any(a.kwarg_only or a.alias_info for a in schema.arguments)
            assert not any(r.alias_info for r in schema.returns)


def expected_flops(op, form):
    keys = N if form == "tied" else M
    if op == "linear":
        return B * H * (4 * N * D + 2 * keys * (D + DV)), B * H * (8 * N * D + 5 * keys * D + 3 * keys * DV)
    return B * H * 2 * N * keys * (D + DV), B * H * N * keys * (6 * D + 4 * DV)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("form", ["plain", "tied"])
def test_flops(op, form, device, backend):
    with FlopCounterMode(display=False) as forward:
        out = make_call(op, form, torch.float32, device).leaves().run()
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert (forward.get_total_flops(), backward.get_total_flops()) == expected_flops(op, form)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("form", ["plain", "tied"])
def test_flops_of_compiled_graphs(op, form, device, backend):
    flops = []

    def counting(graph, _):
        def run(*args):
            with FlopCounterMode(display=False) as mode:
                outputs = graph(*args)
            flops.append(mode.get_total_flops())
            return outputs

        return make_boxed_func(run)

    call = make_call(op, form, torch.float32, device).leaves()
    torch.compile(call.run, backend=aot_autograd(fw_compiler=counting), fullgraph=True)().sum().backward()
    assert tuple(flops) == expected_flops(op, form)


@pytest.mark.parametrize(
    "raw",
    [m.raw for m in (linear, linear_floor, pure, central_query, score_pool, score_pool_floor)]
    + [varlen.raw_linear, varlen.raw_linear_floor, varlen.raw_pure],
    ids=lambda raw: raw.name,
)
def test_kernels_are_where_the_operator_says(raw):
    """The compiled ones that torch knows are those declared; the file or the module is there."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    built = {"cpu": "cpu" in usable("cpu"), "cuda": "cuda" in usable("cuda"), "triton": True}
    for backend, key in (("cpu", "CPU"), ("cuda", "CUDA"), ("triton", "CUDA")):
        for way in ("fwd", "bwd"):
            known = has(f"infsa::{raw.name}_{way}{SUFFIXES[backend]}", key)
            assert known == (backend in raw.kernels and built[backend]), (backend, way)
    for where in raw.kernels.values():
        if isinstance(where, str):
            assert (ROOT / where).is_file() if where.startswith("csrc") else find_spec(where, "infsa_kernels")


def usable(device):
    if device == "cuda" and not torch.cuda.is_available():
        return []
    reasons = infsa_kernels.explain_backend("linear", torch.device(device), torch.float32, (B, H, N, D))
    return [name for name, reason in reasons.items() if reason is None]


def test_operators_and_their_backends():
    everything = {"cpu", "cuda", "triton", "eager"}
    without_cuda = everything - {"cuda"}
    assert {"linear": everything, "linear_floor": everything, "pure": without_cuda, "pooled_linear": without_cuda} | {
        "central_query": without_cuda,
        "score_pool": without_cuda,
        "score_pool_floor": without_cuda,
        "linear_varlen": without_cuda,
        "linear_varlen_floor": without_cuda,
        "pure_varlen": without_cuda,
        # Parts of these for tokens in parts, and what puts them together over ranks.
        "linear_steps": without_cuda,
        "pure_blocks": without_cuda,
        "sharded_linear": without_cuda,
        "sharded_pure": without_cuda,
        "sharded_pooled_linear": without_cuda,
    } == OPERATORS


def test_private_names_of_torch_are_in_one_file():
    for file in Path(infsa_kernels.__file__).parent.rglob("*.py"):
        if file.name != "torch_private.py":
            private = r"\btorch(?:\.\w+)*\._(?!_)\w+|from torch\S*\._\S* import|from torch\S* import _\w+|\._schema\b"
            found = re.findall(private, file.read_text())
            assert not found, (file, found)

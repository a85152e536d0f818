"""What all tests share: their parts, seeds, devices, backends, and uninitialised memory that shows."""

import os
import re
import sys
import warnings
import zlib

from run import PARTS, cores

# Before torch loads: OpenMP threads that wait for each other sleep. Spinning, as by default, they make these many small
# calls ten times slower wherever other processes share the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# The processes of pytest-xdist share the cores.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ["OMP_NUM_THREADS"] = str(max(1, cores() // int(workers)))

import pytest
import torch
from helpers import torchvision_shim
from helpers.backends import DEVICES, backends_of
from helpers.sweep import leave_out

import infsa_kernels

torchvision_shim.install()


def pytest_generate_tests(metafunc):
    """`backend` runs a test once for every backend that can run here, `device` once for every device."""
    if "backend" in metafunc.fixturenames:
        only = metafunc.definition.get_closest_marker("only_backend")
        runs = [(d, b) for d in DEVICES for b in backends_of(d) if only is None or b in only.args]
        metafunc.parametrize("device, backend", runs, indirect=["backend"], ids=[f"{d}-{b}" for d, b in runs])
    elif "device" in metafunc.fixturenames:
        metafunc.parametrize("device", DEVICES)


def pytest_addoption(parser):
    parser.addoption(
        "--part", choices=PARTS, help="the tests that run.py starts together; by default all but the interpreter's"
    )


def part_of(item) -> str:
    return next((name for name in PARTS if item.get_closest_marker(name)), "parallel")


def pytest_ignore_collect(collection_path, config):
    """Whether a file has no test of the one part that is to run: to collect all of them takes long."""
    part = config.getoption("--part")
    if part in (None, "parallel") or collection_path.suffix != ".py":
        return None
    return f"mark.{part}" not in collection_path.read_text() or None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Leaves out an operator on a backend that has no kernels of it, and what is for other processes than this one."""

    def exists(item):
        params = item.callspec.params if hasattr(item, "callspec") else {}
        op, (device, backend) = params.get("op"), (params.get(name) for name in ("device", "backend"))
        if "backend" in params and not isinstance(backend, str):
            return False  # none of the backends that it is for can run in this process
        return not (op and device and backend) or backend in backends_of(device, op)

    items[:] = filter(exists, items)
    part = config.getoption("--part")
    here = {part} if part else set(PARTS) - ({"interpreter"} if os.environ.get("TRITON_INTERPRET") != "1" else set())
    config.hook.pytest_deselected(items=[item for item in items if part_of(item) not in here])
    items[:] = [item for item in items if part_of(item) in here]
    if part:  # of run.py; whoever asks for a file by himself gets all of it
        leave_out(items)


@pytest.fixture
def backend(request):
    """The name of a backend; the operators run on it for the length of the test."""
    with infsa_kernels.backend(request.param):
        yield request.param


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """The one thing that a backend of the list above may refuse: float64, for which Triton and CUDA C++ have no kernel."""
    try:
        return (yield)
    except RuntimeError as error:
        if not re.search(r"float64 has no (Triton|CUDA C\+\+) kernel", str(error)):
            raise
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def _seed(request):
    """Every test has random numbers of its own, the same in every run and in every order of the tests."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(autouse=True)
def _no_compiled_code_of_other_tests():
    """What a test compiled before decides which sizes torch.compile takes for symbols, and how often it compiles again."""
    yield
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo and dynamo.utils.counters:
        dynamo.reset()
        dynamo.utils.counters.clear()


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan():
    """torch.empty, in Python and in C++, gives NaN: an output that a kernel forgets to write cannot look right."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation")
        yield
    torch.use_deterministic_algorithms(False)

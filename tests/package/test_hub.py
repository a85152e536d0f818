"""The package as a kernel of the Hugging Face hub: what `make hub` lays out, and how `kernels` and transformers load it."""

import ast
import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import infsa_kernels
from hub.layout import lay_out
from infsa_kernels.ops.extension import LIBRARY

ROOT = Path(__file__).parents[2]
PACKAGE = Path(infsa_kernels.__file__).parent

compiled = pytest.mark.skipif(not LIBRARY.exists(), reason="no extension was built here (INFSA_NO_EXT=1)")


def python(script, *arguments, **environment):
    """Runs Python elsewhere, with this copy of the package and without a network; what it prints."""
    run = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        cwd=ROOT / "tests",
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """The folder that `make hub` writes."""
    folder = tmp_path_factory.mktemp("hub") / "infsa-kernels"
    lay_out(folder)
    return folder


def test_no_module_knows_the_name_of_the_package():
    """On the hub it has another: imports are relative, also those of modules that are named in strings."""
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            said = ""
            if isinstance(node, ast.Import):
                said = " ".join(f"{alias.name}." for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                said = f"{node.module}."
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and " " not in node.value:
                said = node.value.replace("infsa_kernels.backend_of_backward", "")  # a key, of no module
            elif isinstance(node, ast.Attribute) and node.attr == "infsa":
                said = ast.unparse(node).replace("torch.ops.infsa", "infsa_kernels.")  # torch_ops of ops/extension.py
            assert not re.search(r"\binfsa_kernels\.", said), f"{file}:{node.lineno}: {said}"


def test_every_variant_is_the_package_and_says_what_it_holds(kernel):
    modules = {file.relative_to(PACKAGE).as_posix() for file in PACKAGE.rglob("*.py")} | {"py.typed"}
    variants = sorted((kernel / "build").iterdir())
    assert {"torch-cpu", "torch-cuda", "torch-rocm"} == {v.name for v in variants if "stable-abi" not in v.name}
    assert sum("stable-abi" in v.name for v in variants) == LIBRARY.exists()
    ids = set()
    for variant in variants:
        metadata = json.loads((variant / "metadata.json").read_text())
        files = {file.relative_to(variant).as_posix() for file in variant.rglob("*") if file.is_file()}
        more = {LIBRARY.name, "_C.py"} if "stable-abi" in variant.name else set()
        assert files == modules | more | {"metadata.json"}
        assert metadata["digest"]["files"] == {
            name: base64.b64encode(hashlib.sha256((variant / name).read_bytes()).digest()).decode()
            for name in files - {"metadata.json"}
        }
        assert metadata["id"].isidentifier() and metadata["id"].startswith(
            f"_infsa_kernels_{metadata['backend']['type']}_"
        )
        ids.add(metadata["id"])
    assert len(ids) == len(variants)


def as_the_cache_has_it(variant: Path, cache: Path) -> Path:
    """A copy of which every file is a link to one that is named by what it holds: equal files of two versions are one."""
    (cache / "blobs").mkdir(parents=True, exist_ok=True)
    metadata = json.loads((variant / "metadata.json").read_text())
    snapshot = cache / metadata["id"]
    for file in variant.rglob("*"):
        if file.is_file():
            blob = cache / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
            if not blob.exists():
                shutil.copy(file, blob)
            link = snapshot / file.relative_to(variant)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(blob)
    return snapshot


SIDE_BY_SIDE = """
import importlib.util
import json
import sys
import warnings
from pathlib import Path

import torch
import infsa_kernels

warnings.simplefilter("error")
q, k, v = (torch.randn(2, 3, 500, 32).requires_grad_() for _ in range(3))


def results(package):
    with package.backend("cpu"):
        out = package.linear_infsa(q, k, v, 0.9)
        return out, *torch.autograd.grad(out.square().sum() + package.pure_infsa(q, k, v).sum(), (q, k, v))


expected = results(infsa_kernels)
for folder in map(Path, sys.argv[1:]):
    name = json.loads((folder / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    package = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
    for expected_one, one in zip(expected, results(package), strict=True):
        assert torch.equal(expected_one, one)
    assert getattr(torch.ops, name).linear is not torch.ops.infsa.linear
    big = torch.randn(1, 4, 8192, 64).requires_grad_()  # 8 MB
    package.linear_infsa(big, big, big).sum().backward()
    big.grad = None
    assert package.release_memory() >= 2**23
    try:
        package._C._ask("what it has not")
    except ValueError as error:
        assert "there is no function what it has not" in str(error)
    importlib.import_module(name + ".info")
    print(sys.modules[name + ".info"].describe().splitlines()[4])
"""


@compiled
def test_two_versions_run_beside_the_installed_package(kernel, tmp_path):
    """All three are compiled code with operators of their own, and compute the same bits."""
    (variant,) = (kernel / "build").glob("*stable-abi*")
    first = as_the_cache_has_it(variant, tmp_path)
    metadata = json.loads((variant / "metadata.json").read_text())
    changed = shutil.copytree(variant, tmp_path / "changed")
    (changed / "metadata.json").write_text(json.dumps(metadata | {"id": metadata["id"] + "_next"}))
    second = as_the_cache_has_it(changed, tmp_path)
    lines = python(SIDE_BY_SIDE, first, second).splitlines()
    assert len(lines) == 2 and all("CPU kernels for" in line for line in lines)


@pytest.fixture(scope="module")
def kernels():
    return pytest.importorskip("kernels", reason="kernels is not installed, as `make test-newest` does")


def test_what_kernel_builder_reads_is_valid(kernel, kernels):
    data = pytest.importorskip("kernels._rust", reason="kernels is older than 0.17, and has no reader of build.toml")
    data.Build.open(kernel)
    for variant in (kernel / "build").iterdir():
        said = data.Metadata.read_from_file(variant / "metadata.json").digest
        said.validate(data.Digest.hash_variant(data.DigestAlgorithm.SHA256, variant))


LOADED = """
import sys
import warnings
from pathlib import Path

import torch
from kernels import get_loaded_kernels, get_local_kernel

warnings.simplefilter("always")
kernel = get_local_kernel(Path(sys.argv[1]))
q, k, v = (torch.randn(2, 3, 50, 32).requires_grad_() for _ in range(3))
compiled = torch.compile(kernel.linear_infsa, backend="aot_eager", fullgraph=True)
compiled(q, k, v).sum().backward()
assert torch.equal(compiled(q, k, v), kernel.linear_infsa(q, k, v))
(loaded,) = get_loaded_kernels()
assert loaded.module is kernel and "infsa_kernels" not in sys.modules
print(kernel.choose_backend("linear", q.device, q.dtype, q.shape), kernel.__file__)
"""


@compiled
def test_kernels_loads_the_folder_with_compiled_code(kernel, kernels):
    backend, file = python(LOADED, kernel).split()
    assert backend == "cpu" and "torch-stable-abi" in file


def test_kernels_loads_the_variant_without_compiled_code(kernel, kernels):
    backend, file = python(LOADED, kernel / "build" / "torch-cpu").split()
    assert backend == "eager" and "torch-cpu" in file


TRANSFORMERS = """
import sys

from helpers import torchvision_shim

torchvision_shim.install()
import torch
import transformers

TOKENS = dict(input_ids=torch.arange(8).view(2, 4), attention_mask=torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]))


def model(kind, name):
    torch.manual_seed(0)
    config = getattr(transformers, kind + "Config")(
        hidden_size=32, num_attention_heads=2, num_hidden_layers=1, intermediate_size=32, vocab_size=9,
        attn_implementation=name, use_cache=False,
    )
    return getattr(transformers, kind + "Model")(config).eval()


names = "infsa_linear", "infsa_pure", "infsa_multi_hop"
found = [model("Bert", f"some/infsa-kernels:{name}")(**TOKENS).last_hidden_state for name in names]
assert "infsa_kernels" not in sys.modules
found[0].sum().backward()

from infsa_kernels.nn.transformers import register

register()
for name, out in zip(names, found):
    assert torch.equal(out, model("Bert", name)(**TOKENS).last_hidden_state), name
    assert not torch.equal(out, model("Bert", "sdpa")(**TOKENS).last_hidden_state)
for kind, name in (("Llama", "infsa_linear"), ("Bert", "flash_attn_forward")):
    try:
        model(kind, f"some/infsa-kernels:{name}")(**TOKENS)
    except NotImplementedError as error:
        print(error)
"""


def test_transformers_takes_the_folder_as_a_kernel(kernel, kernels):
    """By LOCAL_KERNELS, which says where a kernel of the hub lies on this machine; what register() gives, and its refusals."""
    from transformers.utils import import_utils

    if not import_utils.is_kernels_available():
        wanted = f"{import_utils.KERNELS_MIN_VERSION} to {import_utils.KERNELS_MAX_VERSION}"
        pytest.skip(f"kernels is {kernels.__version__}, and this transformers takes {wanted}")
    said = python(
        TRANSFORMERS,
        LOCAL_KERNELS=f"some/infsa-kernels={kernel}",
        PYTHONPATH=os.pathsep.join((str(ROOT), str(ROOT / "tests"))),
    )
    causal, unnamed = said.splitlines()
    assert "it is causal" in causal and "no softmax attention" in unnamed

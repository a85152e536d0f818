"""`make hub`: this package as a kernel of the Hugging Face hub, in build/infsa-kernels (docs/hub.md).

    build.toml                                     what `kernel-builder upload` reads
    build/torch-stable-abi210-cpu-x86_64-linux     the package with the library that was built here, if one was
    build/torch-cpu, torch-cuda, torch-rocm        the package alone: Triton and eager

Every variant is the package as it is, whose imports are relative, and metadata.json.
"""

import argparse
import base64
import hashlib
import json
import platform
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "infsa_kernels"

NAME = "infsa-kernels"
# The hub's own count, which goes up with what a user may rely on; transformers asks for 1.
VERSION = 1
# As TARGET in setup.py.
STABLE_ABI = "2.10"

BUILD = """[general]
name = "{name}"
version = {version}
edition = 5
license = "Apache-2.0"
backends = [{backends}]

[torch]
src = []
"""


def lay_out(folder: Path) -> list[Path]:
    """Writes the kernel into a folder, which it empties before; returns its variants."""
    if folder.exists():
        shutil.rmtree(folder)
    variants = {f"torch-{backend}": backend for backend in ("cpu", "cuda", "rocm")}
    paths = [plain(folder / "build" / name, backend) for name, backend in variants.items()]
    if (PACKAGE / "libinfsa_kernels.so").exists():
        paths.insert(0, compiled(folder / "build"))
    backends = ", ".join(f'"{backend}"' for backend in variants.values())
    (folder / "build.toml").write_text(BUILD.format(name=NAME, version=VERSION, backends=backends))
    return paths


def plain(path: Path, backend: str) -> Path:
    copy_modules(path)
    return describe(path, {"type": backend})


def compiled(parent: Path) -> Path:
    from infsa_kernels import _C

    facts = {name: getattr(_C, name) for name in ("torch_version", "compiler", "cuda_arch_list")}
    backend, variant = {"type": "cpu"}, "cpu"
    if facts["cuda_arch_list"]:
        import torch

        backend = {"type": "cuda", "archs": facts["cuda_arch_list"].split(",")}
        variant = "cu" + "".join(torch.version.cuda.split(".")[:2])
    abi = STABLE_ABI.replace(".", "")
    path = parent / f"torch-stable-abi{abi}-{variant}-{platform.machine()}-{platform.system().lower()}"
    copy_modules(path)
    shutil.copy(PACKAGE / "libinfsa_kernels.so", path)
    lines = [f"{name} = {value!r}\n" for name, value in facts.items()]
    (path / "_C.py").write_text((ROOT / "hub/_C.py").read_text() + "".join(lines))
    return describe(path, backend)


def copy_modules(path: Path) -> None:
    shutil.copytree(PACKAGE, path, ignore=shutil.ignore_patterns("*.so", "*.pyd", "__pycache__"))
    entry = path / "__init__.py"
    entry.write_text(entry.read_text() + "\n\n" + (ROOT / "hub/attention.py").read_text())


def describe(path: Path, backend: dict) -> Path:
    """metadata.json. Its id is the name that the package is imported as, and the namespace of its operators.

    It ends in digits of what the files hold, so that two versions have two.
    """
    digests = {
        file.relative_to(path).as_posix(): hashlib.sha256(file.read_bytes()).digest()
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }
    everything = hashlib.sha256(b"".join(name.encode() + digest for name, digest in digests.items())).hexdigest()
    metadata = {
        "name": NAME,
        "id": f"_{NAME.replace('-', '_')}_{backend['type']}_{everything[:12]}",
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": backend,
        "digest": {
            "algorithm": "sha256",
            "files": {name: base64.b64encode(digest).decode() for name, digest in digests.items()},
        },
    }
    (path / "metadata.json").write_text(json.dumps(metadata, indent=1) + "\n")
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / NAME)
    for variant in lay_out(parser.parse_args().out):
        print(variant)

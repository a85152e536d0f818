"""The examples import each other by bare names, as scripts do."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

EXAMPLES = str(Path(__file__).parents[2] / "examples")
sys.path.insert(0, EXAMPLES)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A small data set as ImageNet lies on disk, in two classes; one picture for training and one for testing are broken."""
    root = tmp_path_factory.mktemp("pictures")
    draw = np.random.default_rng(0)
    for part, count in (("train", 8), ("val", 4)):
        for bright, name in enumerate(("dark", "light")):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = draw.integers(0, 128, (40 + i, 36, 3), dtype=np.uint8) + 100 * bright
                Image.fromarray(pixels.astype(np.uint8)).save(root / part / name / f"{i}.png")
        (root / part / "dark" / "0.png").write_bytes(b"no picture")
        whole = (root / part / "light" / "1.png").read_bytes()
        (root / part / "light" / "1.png").write_bytes(whole[: len(whole) // 2])
    return root

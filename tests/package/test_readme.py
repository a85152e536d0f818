"""The code of README.md runs as it stands, from top to bottom."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"


def test_python_runs(capsys):
    pytest.importorskip("timm")
    pytest.importorskip("transformers")
    text = README.read_text()
    blocks = list(re.finditer(r"```python\n(.*?)```", text, re.DOTALL))
    assert len(blocks) >= 6
    namespace = {}
    for block in blocks:
        line = text[: block.start(1)].count("\n")
        exec(compile("\n" * line + block[1], str(README), "exec"), namespace)
    assert namespace["report"].converted
    assert namespace["scores"].shape == (1, 1000)
    assert capsys.readouterr().out

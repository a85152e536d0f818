"""Links from the docs to lines of code, [`symbol`](../path#L12): `PYTHONPATH=tests python -m helpers.anchors` writes them anew.

A symbol that has moved to another file is found there, if one file alone defines it.
"""

import re
from pathlib import Path

from helpers.documents import DOCS, ROOT

ANCHOR = re.compile(r"\[`(?P<symbol>\w+)`\]\(\.\./(?P<path>[\w./]+)#L(?P<line>\d+)\)")
SOURCES = [path for folder in ("infsa_kernels", "csrc") for path in sorted((ROOT / folder).rglob("*.*"))]


def line_of(symbol: str, path: Path) -> int | None:
    """The first line that defines a symbol: a Python function, class or constant; a C++ function, struct or registration."""
    if path.suffix == ".py":
        defines = rf"\s*(def|class) {symbol}\b|{symbol}\b.*="
    else:
        # A call stands inside something; a definition starts at the margin.
        defines = rf"(?=\S)[^/].*\b{symbol}\(|.*\b(struct|class) {symbol}\b|TORCH_LIBRARY_IMPL\({symbol}\b"
    if not path.is_file():
        return None
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if re.match(defines, line):
            return number
    return None


def corrected(text: str) -> str:
    """A page with every anchor at the line where its symbol is defined; raises LookupError for one that is nowhere."""

    def correct(anchor: re.Match) -> str:
        symbol, path = anchor["symbol"], ROOT / anchor["path"]
        if line_of(symbol, path) is None:
            there = [p for p in SOURCES if p.suffix in (".py", ".cpp", ".h", ".cu", ".cuh") and line_of(symbol, p)]
            if len(there) != 1:
                files = ", ".join(str(p.relative_to(ROOT)) for p in there) or "none"
                raise LookupError(f"{anchor['path']} does not define {symbol}; files that do: {files}")
            (path,) = there
        return f"[`{symbol}`](../{path.relative_to(ROOT)}#L{line_of(symbol, path)})"

    return ANCHOR.sub(correct, text)


def main() -> None:
    for page in DOCS:
        text = page.read_text()
        if text != (new := corrected(text)):
            page.write_text(new)
            print(f"{page.relative_to(ROOT)}: anchors written anew")


if __name__ == "__main__":
    main()

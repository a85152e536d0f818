"""README and docs as the tests read them: blocks of code, code in lines of text, sentences, links and headings."""

import ast
import inspect
import re
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + DOCS

FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)\n(?P<code>.*?)^ *```$", re.DOTALL | re.MULTILINE)
# On the line before a block that the tests cannot run.
NOT_RUN = re.compile(r"<!-- not run: .+ -->\s*$")


@dataclass
class Code:
    line: int  # the number of its first line
    text: str
    runs: bool = True


def blocks(text: str, language: str) -> list[Code]:
    """The fenced blocks of a language, without the indentation of a list that they stand in."""
    found = []
    for fence in FENCE.finditer(text):
        if fence["language"] == language:
            lines = [line.removeprefix(fence["indent"]) for line in fence["code"].splitlines()]
            runs = not NOT_RUN.search(text[: fence.start()])
            found.append(Code(_line(text, fence.start("code")), "\n".join(lines), runs))
    return found


def outside_blocks(text: str) -> str:
    """The text with blank lines where its blocks stand, so that numbers of lines remain."""
    return FENCE.sub(lambda fence: "\n" * fence[0].count("\n"), text)


def inline(text: str) -> list[Code]:
    """What stands between backticks in lines of text and of tables."""
    text = outside_blocks(text)
    return [Code(_line(text, found.start()), " ".join(found[1].split())) for found in re.finditer(r"`([^`]+)`", text)]


def sentences(text: str) -> list[str]:
    """The prose: no headings, tables, pictures or blocks; a piece of code is a word."""
    text = re.sub(r"<!--.*?-->", "", outside_blocks(text), flags=re.DOTALL)
    text = re.sub(r"!\[.*?\]\(.*?\)", "", text)
    text = re.sub(r"\[([^\[\]]*)\]\(.*?\)", r"\1", text)
    text = re.sub(r"`[^`]+`", "code", text)
    kept = ["" if re.match(r"\s*(#|\||    )", line) else line for line in text.splitlines()]
    paragraphs = re.split(r"\n\s*\n|\n(?=\s*[*-] )", "\n".join(kept))
    found = []
    for paragraph in paragraphs:
        words = " ".join(paragraph.split()).lstrip("*- ")
        found += [s for s in re.split(r"(?<=[.!?])\**\s+", words) if re.search(r"\w", s)]
    return found


def links(text: str) -> list[Code]:
    """Targets of links and pictures."""
    text = outside_blocks(text)
    return [Code(_line(text, found.start()), found[1]) for found in re.finditer(r"\]\(([^)\s]+)\)", text)]


def headings(text: str) -> set[str]:
    """The anchors that headings have on GitHub."""
    titles = re.findall(r"^#+ (.+)$", outside_blocks(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def signatures(function) -> list[inspect.Signature]:
    """One for a Python function or class, one for each overload of an operator."""
    if isinstance(function, torch._ops.OpOverloadPacket):
        return [_of_schema(getattr(function, name)._schema) for name in function.overloads()]
    if isinstance(function, torch.nn.Module):
        return [inspect.signature(function.forward)]
    return [inspect.signature(function)]


def misfit(arguments: str, signature: inspect.Signature, defaults: bool = True) -> str | None:
    """What written arguments say that the signature does not: names, their order, defaults. "..." is any others."""
    if not all(WRITTEN.fullmatch(argument) for argument in _split(arguments)):
        return _misfit_of_call(arguments, signature)
    parameters, names, at, by_name, rest = signature.parameters, list(signature.parameters), 0, False, False
    for argument in _split(arguments):
        name, _, default = argument.partition("=")
        if argument in ("...", "*"):
            by_name, rest = True, rest or argument == "..."
            continue
        if name not in names:
            return f"has no argument {name!r}"
        if names.index(name) < at:
            return f"takes {name!r} before {names[at - 1]!r}"
        if names.index(name) > at and not (by_name or default):
            return f"takes {names[at]!r} where {name!r} is written"
        if not by_name and not default and parameters[name].kind is inspect.Parameter.KEYWORD_ONLY:
            return f"takes {name!r} by keyword only"
        if defaults and default and not _same_default(default, parameters[name].default):
            return f"has the default {name}={parameters[name].default!r}, not {default}"
        at = names.index(name) + 1
    missing = [n for n, p in parameters.items() if _required(p) and not re.search(rf"\b{n}\b", arguments)]
    return f"needs {', '.join(missing)}" if missing and not rest else None


# An argument of a definition: "...", "*", a name, or a name and its default.
WRITTEN = re.compile(r"\.\.\.|\*|\w+(=.+)?")


def _split(arguments: str) -> list[str]:
    """At the commas outside brackets."""
    return [part.strip() for part in re.findall(r"(?:[^,()\[\]]|\([^()]*\)|\[[^\[\]]*\])+", arguments) if part.strip()]


def _misfit_of_call(arguments: str, signature: inspect.Signature) -> str | None:
    call = ast.parse(f"f({arguments})", mode="eval").body
    try:
        signature.bind(*call.args, **{k.arg: k.value for k in call.keywords})
    except TypeError as error:
        return str(error)
    return None


def _same_default(written: str, default) -> bool:
    try:
        return ast.literal_eval(written) == default
    except ValueError:  # an expression: what an example gives, not a default
        return True


def _required(parameter: inspect.Parameter) -> bool:
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return parameter.default is inspect.Parameter.empty and parameter.kind not in several


def _of_schema(schema) -> inspect.Signature:
    kinds = {True: inspect.Parameter.KEYWORD_ONLY, False: inspect.Parameter.POSITIONAL_OR_KEYWORD}
    return inspect.Signature(
        [
            inspect.Parameter(
                argument.name,
                kinds[argument.kwarg_only],
                default=argument.default_value if argument.has_default_value() else inspect.Parameter.empty,
            )
            for argument in schema.arguments
        ]
    )


def _line(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1

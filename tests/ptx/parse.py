"""PTX text to instructions."""

import re
from dataclasses import dataclass

TARGETS = ("sm_80", "sm_90a")
# Bits of a register of each declared type.
BITS = {"pred": 1, "b8": 8, "b16": 16, "b32": 32, "f32": 32, "b64": 64, "f64": 64}


@dataclass(frozen=True)
class Instruction:
    opcode: str  # with all modifiers: "ld.global.v4.b32"
    operands: tuple[str, ...]
    guard: str | None  # the predicate register before it, if any
    negated: bool
    line: int  # of the PTX
    source: str | None  # "linear.py:64", where the compiler says so

    def __str__(self) -> str:
        guard = f"@{'!' if self.negated else ''}{self.guard} " if self.guard else ""
        where = f"line {self.line}" + (f", {self.source}" if self.source else "")
        return f"`{guard}{self.opcode} {', '.join(self.operands)}` ({where})"


@dataclass(frozen=True)
class Kernel:
    target: str
    name: str
    parameters: tuple[str, ...]
    registers: dict[str, int]  # name -> bits
    code: tuple[Instruction, ...]
    labels: dict[str, int]  # name -> the instruction that follows
    shared: str  # the array of shared memory


def parse(ptx: str, name: str = "") -> Kernel:
    """The kernel of a PTX module whose name contains ``name``; shared memory is the one array whose size the launch gives."""
    target = re.search(r"^\.target (\w+)", ptx, re.M)[1]
    assert target in TARGETS, f"expected PTX for {' or '.join(TARGETS)}, got {target}"
    arrays = re.findall(r"^\.extern \.shared .*?(\w+)\[\];", ptx, re.M)
    head = re.search(rf"\.entry (\w*{name}\w*)\((.*?)\)", ptx, re.S)
    parameters = tuple(line.split()[-1].split("[")[0] for line in head[2].split(","))
    registers: dict[str, int] = {}
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    first = ptx[: head.end()].count("\n") + 1
    source = None
    for number, line in enumerate(_outermost(ptx[head.end() :]).splitlines(), first):
        if at := re.match(r"\s*\.loc\s.*// (\S+?):(\d+):\d+", line):
            source = f"{at[1]}:{at[2]}"
        line = line.split("//")[0].strip()
        # Braces around instructions, as inline assembly has them, need no scope: nothing is declared twice with other bits.
        line = re.sub(r";\s*\}$", ";", re.sub(r"^\{\s*(?=[.\w@])", "", line))
        if at := re.match(r"([$\w]+):", line):
            labels[at[1]] = len(code)
            line = line[at.end() :].strip()
        if line == "}":
            break  # the kernel's own; debugging sections follow
        if line.startswith(".reg"):
            _declare(line, registers)
        elif line and not re.match(r"\.(loc|reqntid|maxntid|minnctapersm|pragma)\b", line) and line not in "{":
            code.append(_instruction(line, number, source))
    array = arrays[0] if arrays else "global_smem"
    return Kernel(target, head[1], parameters, registers, tuple(code), labels, array)


def _outermost(body: str) -> str:
    """The text with blocks of inline assembly opened, `{ .reg .pred complete; waitLoop: ... }`, whose names are theirs alone."""

    def renamed(at: re.Match) -> str:
        inside = at[1]
        for name in re.findall(r"^\s*\.reg \.\w+ (\w+);", inside, re.M):
            inside = re.sub(rf"\b{name}\b", f"%{name}_{at.start()}", inside)
        for name in re.findall(r"^\s*(\w+):", inside, re.M):
            inside = re.sub(rf"\b{name}\b", f"{name}_{at.start()}", inside)
        return f"\n\n{inside}\n"

    return re.sub(r"\n[ \t]*\{\n([ \t]*\.reg \.pred \w+;\n[^{}]*)\n[ \t]*\}", renamed, body)


def _declare(line: str, registers: dict[str, int]) -> None:
    kind, prefix, count = re.fullmatch(r"\.reg \.(\w+)\s+(%\w+?)(?:<(\d+)>)?;", line).groups()
    names = [f"{prefix}{i}" for i in range(int(count))] if count else [prefix]
    assert all(registers.get(name, BITS[kind]) == BITS[kind] for name in names)
    registers.update(dict.fromkeys(names, BITS[kind]))


def _instruction(text: str, line: int, source: str | None) -> Instruction:
    found = re.fullmatch(r"(?:@(!?%\w+)\s+)?([a-z][\w.:]*)\s*(.*);", text)
    assert found, f"cannot read {text!r} in line {line}"
    guard, opcode, operands = found.groups()
    negated = bool(guard) and guard[0] == "!"
    return Instruction(opcode, tuple(listed(operands)), guard and guard.lstrip("!"), negated, line, source)


def listed(text: str) -> list[str]:
    """`{ %r1, %r2 }, [ %rd1 + 4 ], 0` to ["{%r1,%r2}", "[%rd1+4]", "0"]: commas inside brackets do not count."""
    text = re.sub(r"\s+", "", text)
    return re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", text)


def parts(operand: str) -> list[str]:
    """The registers of a vector operand `{a,b}`, or the one of a scalar."""
    return operand.strip("{}").split(",")

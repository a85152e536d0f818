"""Hopper's asynchronous products in machine code: registers that something else touches before their group is waited for.

HGMMA writes its accumulators, and reads the registers of its first factor where it has some, at any time until
WARPGROUP.DEPBAR has waited for its group, which ends with the HGMMA that says gsb0. ptxas below 13.3 is known to put other
instructions between. Here every path of the control flow is followed from each HGMMA to that wait.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

# Instructions that write no register of their own, or uniform and predicate registers only.
NO_RESULT = re.compile(
    r"ST[GS]?\b|ST\.|RED|BAR|BRA|BSYNC|BSSY|BREAK|CALL|RET|EXIT|NOP|YIELD|WARP|DEPBAR|LDGDEPBAR|LDGSTS|MEMBAR|ERRBAR|FENCE|CCTL|"
    r"SYNCS|UTMA|UBLK|NANOSLEEP|ELECT|ACQBULK|PREEXIT|R2UR|R2P|S2UR|VOTEU|U[A-Z]|[A-Z0-9]*SETP|PLOP3"
)


@dataclass(frozen=True)
class Line:
    address: str
    guard: str
    op: str
    operands: tuple[str, ...]

    def __str__(self) -> str:
        return f"/*{self.address}*/ {self.guard} {self.op} {', '.join(self.operands)}"

    def groups(self) -> bool:
        return "gsb0" in self.operands


def parse(sass: str) -> tuple[list[Line], dict[str, int]]:
    """Instructions and what each label stands before, of `nvdisasm -c`."""
    code, labels = [], {}
    for line in sass.splitlines():
        if at := re.match(r"\s*(\.L_\w+):", line):
            labels[at[1]] = len(code)
        elif at := re.search(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+)?\s*([A-Z][\w.]+)\s*(.*?)\s*;", line):
            code.append(Line(at[1], at[2] or "", at[3], tuple(o.strip() for o in at[4].split(","))))
    return code, labels


def hazards(sass: str) -> list[str]:
    """Each register of an asynchronous product that is touched too early, in words."""
    code, labels = parse(sass)
    found = []
    for start, product in enumerate(code):
        if not product.op.startswith("HGMMA"):
            continue
        result, factor = _accumulators(product), _registers(product.operands[1], 4)
        # How many groups were committed since, or -1 while the product's own is open.
        paths = [(at, 0 if product.groups() else -1) for at in _next(start, code, labels)]
        seen = set()
        while paths:
            at, since = paths.pop()
            if (at, since) in seen:
                continue
            seen.add((at, since))
            line = code[at]
            if line.op.startswith("WARPGROUP.DEPBAR"):
                if since >= max(0, int(line.operands[1], 0)):
                    continue
            elif line.op.startswith("HGMMA"):
                # Products that add to the same registers follow one another in the order of the program.
                if _accumulators(line) & factor or _registers(line.operands[1], 4) & result:
                    found.append(f"{product}: {line}")
                if line.groups():
                    since += 1
            else:
                written, read = _touched(line)
                if written & (result | factor) or read & result:
                    found.append(f"{product}: {line}")
                    continue
            if at != start:
                paths += [(to, since) for to in _next(at, code, labels)]
    return found


def unfenced(sass: str) -> list[str]:
    """Each register in which a product sums that is written behind the WARPGROUP.ARRIVE before the product, in words."""
    found, since, armed = [], [], False
    for line in parse(sass)[0]:
        if line.op.startswith("WARPGROUP.ARRIVE"):
            since, armed = [], True
        elif line.op.startswith("HGMMA"):
            found += [f"{line}: {other}" for other in since if _touched(other)[0] & _accumulators(line)]
            armed = armed and not line.groups()
        elif armed:
            since.append(line)
    return found


def _accumulators(product: Line) -> set[int]:
    columns = int(re.search(r"\.64x(\d+)x", product.op)[1])
    return _registers(product.operands[0], columns // 2 if ".F32" in product.op else columns // 4)


def _registers(operand: str, count: int = 1) -> set[int]:
    return {int(r) + i for r in re.findall(r"(?<![A-Z])R(\d+)", operand) for i in range(count)}


def _touched(line: Line) -> tuple[set[int], set[int]]:
    """What an instruction writes and reads. Too wide a guess would be found out as a hazard where there is none."""
    operands = list(line.operands)
    wide = next((n for bits, n in ((".128", 4), (".64", 2)) if line.op.endswith(bits) or f"{bits}." in line.op), 1)
    if "WIDE" in line.op or re.match(r"D(ADD|MUL|FMA)", line.op):
        wide = 2
    if line.op.startswith("LDSM"):
        wide = int(line.op[-1])
    if line.op.startswith("HMMA"):
        wide = 4
    written = set()
    if not NO_RESULT.match(line.op):
        while operands and re.fullmatch(r"!?U?P(\d+|T)", operands[0]):
            operands.pop(0)
        written = _registers(operands.pop(0), wide) if operands else set()
    stores = line.op.startswith("ST")
    read = {r for o in operands for r in _registers(o, wide if stores and "[" not in o else 2 if ".64" in o else 1)}
    return written, read


def _next(at: int, code: list[Line], labels: dict[str, int]) -> Iterator[int]:
    line = code[at]
    conditional = bool(line.guard) or bool(re.match(r"!?U?P\d", line.operands[0]))
    if line.op.startswith("BRA"):
        target = re.search(r"\.L_\w+", line.operands[-1])
        if target and target[0] in labels:
            yield labels[target[0]]
    if at + 1 < len(code) and (conditional or not line.op.startswith(("BRA", "EXIT", "RET"))):
        yield at + 1

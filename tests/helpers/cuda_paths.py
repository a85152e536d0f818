"""How many instructions of machine code a row of a pass takes: the shortest way round its loop on which the rows are loaded.

That is the way of whole groups of tokens without a mask. Loops inside are left at once: with one lane a head there is nothing to
shuffle.
"""

import math
import re

# One tensor's rows are on their way in as many bytes (kRowsAhead in csrc/cuda/lanes.cuh).
AHEAD, FEW_AHEAD, CHUNK = 64, 32, 16

LOAD = re.compile(r"(?:@!?U?P\w+ )?LDG\.\S*128")
BRANCH = re.compile(r"(@!?U?P\w+ )?BRA(?:\.\S+)? (.*?)(?:`\(\S+\)|0x([0-9a-f]+))")


def instructions_of_rows(code: list[tuple[int, str]], dtype: str, backward: bool, floor: bool) -> list[int]:
    """Of a kernel's two passes, from its instructions by address; empty where it loads no 16 bytes at once."""
    at = {address: n for n, (address, _) in enumerate(code)}
    loops = []
    for n, (address, text) in enumerate(code):
        branch = BRANCH.match(text)
        if branch and branch[3] and int(branch[3], 16) < address:
            first = at[int(branch[3], 16)]
            if any(LOAD.match(t) for _, t in code[first : n + 1]):
                loops.append((first, n))
    inner = [loop for loop in loops if not any(x != loop and loop[0] <= x[0] and x[1] <= loop[1] for x in loops)]
    chunks = 2 if dtype == "fp32" else 1
    found: list[int] = []
    for first, last in sorted(inner):
        second = len(found) == 1
        rows = (FEW_AHEAD if backward or (floor and second) else AHEAD) // (CHUNK * chunks)
        tensors = 1 if second == backward else 2
        length = _shortest(code, at, first, last, rows * chunks * tensors)
        # Of a grid the loop over waves comes back too, by ways on which no whole group lies.
        if length < math.inf and len(found) < 2:
            found.append(round(length / rows))
    return found


def _shortest(code, at, first: int, last: int, loads: int) -> float:
    """Instructions of the shortest way from one to the other, forward only, on which so many loads lie."""
    best = [[math.inf] * (loads + 1) for _ in range(last + 2)]
    best[first][0] = 0
    for n in range(first, last + 1):
        text = code[n][1]
        branch = BRANCH.match(text)
        nexts = [n + 1]
        if branch and branch[3]:
            target = at[int(branch[3], 16)]
            conditional = branch[1] or "P" in branch[2]
            nexts = ([n + 1] if conditional or target <= n else []) + ([target] if n < target <= last else [])
        elif re.match(r"(EXIT|RET|BRX)", text):
            nexts = []
        for done, length in enumerate(best[n]):
            reached = min(loads, done + bool(LOAD.match(text)))
            for to in nexts:
                best[to][reached] = min(best[to][reached], length + 1)
    return best[last + 1][loads]

"""Sweeps: of a test with many cases `make test` runs some, and `make test-all` the others."""

import math
import zlib

import pytest


def some(cases, *kept):
    """The cases for `parametrize`; those not in ``kept`` are marked `sweep`."""
    cases = list(cases)
    assert all(case in cases for case in kept)
    return [case if case in kept else swept(case) for case in cases]


def swept(case):
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.sweep)


def leave_out(items):
    """Marks `sweep` all but a part of the cases of every test marked `one_in(n)`.

    The part is drawn by the cases' names, the same in every run: few that show every value of every parameter, and more up to
    one case in n.
    """
    tests = {}
    for item in items:
        if item.get_closest_marker("one_in") and not item.get_closest_marker("sweep"):
            tests.setdefault(item.nodeid.split("[")[0], []).append(item)
    for cases in tests.values():
        values = {case: {(name, id(value)) for name, value in case.callspec.params.items()} for case in cases}
        unseen = set().union(*values.values())
        others = sorted(cases, key=lambda case: zlib.crc32(case.nodeid.encode()))
        room = math.ceil(len(cases) / cases[0].get_closest_marker("one_in").args[0])
        while unseen or (room > 0 and others):
            kept = max(others, key=lambda case: len(values[case] & unseen))
            others.remove(kept)
            unseen -= values[kept]
            room -= 1
        for case in others:
            case.add_marker("sweep")

"""Sweeps: of a test with many cases `make test` runs some, and `make test-all` the others."""

import pytest


def some(cases, *kept):
    """The cases for `parametrize`; those not in ``kept`` are marked `sweep`."""
    cases = list(cases)
    assert all(case in cases for case in kept)
    return [case if case in kept else swept(case) for case in cases]


def swept(case):
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.sweep)

"""What `make test` leaves to `make test-all`."""

import itertools
import random
from types import SimpleNamespace

import pytest
from helpers.sweep import leave_out

BACKENDS, LENGTHS = ("cpu", "eager"), (1, 17, 300, 4096, 65536)


class Case:
    """As much of a pytest item as leave_out looks at."""

    def __init__(self, nodeid, params, *marks):
        self.nodeid, self.callspec, self.marks = (
            nodeid,
            SimpleNamespace(params=params),
            {mark.name: mark for mark in marks},
        )

    def get_closest_marker(self, name):
        return self.marks.get(name)

    def add_marker(self, name):
        self.marks[name] = name


def cases(test, *marks):
    return [
        Case(f"{test}[{b}-{n}-{tied}]", {"backend": b, "N": n, "tied": tied}, *marks)
        for b, n, tied in itertools.product(BACKENDS, LENGTHS, (False, True))
    ]


def kept(items):
    leave_out(items)
    return [case for case in items if "sweep" not in case.marks]


@pytest.mark.parametrize(("n", "expected"), [(1, 20), (2, 10), (3, 7), (100, 5)])
def test_one_case_in_n_and_every_value(n, expected):
    some = kept(cases("test_a.py::test", pytest.mark.one_in(n).mark))
    assert len(some) == expected  # of five lengths there are at least five
    for name, values in {"backend": BACKENDS, "N": LENGTHS, "tied": (False, True)}.items():
        assert {case.callspec.params[name] for case in some} == set(values)


def test_the_same_part_in_any_order():
    items = cases("test_a.py::test", pytest.mark.one_in(3).mark)
    first = {case.nodeid for case in kept(items)}
    again = cases("test_a.py::test", pytest.mark.one_in(3).mark)
    random.Random(0).shuffle(again)
    assert {case.nodeid for case in kept(again)} == first


def test_other_tests_and_cases_of_the_sweep_stay_as_they_are():
    unmarked = cases("test_a.py::other")
    swept = cases("test_a.py::test", pytest.mark.one_in(2).mark, pytest.mark.sweep.mark)
    leave_out(unmarked + swept)
    assert not any("sweep" in case.marks for case in unmarked) and all("sweep" in case.marks for case in swept)


def test_a_case_that_is_asked_for_alone_runs():
    assert len(kept(cases("test_a.py::test", pytest.mark.one_in(50).mark)[:1])) == 1

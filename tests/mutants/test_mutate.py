"""Which faults are made of a line, and that a file's tests are shown them."""

from __future__ import annotations

import pytest

from tests.mutants.mutate import mutants
from tests.mutants.targets import TARGETS
from tests.mutants.trial import ROOT


def lines(body: str, head: str = "def f(a, b, c):") -> list[str]:
    """What becomes of a function with this body, each time without the name of the function."""
    source = "\n".join([head, *(f"    {line}" for line in body.splitlines())]) + "\n"
    return [mutant.name.removeprefix("f: ").split(" → ")[1] for mutant in mutants("x.py", source)]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("g(a < b)", ["pass", "g(a <= b)"]),
        ("g(a is not b)", ["pass", "g(a is b)"]),
        ("g(a and b or c)", ["pass", "g(a or b or c)", "g(a and b and c)"]),
        ("g(not a)", ["pass", "g(a)"]),
        ("g(a + -b)", ["pass", "g(a - -b)", "g(a + b)"]),
        ("g(1, True, 0.0, -1, 'text')", None),
        ("g(reversed(a), min(b))", ["pass", "g(iter(a), min(b))", "g(reversed(a), max(b))"]),
        ("g(a, key=b, c=c)", ["pass", "g(a, c=c)", "g(a, key=b)"]),
        ("g(a=b)", ["pass", "g()"]),
        ("a.b = c", ["pass"]),
        ("a.b += c", ["pass", "a.b -= c"]),
        ("d = a", []),
        ("d = a\nd = b", ["pass"]),
        ("if a:\n    g.h", ["if not (a):", "pass"]),
        ("if a == b:\n    return", ["if a != b:", "pass"]),
        ("while a:\n    break", ["while False:", "continue"]),
        ("return a", ["return None"]),
        ("return None", []),
        ("raise a(1, b=2)", ["pass", "raise a(1)"]),
        ("return [d for d in a if d]", ["return None", "return [d for d in a if not (d)]"]),
        ("'''What it does.'''", []),
        ("del a  # no longer wanted", ["pass"]),
    ],
)
def test_a_line_is_broken_in_the_ways_of_a_tired_hand(body: str, expected: list[str] | None) -> None:
    if expected is None:
        expected = ["pass", "g(2, True, 0.0, -1, 'text')", "g(1, False, 0.0, -1, 'text')"]
        expected += ["g(1, True, 1.0, -1, 'text')", "g(1, True, 0.0, -2, 'text')"]
    assert lines(body) == expected


def test_what_says_nothing_about_behaviour_is_left_alone() -> None:
    head = 'LIMIT = 3\n\n\n@cache(1)\nclass A(B):\n    """Two."""\n\n'
    source = f"{head}    def __init__(self, a: int) -> None:\n        self.a = a\n"
    assert mutants("x.py", source) == []
    assert lines('g(f"{a + 1}", strict=True, device=a + 1)') == ["pass"]


def test_mutants_are_all_different_and_told_apart_by_name() -> None:
    for path in TARGETS:
        source = (ROOT / path).read_text()
        found = mutants(path, source)
        assert len({mutant.name for mutant in found}) == len({mutant.source for mutant in found}) == len(found) > 5
        assert source not in {mutant.source for mutant in found}


def test_the_name_of_a_mutant_outlives_lines_added_above_it() -> None:
    source = "def f(a):\n    g(a)\n    return a < 2  # why\n"
    names = [mutant.name for mutant in mutants("x.py", source)]
    assert names == [mutant.name for mutant in mutants("x.py", f"import os\n\n\n{source}")]
    assert names[-1] == "f: return a < 2 → return a < 3"


def test_every_file_has_tests_of_its_own() -> None:
    for path, tests in TARGETS.items():
        assert (ROOT / path).is_file() and all((ROOT / test).is_file() for test in tests), path

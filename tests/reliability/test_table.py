from __future__ import annotations

from pathlib import Path

import pytest

from tests.reliability import table
from tests.reliability.leaks import leaked


def test_a_table_replaces_what_stood_in_its_place_and_nothing_else(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- soak -->\nold\n<!-- /soak -->\nafter <!-- chaos -->x<!-- /chaos -->\n")
    table.write("soak", table.markdown(("a", "b"), [(1, r"\1")]), page)
    new = "| a | b |\n| --- | --- |\n| 1 | \\1 |"
    assert page.read_text() == f"before\n<!-- soak -->\n{new}\n<!-- /soak -->\nafter <!-- chaos -->x<!-- /chaos -->\n"


def test_a_table_without_a_place_is_an_error(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("nothing")
    with pytest.raises(AssertionError, match="no place"):
        table.write("soak", "text", page)


def test_every_table_has_a_place_in_the_page() -> None:
    for name in ("chaos", "hostile", "keys", "soak", "fuzz"):
        assert f"<!-- {name} -->" in table.PAGE.read_text()


def test_what_is_held_more_than_before_has_leaked() -> None:
    before = {"gateway files": 20.0, "gateway tasks": 5.0, "shared memory": 2.0}
    assert leaked(before, {"gateway files": 22.0, "gateway tasks": 5.0, "shared memory": 2.0}) == []
    assert leaked(before, {"gateway files": 40.0, "shared memory": 3.0, "gateway running": 1.0}) == [
        "gateway files 20 → 40",
        "shared memory 2 → 3",
        "gateway running 0 → 1",
    ]

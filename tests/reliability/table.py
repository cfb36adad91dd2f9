"""A table as Markdown, on the terminal and in docs/reliability.md between the two comments that carry its name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from service.launch.settings import ROOT

PAGE = ROOT / "docs" / "reliability.md"


def markdown(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def write(name: str, text: str, page: Path = PAGE) -> None:
    """Raises AssertionError if the page has no place of that name."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    place = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    content, count = place.subn(lambda _: f"{begin}\n{text}\n{end}", page.read_text())
    assert count == 1, f"{page} has no place called {name}"
    page.write_text(content)

"""Every image has the modules of ours that what runs in it imports. Building one to find out takes minutes."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RUN = {"gateway": ["service/gateway"], "triton": ["model_repo"]}


def copied(stage: str) -> list[Path]:
    """What a stage of the Dockerfile copies of the repository."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    body = re.split(r"^FROM .*$", text.partition(f" AS {stage}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]
    return [ROOT / path for line in re.findall(r"^COPY (?!--)(.*)$", body, re.MULTILINE) for path in line.split()[:-1]]


def imported(file: Path) -> Iterator[Path]:
    """Files of `service` that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "service":
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.partition(".")[0] == "service"]
        else:
            continue
        for name in names:
            path = ROOT / name.replace(".", "/")
            yield from (each for each in (path.with_suffix(".py"), path / "__init__.py") if each.is_file())


@pytest.mark.parametrize("stage", RUN)
def test_an_image_has_all_that_it_imports(stage: str) -> None:
    there = copied(stage)
    todo = [file for folder in RUN[stage] for file in sorted((ROOT / folder).rglob("*.py"))]
    seen = set(todo)
    assert len(seen) > 3
    while todo:
        for file in imported(todo.pop()):
            if file not in seen:
                seen.add(file)
                todo.append(file)
    missing = [file for file in sorted(seen) if not any(path in (file, *file.parents) for path in there)]
    assert not missing, f"{stage} does not copy {', '.join(str(file.relative_to(ROOT)) for file in missing)}"
    assert ROOT / "service/errors.py" in seen

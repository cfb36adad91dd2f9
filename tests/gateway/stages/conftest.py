from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import pytest


def pytest_asyncio_loop_factories(item: pytest.Item) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """A module that says `loop_factory = JumpingLoop` has its tests run on that."""
    return {"loop": getattr(item.module, "loop_factory", asyncio.SelectorEventLoop)}  # type: ignore[attr-defined]

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoints import make_idefics
from tests.e2e.running import Running

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.e2e)
            item.add_marker(pytest.mark.timeout(600))


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_idefics(tmp_path_factory.mktemp("checkpoints") / "tiny", max_position_embeddings=4096)


@pytest.fixture(scope="session")
def service(tiny_checkpoint: Path) -> Iterator[Running]:
    """One for all tests of the session that leave it as they found it."""
    running = Running("--no-question", MODEL_PATH=str(tiny_checkpoint))
    try:
        running.wait_until_ready()
        yield running
    finally:
        running.stop()

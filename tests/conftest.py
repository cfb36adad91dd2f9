from __future__ import annotations

import pytest
import torch
from transformers.utils import logging

torch.set_num_threads(1)  # tensors here are tiny; threads that wait for a core are slower than none


@pytest.fixture(scope="session", autouse=True)
def quiet_transformers() -> None:
    logging.disable_progress_bar()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU here"))

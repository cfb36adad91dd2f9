from __future__ import annotations

from pathlib import Path

import pytest

from loadtest.bench.checkpoint import VOCAB_SIZE, silence_special_tokens
from tests.checkpoints import make_idefics


def small_checkpoint(folder: Path) -> Path:
    """The benchmark's words, and next to nothing else."""
    make_idefics(folder, vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=48, num_attention_heads=2)
    silence_special_tokens(folder)
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_checkpoint(tmp_path_factory.mktemp("bench") / "small")

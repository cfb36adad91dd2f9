from __future__ import annotations

from pathlib import Path

import pytest

from loadtest.bench.checkpoint import CONTEXT, VOCAB_SIZE, silence_special_tokens
from tests.checkpoints import make_idefics


def small_checkpoint(folder: Path) -> Path:
    """The benchmark's words, and next to nothing else."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "max_position_embeddings": CONTEXT}
    make_idefics(folder, vocab_size=VOCAB_SIZE, **sizes)
    silence_special_tokens(folder)
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_checkpoint(tmp_path_factory.mktemp("bench") / "small")

"""The checkpoints that are served here: random weights, so that every picture has its own answer."""

from __future__ import annotations

from pathlib import Path

from tests.checkpoints import make_idefics

CONTEXT = 4096


def tiny(folder: Path) -> Path:
    """A step takes a few milliseconds: many requests in little time."""
    return make_idefics(folder / "tiny", max_position_embeddings=CONTEXT)


def steady(folder: Path) -> Path:
    """A step takes tens of milliseconds: the decoder bounds the service, and a machine's hiccups are shorter."""
    return make_idefics(
        folder / "steady",
        max_position_embeddings=CONTEXT,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=8,
    )

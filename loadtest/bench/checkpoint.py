"""The benchmark's checkpoints: random weights in IDEFICS' published layout, written by `transformers`."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file, save_file

from loadtest.bench.scenario import VOCABULARY
from tests.checkpoints import make_idefics

CONTEXT = 4096
VOCAB_SIZE = VOCABULARY.stop + 100
IMAGE_TOKEN_ID = VOCAB_SIZE - 1  # the tokenizer's last word
NUM_SPECIAL = 3  # <unk>, <s>, </s>


def benchmark_checkpoint(folder: Path) -> Path:
    """78 M parameters: a ViT of 8 layers over 257 positions, 64 latents a picture, 8 layers and 4 gated blocks."""
    make_idefics(
        folder,
        vocab_size=VOCAB_SIZE,
        image_size=224,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        cross_layer_interval=2,
        max_position_embeddings=CONTEXT,
        vision={
            "embed_dim": 512,
            "patch_size": 14,
            "intermediate_size": 2048,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
        },
        perceiver={
            "resampler_n_latents": 64,
            "resampler_depth": 2,
            "resampler_n_heads": 8,
            "resampler_head_dim": 64,
        },
    )
    silence_special_tokens(folder)
    return folder


def tiny_checkpoint(folder: Path) -> Path:
    """Six layers of 64: a step is so short that what surrounds it is what is measured."""
    make_idefics(folder, num_hidden_layers=6, max_position_embeddings=CONTEXT)
    silence_special_tokens(folder)
    return folder


def silence_special_tokens(folder: Path) -> None:
    """Their logits become 0, which is never the greatest: no answer ends early or names a picture.

    `generate` and the processor of `transformers` disagree about what a token sees after a generated end-of-document,
    so without this the reference would depend on how it is asked.
    """
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][:NUM_SPECIAL] = 0
    weights["lm_head.additional_fc.weight"][:] = 0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

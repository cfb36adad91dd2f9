"""What a checkpoint is, in our terms: shapes, picture preprocessing, prompt format, sight rule, weight names.

A family module (`flamingo.py`, `idefics.py`, …) has `MODEL_TYPES` and `load(folder, config) -> Family`. No torch here:
the gateway reads the same Family as the two stages.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from service.families.identity import checkpoint_identity, config_identity
from service.families.parts import AttentionConfig, FeedForwardConfig, NormConfig, Rotary
from service.families.vision import VisionConfig

Sight = tuple[int, ...]  # ordinals (0-based, in prompt order) of the pictures that a token sees; () sees none


class Unseen(StrEnum):
    """What a gated block does for a token that sees no picture (DESIGN: families)."""

    SKIP_BLOCK = "skip_block"  # the whole block: text alone behaves as the frozen LM
    ZERO_ATTENTION = "zero_attention"  # attention output 0; the gated FFN still runs


@dataclass(frozen=True)
class CrossAttentionConfig:
    """Gated cross-attention blocks, each standing before the decoder layer of its index in `layers`."""

    layers: tuple[int, ...]
    vision_width: int  # E
    num_latents: int  # R
    norm: NormConfig
    attention: AttentionConfig
    feed_forward: FeedForwardConfig
    vector_gate: bool  # gates of width D instead of one number
    unseen: Unseen

    def picture_kv_bytes(self, number_bytes: int) -> int:
        """K and V of R latents in every gated block."""
        return len(self.layers) * self.num_latents * self.attention.kv_numbers * number_bytes

    def num_parameters(self, width: int) -> int:
        """Of all gated blocks of a decoder of this width."""
        norms, gates = 2 * self.norm.num_parameters(width), 2 * (width if self.vector_gate else 1)
        attention = self.attention.num_parameters(width, self.vision_width)
        return len(self.layers) * (norms + gates + attention + self.feed_forward.num_parameters(width))


@dataclass(frozen=True)
class DecoderConfig:
    """`parallel_residual`: attention and feed-forward of a layer both read its input, and are added together."""

    vocab_size: int  # rows of the embedding, image token and other additional ones included
    num_logits: int  # rows of the head: token ids below it can be generated
    width: int  # D
    num_layers: int
    norm: NormConfig
    attention: AttentionConfig
    rotary: Rotary
    feed_forward: FeedForwardConfig
    max_positions: int
    tied_head: bool
    cross_attention: CrossAttentionConfig
    parallel_residual: bool = False

    @property
    def num_parameters(self) -> int:
        norm = self.norm.num_parameters(self.width)
        layer = self.attention.num_parameters(self.width, self.width) + self.feed_forward.num_parameters(self.width)
        head = 0 if self.tied_head else self.num_logits * self.width
        gated = self.cross_attention.num_parameters(self.width)
        return self.vocab_size * self.width + self.num_layers * (layer + 2 * norm) + gated + norm + head

    def token_kv_bytes(self, number_bytes: int) -> int:
        """K and V of a token in every layer."""
        return self.num_layers * self.attention.kv_numbers * number_bytes


@dataclass(frozen=True)
class Target:
    """Where a published weight goes: our parameter, and its place among the pieces concatenated along axis 0."""

    name: str
    part: int = 0


@dataclass(frozen=True)
class Family:
    """A checkpoint read by its family. The callables are pure.

    `preprocess(picture)`: any PIL picture -> uint8 [3, H, W] RGB, the canvas that the encoder sees before
    normalisation, one of its grids of tiles. It can be pickled, for the processes that decode pictures.
    `image_text(after_image)`: what stands in the prompt text for one picture; `after_image`: the text just before it
    is another picture's. `see(before, previous_token, picture)`: the sight of a token, from that of the token before
    it (() at the start), the id of that token (None at the start), and the ordinal of the picture that this token
    stands for, or None. `vision_weight`, `decoder_weight`: published name -> Target, or None if not of that stage.
    """

    name: str
    folder: Path
    vision: VisionConfig
    decoder: DecoderConfig
    preprocess: Callable[[Image.Image], NDArray[np.uint8]]
    image_token_id: int
    image_text: Callable[[bool], str]
    see: Callable[[Sight, int | None, int | None], Sight]
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    chat_template: str | None
    vision_weight: Callable[[str], Target | None]
    decoder_weight: Callable[[str], Target | None]

    @cached_property
    def identity(self) -> str:
        """64 hex digits over every byte of the checkpoint. Reads all the weights: for the stages, which load them."""
        return checkpoint_identity(self.folder)

    @cached_property
    def config_identity(self) -> str:
        """64 hex digits over all but the weights: what prompts and pixels depend on."""
        return config_identity(self.folder)


def sights(
    family_see: Callable[[Sight, int | None, int | None], Sight],
    input_ids: tuple[int, ...],
    image_positions: tuple[int, ...],
) -> list[Sight]:
    """The sight of every prompt token, [L]."""
    ordinals = {position: ordinal for ordinal, position in enumerate(image_positions)}
    seen: list[Sight] = []
    sight: Sight = ()
    previous: int | None = None
    for position, token in enumerate(input_ids):
        sight = family_see(sight, previous, ordinals.get(position))
        seen.append(sight)
        previous = token
    return seen


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or {} if there is no such file."""
    if not path.is_file():
        return {}
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def as_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """config.json's `eos_token_id`, which may be one id, several or none."""
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)


def load_chat_template(folder: Path) -> str | None:
    """The chat template as publishers ship it: a file of its own, or a field of one of two others."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        template = read_json(folder / name).get("chat_template")
        if isinstance(template, str):
            return template
    return None


_FUSED = {
    "self_attn.q_proj": ("qkv_proj", 0),
    "self_attn.k_proj": ("qkv_proj", 1),
    "self_attn.v_proj": ("qkv_proj", 2),
    "self_attn.o_proj": ("o_proj", 0),
    "cross_attn.q_proj": ("q_proj", 0),
    "cross_attn.k_proj": ("kv_proj", 0),
    "cross_attn.v_proj": ("kv_proj", 1),
    "cross_attn.o_proj": ("o_proj", 0),
    "mlp.gate_proj": ("mlp.gate_up_proj", 0),
    "mlp.up_proj": ("mlp.gate_up_proj", 1),
}


def fused_target(name: str) -> Target:
    """A Llama-style weight name below the decoder's root -> our parameter, q/k/v and gate/up fused."""
    for published, (ours, part) in _FUSED.items():
        if f".{published}." in name:
            return Target(name.replace(published, ours), part)
    return Target(name)

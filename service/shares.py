"""What of a GPU's memory each stage takes, and how the decoder divides its part between text and pictures.

Numbers alone: what is there, and what else needs it, others measure. No torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from service.errors import InvalidRequest
from service.families.family import DecoderConfig

DECODER_FRACTION, ENCODER_FRACTION = 0.7, 0.2  # of the whole; no fraction counts what the driver takes for a process
PICTURES_A_CONTEXT = 32  # what pictures get of the decoder's K/V for each full context of text, in the largest ones
MAX_PAGES = 16_384  # of pictures, that are made where nobody asked for more


@dataclass(frozen=True)
class MemoryFractions:
    """Of the memory of one GPU that both stages compute on. On a CPU they mean nothing."""

    decoder: float = DECODER_FRACTION
    encoder: float = ENCODER_FRACTION

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> MemoryFractions:
        """Raises InvalidRequest for what is no fraction, and for two that are more than the whole together."""
        decoder_name, encoder_name = "CROSSGATE_DECODER_MEMORY_FRACTION", "CROSSGATE_ENCODER_MEMORY_FRACTION"
        decoder = _fraction(environment, decoder_name, DECODER_FRACTION)
        encoder = _fraction(environment, encoder_name, ENCODER_FRACTION)
        if decoder + encoder > 1:
            raise InvalidRequest(
                f"{decoder_name} and {encoder_name} are {decoder} and {encoder}: more than 1 together.",
                param=decoder_name,
            )
        return cls(decoder, encoder)


@dataclass(frozen=True)
class Pool:
    """Pages of equal size, so many at least and at most. `page_bytes`: with all that comes with one more page."""

    page_bytes: int
    least: int
    most: int

    @property
    def least_bytes(self) -> int:
        return self.least * self.page_bytes

    def num_pages(self, num_bytes: int) -> int:
        """How many it makes of so many bytes; the least even of fewer."""
        return max(self.least, min(num_bytes // self.page_bytes, self.most))


def text_share(config: DecoderConfig, max_pages: int) -> float:
    """Of what the decoder has for K/V; pictures, of `max_pages` at most, have the rest."""
    of_context = config.max_positions * config.token_kv_bytes(1)
    of_pictures = PICTURES_A_CONTEXT * max_pages * config.cross_attention.picture_kv_bytes(1)
    return of_context / (of_context + of_pictures)


def divide(num_bytes: int, text: Pool, pictures: Pool, share: float) -> tuple[int, int]:
    """Pages of both, text's first. What one has no use for goes to the other; they fit, if the least of both does."""
    num_blocks = text.num_pages(int(num_bytes * share))
    num_pictures = pictures.num_pages(num_bytes - num_blocks * text.page_bytes)
    return text.num_pages(num_bytes - num_pictures * pictures.page_bytes), num_pictures


def _fraction(environment: Mapping[str, str], name: str, default: float) -> float:
    text = environment.get(name)
    if not text:
        return default
    try:
        fraction = float(text)
    except ValueError:
        fraction = 0.0
    if not 0 < fraction <= 1:
        raise InvalidRequest(f"{name}={text} is not a number above 0 and at most 1.", param=name)
    return fraction

"""The parts that models are made of, as values: norm, heads, feed-forward, positions. No torch.

A family says which ones its checkpoint has; the stages make modules of them, once, when a model is built. How many
parameters a part has, and how many numbers of K and V, is known here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import Any


class Activation(StrEnum):
    """By the names that publishers use in config.json."""

    SILU = "silu"
    GELU = "gelu"  # exact, by the error function
    QUICK_GELU = "quick_gelu"  # x · sigmoid(1.702 x)
    RELU = "relu"
    SQUARED_RELU = "squared_relu"


@dataclass(frozen=True)
class RMSNormConfig:
    eps: float

    def num_parameters(self, width: int) -> int:
        return width


@dataclass(frozen=True)
class LayerNormConfig:
    eps: float
    bias: bool

    def num_parameters(self, width: int) -> int:
        return width * (2 if self.bias else 1)


NormConfig = RMSNormConfig | LayerNormConfig


@dataclass(frozen=True)
class AttentionConfig:
    """The heads of self- or cross-attention. `bias`: of its four projections. `qk_norm`: over the width of a head."""

    num_heads: int  # H
    num_kv_heads: int  # K
    head_width: int  # C
    bias: bool = False
    qk_norm: NormConfig | None = None

    @property
    def kv_numbers(self) -> int:
        """Of one position, K and V together."""
        return 2 * self.num_kv_heads * self.head_width

    def num_parameters(self, width: int, seen_width: int) -> int:
        """Queries from `width`, keys and values from `seen_width`."""
        heads = self.num_heads * self.head_width
        matrices = width * heads + seen_width * self.kv_numbers + heads * width
        biases = heads + self.kv_numbers + width if self.bias else 0
        return matrices + biases + (2 * self.qk_norm.num_parameters(self.head_width) if self.qk_norm else 0)


@dataclass(frozen=True)
class FeedForwardConfig:
    """down(act(up(x))), or `gated`: down(act(gate(x)) · up(x)). SwiGLU is gated and SILU."""

    width: int  # between up and down
    activation: Activation
    gated: bool
    bias: bool = False

    def num_parameters(self, width: int) -> int:
        up = 2 * self.width if self.gated else self.width
        return width * up + self.width * width + (up + width if self.bias else 0)


@dataclass(frozen=True)
class Llama3Scaling:
    """Slow rotations made slower, for contexts longer than a model was first trained on. Source: Llama 3.1."""

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_max_positions: int


@dataclass(frozen=True)
class Rotary:
    """Rotary positions of the first `width` numbers of a head; the rest of it knows no position."""

    theta: float
    width: int
    scaling: Llama3Scaling | None = None


def as_rotary(config: dict[str, Any], head_width: int) -> Rotary:
    """The rotary positions of a `transformers` config, in its older spelling or its newer. Raises ValueError."""
    rope: Any = next((config[key] for key in ("rope_parameters", "rope_scaling") if config.get(key) is not None), {})
    if not isinstance(rope, dict):
        raise ValueError(f"rope_parameters or rope_scaling is {rope!r}, not an object")
    theta = _positive("rope_theta", (config | rope).get("rope_theta", 10000.0))
    share = _positive("partial_rotary_factor", (config | rope).get("partial_rotary_factor", 1.0))
    width = int(head_width * share)
    if width < 2 or width % 2 or width > head_width:
        raise ValueError(f"rotary positions rotate {width} numbers of a head's {head_width}, which cannot be in pairs")
    rope_type = rope.get("rope_type", rope.get("type"))
    if rope_type == "llama3":
        return Rotary(theta, width, _llama3_scaling(rope))
    if rope_type == "default" or not rope.keys() - {"rope_theta", "partial_rotary_factor"}:
        return Rotary(theta, width)
    raise ValueError(f"rotary positions of type {rope_type!r} are not served")


def _llama3_scaling(rope: dict[str, Any]) -> Llama3Scaling:
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    missing = [key for key in keys if key not in rope]
    if missing:
        raise ValueError(f"rotary positions of type 'llama3' need {missing[0]}")
    factor, low, high, original = (_positive(key, rope[key]) for key in keys)
    if low >= high:
        raise ValueError(f"low_freq_factor is {low!r}, which is not below high_freq_factor, {high!r}")
    if original != int(original):
        raise ValueError(f"original_max_position_embeddings is {original!r}, not a whole number")
    return Llama3Scaling(factor, low, high, int(original))


def whole(name: str, value: Any, least: int = 1) -> int:
    """A number of a config, checked. Raises ValueError."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} is {value!r}, not a whole number from {least} on")
    return value


def whole_ones(name: str, value: Any) -> tuple[int, ...]:
    """A list of ascending numbers from 0 on, checked. Raises ValueError."""
    if not isinstance(value, list | tuple):
        raise ValueError(f"{name} is {value!r}, not a list")
    numbers = tuple(whole(name, each, 0) for each in value)
    if any(before >= after for before, after in pairwise(numbers)):
        raise ValueError(f"{name} is {value!r}, which does not ascend")
    return numbers


def _positive(key: str, value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError(f"{key} is {value!r}, not a positive number")
    return value

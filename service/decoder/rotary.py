"""Rotary positions: the angles of a step's tokens, made once a step, and the rotation of queries and keys by them.

Source: RoFormer (arXiv 2104.09864), halves rotated as in GPT-NeoX and Llama; `transformers` modeling_rope_utils.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from service.families.parts import Llama3Scaling, Rotary

Angles = tuple[Tensor, Tensor]  # cos and sin, each [N, 1, rotated width]
Rotations = Tensor  # the matrix ((cos, -sin), (sin, cos)) of each pair of numbers, [N, 1, 2, 2, rotated width / 2]


class RotaryPositions:
    """Frequencies are computed, not loaded: in fp32 whatever a model's dtype is, once for a device."""

    def __init__(self, config: Rotary) -> None:
        self.config = config
        self._frequencies: Tensor | None = None

    def rotations(self, positions: Tensor, dtype: torch.dtype) -> Rotations:
        """int64 [N] -> what `rotate` needs, the same in every layer."""
        cos, sin = (part.chunk(2, dim=-1)[0] for part in self.angles(positions, dtype))  # (N, 1, width/2)
        rotations: Rotations = torch.stack((cos, -sin, sin, cos), dim=2).unflatten(2, (2, 2))
        return rotations

    def angles(self, positions: Tensor, dtype: torch.dtype) -> Angles:
        """int64 [N] -> cos and sin of the angle of each number that is rotated."""
        if self._frequencies is None or self._frequencies.device != positions.device:
            self._frequencies = frequencies(self.config, positions.device)
        angles = positions[:, None].float() * self._frequencies  # (N, width/2)
        angles = torch.cat((angles, angles), dim=-1)[:, None]  # (N, 1, width)
        return angles.cos().to(dtype), angles.sin().to(dtype)


def frequencies(config: Rotary, device: torch.device) -> Tensor:
    """Radians per position of each pair, fp32 [width/2]."""
    exponents = torch.arange(0, config.width, 2, dtype=torch.float32, device=device) / config.width
    plain = 1.0 / config.theta**exponents
    return plain if config.scaling is None else _scaled(plain, config.scaling)


def _scaled(plain: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Cycles longer than the original context are stretched by `factor`, short ones kept, those between in between."""
    cycles = scaling.original_max_positions * plain / (2 * math.pi)  # in the original context
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    kept = ((cycles - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * plain / scaling.factor + kept * plain


def rotate(x: Tensor, rotations: Rotations) -> Tensor:
    """Rotate each half-pair of the first numbers of [N, H, C], as many as `rotations` has: a product and a sum."""
    width = 2 * rotations.shape[-1]
    products = x[..., :width].unflatten(-1, (1, 2, -1)) * rotations  # (N, H, 2, 2, width/2)
    rotated = (products[..., 0, :] + products[..., 1, :]).flatten(-2)  # (N, H, width)
    return rotated if width == x.shape[-1] else torch.cat((rotated, x[..., width:]), dim=-1)

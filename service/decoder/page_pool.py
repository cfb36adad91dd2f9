"""The tensors of a paged cache: K and V of some layers, in pages of equal size. It does not know whose a page is.

Two pools hold a decoder's memory: self-K/V in blocks of tokens (`kv_blocks` accounts), and pictures, one page for each
tile's latents (`image_pages` accounts).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from service.decoder.kv_blocks import BLOCK_SIZE
from service.families.family import CrossAttentionConfig, DecoderConfig


@dataclass(frozen=True)
class PageShape:
    num_layers: int
    page_size: int  # positions
    num_kv_heads: int  # K
    head_width: int  # C

    @classmethod
    def of_text(cls, config: DecoderConfig) -> PageShape:
        return cls(config.num_layers, BLOCK_SIZE, config.attention.num_kv_heads, config.attention.head_width)

    @classmethod
    def of_images(cls, config: CrossAttentionConfig) -> PageShape:
        heads = config.attention
        return cls(len(config.layers), config.num_latents, heads.num_kv_heads, heads.head_width)

    @property
    def num_values(self) -> int:
        """Numbers on a page: K and V, in all layers."""
        return 2 * self.num_layers * self.page_size * self.num_kv_heads * self.head_width


class Slots(NamedTuple):
    """Places of N positions."""

    pages: Tensor  # int64 [N]
    offsets: Tensor  # int64 [N], in their pages


class PagePool:
    """`k` and `v` [layers, pages, K, page size, C]: what a head attends to on a page stands together."""

    def __init__(self, shape: PageShape, num_pages: int, device: torch.device, dtype: torch.dtype) -> None:
        self.page_size = shape.page_size
        self.page_bytes = shape.num_values * dtype.itemsize
        sizes = (shape.num_layers, num_pages, shape.num_kv_heads, shape.page_size, shape.head_width)
        self.k = torch.zeros(sizes, device=device, dtype=dtype)
        self.v = torch.zeros(sizes, device=device, dtype=dtype)
        self._zero = torch.zeros((), device=device, dtype=dtype)  # a number of Python's would be copied there each time

    def clear(self, slots: Slots) -> None:
        """Before a step: slots show nothing of what their last owner left.

        A mask does not do that: a NaN, and in V an infinity, goes through it as 0 times itself.
        """
        if len(slots.pages) > 0:
            self.k[:, slots.pages, :, slots.offsets] = self._zero
            self.v[:, slots.pages, :, slots.offsets] = self._zero

    def store(self, layer: int, slots: Slots, k: Tensor, v: Tensor) -> None:
        """Write one layer's k and v [N, K, C] to N slots."""
        self.k[layer][slots.pages, :, slots.offsets] = k
        self.v[layer][slots.pages, :, slots.offsets] = v

    def fill(self, pages: list[int], k: Tensor, v: Tensor) -> list[bool]:
        """Write k and v [layers, n, page size, K, C] to n whole pages. Whether all numbers on each are finite."""
        self.k[:, pages] = k = k.transpose(2, 3).to(self.k.dtype)
        self.v[:, pages] = v = v.transpose(2, 3).to(self.v.dtype)
        numbers = (0, 2, 3, 4)  # of a page; the least and the greatest tell, NaN being both
        ends = torch.stack([end for part in (k, v) for end in (part.amin(numbers), part.amax(numbers))])  # (4, n)
        finite: list[bool] = ends.isfinite().all(dim=0).tolist()
        return finite

"""The tensors of a paged cache: K and V of some layers, in pages of equal size. It does not know whose a page is.

Two pools hold a decoder's memory: self-K/V in blocks of tokens (`kv_blocks` accounts), and pictures, one page for each
tile's latents (`image_pages` accounts).
"""

from __future__ import annotations

from dataclasses import dataclass

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


class PagePool:
    def __init__(self, shape: PageShape, num_pages: int, device: torch.device, dtype: torch.dtype) -> None:
        self.page_size = shape.page_size
        self.page_bytes = shape.num_values * dtype.itemsize
        sizes = (shape.num_layers, num_pages, shape.page_size, shape.num_kv_heads, shape.head_width)
        self.k = torch.zeros(sizes, device=device, dtype=dtype)
        self.v = torch.zeros(sizes, device=device, dtype=dtype)

    def clear(self, slots: Tensor) -> None:
        """Before a step: int64 [n] slots (page * page size + offset) show nothing of what their last owner left.

        A mask does not do that: a NaN, and in V an infinity, goes through it as 0 times itself.
        """
        if len(slots) > 0:
            self.k.flatten(1, 2).index_fill_(1, slots, 0)
            self.v.flatten(1, 2).index_fill_(1, slots, 0)

    def store(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Write one layer's k and v [N, K, C] to slots int64 [N]."""
        self.k[layer].flatten(0, 1).index_copy_(0, slots, k)
        self.v[layer].flatten(0, 1).index_copy_(0, slots, v)

    def fill(self, pages: list[int], k: Tensor, v: Tensor) -> list[bool]:
        """Write k and v [layers, n, page size, K, C] to n whole pages. Whether all numbers on each are finite."""
        self.k[:, pages] = k = k.to(self.k.dtype)
        self.v[:, pages] = v = v.to(self.v.dtype)
        finite = (k.isfinite() & v.isfinite()).transpose(0, 1).flatten(1).all(dim=1)  # (n,)
        return [bool(page_is_finite) for page_is_finite in finite.tolist()]

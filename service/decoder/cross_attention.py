"""Cross-attention as paged attention with one page per picture: the pool's tensors, and attention over them.

Prefill, decode, text-only and many-picture requests go through one call: tokens are grouped by the pages they see.
The PyTorch version: reference, CPU, and any GPU. Source: Flamingo (arXiv 2204.14198) §2.2; DESIGN: the two ideas.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from service.decoder.batch import Batch
from service.families.family import CrossAttentionConfig


class ImagePages:
    """K and V of pictures for every gated block. `image_kv_cache.ImageKVCache` says which picture is on which page."""

    def __init__(self, config: CrossAttentionConfig, num_pages: int, device: torch.device, dtype: torch.dtype) -> None:
        heads = config.attention
        shape = (len(config.layers), num_pages, config.num_latents, heads.num_kv_heads, heads.head_width)
        self.k = torch.zeros(shape, device=device, dtype=dtype)  # (X, pages, R, K, C)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self._block_of = {layer: block for block, layer in enumerate(config.layers)}

    @staticmethod
    def page_bytes(config: CrossAttentionConfig, dtype: torch.dtype) -> int:
        return config.picture_kv_bytes(dtype.itemsize)

    def fill(self, pages: list[int], k: Tensor, v: Tensor) -> list[bool]:
        """Write k and v [X, T, R, K, C] to T pages. Whether all numbers on each page are finite."""
        self.k[:, pages] = k = k.to(self.k.dtype)
        self.v[:, pages] = v = v.to(self.v.dtype)
        finite = (k.isfinite() & v.isfinite()).transpose(0, 1).flatten(1).all(dim=1)  # (T,)
        return [bool(page_is_finite) for page_is_finite in finite.tolist()]

    def attend(self, layer: int, q: Tensor, batch: Batch) -> Tensor:
        """q [N, H, C] -> [N, H*C]; 0 for tokens that see no picture."""
        block = self._block_of[layer]
        out = torch.zeros_like(q)
        for group in batch.sight_groups:
            k = self.k[block][group.pages].flatten(1, 2).transpose(1, 2)  # (G, K, pages*R, C)
            v = self.v[block][group.pages].flatten(1, 2).transpose(1, 2)
            num_sets, num_tokens = group.rows.shape
            grouped = q[group.rows].unflatten(2, (k.shape[1], -1))  # (G, n, K, H/K, C)
            grouped = grouped.transpose(1, 2).flatten(2, 3)  # (G, K, n*H/K, C)
            attended = F.scaled_dot_product_attention(grouped, k, v)
            attended = attended.unflatten(2, (num_tokens, -1)).transpose(1, 2)  # (G, n, K, H/K, C)
            out[group.rows.flatten()] = attended.reshape(num_sets * num_tokens, *q.shape[1:])
        return out.flatten(1)

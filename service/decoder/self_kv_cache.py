"""The paged self-K/V cache: its tensors, and causal attention over them.

The PyTorch version: reference, CPU, and any GPU. Query heads that share a KV head are treated as further queries of
that head, so grouped-query attention copies no K or V.
Source: PagedAttention (arXiv 2309.06180) §4; GQA (arXiv 2305.13245).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from service.decoder.batch import Batch, DecodeRows, PrefillSpan
from service.decoder.kv_blocks import BLOCK_SIZE
from service.families.family import DecoderConfig


class SelfKVCache:
    def __init__(self, config: DecoderConfig, num_blocks: int, device: torch.device, dtype: torch.dtype) -> None:
        heads = config.attention
        shape = (config.num_layers, num_blocks, BLOCK_SIZE, heads.num_kv_heads, heads.head_width)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)

    @staticmethod
    def block_bytes(config: DecoderConfig, dtype: torch.dtype) -> int:
        return BLOCK_SIZE * config.token_kv_bytes(dtype.itemsize)

    def clear(self, batch: Batch) -> None:
        """Before a step: no block that it begins shows what its last owner left in it.

        A mask does not do that: a NaN, and in V an infinity, goes through it as 0 times itself.
        """
        if len(batch.unwritten) > 0:
            self.k.flatten(1, 2).index_fill_(1, batch.unwritten, 0)
            self.v.flatten(1, 2).index_fill_(1, batch.unwritten, 0)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
        """Store k and v [N, K, C] of a step's tokens, then attend: q [N, H, C] -> [N, H*C]."""
        k_layer, v_layer = self.k[layer], self.v[layer]  # (blocks, BLOCK_SIZE, K, C)
        k_layer.flatten(0, 1).index_copy_(0, batch.slots, k)
        v_layer.flatten(0, 1).index_copy_(0, batch.slots, v)
        out = torch.empty_like(q)
        for span in batch.prefills:
            rows = slice(span.row, span.row + span.count)
            out[rows] = _prefill(q[rows], k_layer, v_layer, span)
        for decodes in batch.decodes:
            out[decodes.rows] = _decode(q[decodes.rows], k_layer, v_layer, decodes)
        return out.flatten(1)


def _prefill(q: Tensor, k_layer: Tensor, v_layer: Tensor, span: PrefillSpan) -> Tensor:
    """q [n, H, C] -> [n, H, C]; token i of the span sees the first `length - count + i + 1` tokens."""
    k = k_layer[span.blocks].flatten(0, 1)[: span.length]  # (length, K, C)
    v = v_layer[span.blocks].flatten(0, 1)[: span.length]
    num_kv_heads = k.shape[1]
    grouped = q.unflatten(1, (num_kv_heads, -1)).permute(1, 2, 0, 3)  # (K, G, n, C)
    k, v = (x.transpose(0, 1)[:, None].expand(-1, grouped.shape[1], -1, -1) for x in (k, v))  # (K, G, length, C)
    if span.count == span.length:
        out = F.scaled_dot_product_attention(grouped, k, v, is_causal=True)
    else:
        mask = torch.ones(span.count, span.length, dtype=torch.bool, device=q.device).tril(span.length - span.count)
        out = F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask)
    return out.permute(2, 0, 1, 3).flatten(1, 2)  # (n, H, C)


def _decode(q: Tensor, k_layer: Tensor, v_layer: Tensor, decodes: DecodeRows) -> Tensor:
    """q [B, H, C] -> [B, H, C]; one padded call for all of them, the padding masked.

    What is masked is the row's own or 0: see `SelfKVCache.clear` and `DecodeRows.block_table`.
    """
    k = k_layer[decodes.block_table].flatten(1, 2).transpose(1, 2)  # (B, K, max length, C)
    v = v_layer[decodes.block_table].flatten(1, 2).transpose(1, 2)
    grouped = q.unflatten(1, (k.shape[1], -1))  # (B, K, G, C)
    positions = torch.arange(k.shape[2], device=q.device)
    mask = (positions < decodes.lengths[:, None])[:, None, None]  # (B, 1, 1, max length)
    return F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask).flatten(1, 2)

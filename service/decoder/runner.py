"""Runs one step on the device: pictures onto their pages, the batch through the model, logits to tokens."""

from __future__ import annotations

import math
from itertools import chain

import torch
from torch import Tensor

from service.decoder.attention import Scratch, attend
from service.decoder.batch import Batch, make_batch
from service.decoder.model import Decoder
from service.decoder.page_pool import PagePool
from service.decoder.sampler import sample
from service.decoder.scheduler import Chunk, Step

MAX_FILLED = 16  # pages whose K and V are computed at a time: so much memory does a step need for them


class Runner:
    def __init__(self, model: Decoder, self_kv: PagePool, image_kv: PagePool) -> None:
        self.model, self.self_kv, self.image_kv = model, self_kv, image_kv
        self.device = next(model.parameters()).device
        self.dtype = next(model.parameters()).dtype
        self._scratch = Scratch()

    @torch.inference_mode()
    def run(self, step: Step) -> list[int | None]:
        """Compute a step; returns the token that follows each chunk, in order.

        None: a chunk that came to numbers that are not finite, or whose sequence has a picture that did. It shows in
        the chunk's last token, which attends to all others of its sequence. May be run again, whole or in parts.
        """
        broken_pages = self._fill(step)
        if not step.chunks:
            return []
        batch = self.batch(step.chunks)
        self.self_kv.clear(batch.unwritten)
        logits = self.logits(batch)
        tokens = sample(logits, [chunk.sequence for chunk in step.chunks])
        finite = [math.isfinite(total) for total in logits.sum(dim=-1).tolist()]  # torch.isfinite: 4 kernels
        return [
            token if fine and broken_pages.isdisjoint(chain(*chunk.sequence.image_pages.values())) else None
            for chunk, token, fine in zip(step.chunks, tokens, finite, strict=True)
        ]

    def batch(self, chunks: list[Chunk]) -> Batch:
        return make_batch(chunks, self.image_kv.page_size, self.device, self._scratch)

    def logits(self, batch: Batch) -> Tensor:
        """Fp32 logits [B, V] of the rows that a batch wants."""
        attention = PagedAttention(self.self_kv, self.image_kv, batch, self.model.config.cross_attention.layers)
        hidden = self.model(batch.input_ids, batch.positions, attention)
        return self.model.logits(hidden[batch.logits_rows])

    def _fill(self, step: Step) -> set[int]:
        """Put a step's new pictures onto their pages; returns the pages whose K or V is not finite."""
        if not step.image_fills:
            return set()
        pages = [page for of_one, _ in step.image_fills for page in of_one]
        latents = torch.cat([latents for _, latents in step.image_fills])  # (pages, R, E)
        finite: list[bool] = []
        for start in range(0, len(pages), MAX_FILLED):
            some = slice(start, start + MAX_FILLED)
            projected = self.model.project_image(latents[some].to(self.device, self.dtype))
            finite += self.image_kv.fill(pages[some], *projected)
        return {page for page, fine in zip(pages, finite, strict=True) if not fine}


class PagedAttention:
    """The model's `Attention` for one batch: `attend` over two pools. `image_layers`: those with a gated block."""

    def __init__(self, self_kv: PagePool, image_kv: PagePool, batch: Batch, image_layers: tuple[int, ...]) -> None:
        self.self_kv, self.image_kv, self.batch, self.image_layers = self_kv, image_kv, batch, image_layers
        self.sees, self.any_sees = batch.sees, batch.any_sees

    def self_attention(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.self_kv.store(layer, self.batch.slots, k, v)
        return attend(q, self.self_kv.k[layer], self.self_kv.v[layer], self.batch.text).flatten(1)

    def cross_attention(self, layer: int, q: Tensor) -> Tensor:
        index = self.image_layers.index(layer)
        return attend(q, self.image_kv.k[index], self.image_kv.v[index], self.batch.images).flatten(1)

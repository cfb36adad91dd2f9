"""Runs one step on the device: pictures onto their pages, the batch through the model, logits to tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from service.decoder.batch import Batch, make_batch
from service.decoder.cross_attention import ImagePages
from service.decoder.model import Decoder
from service.decoder.sampler import sample
from service.decoder.scheduler import Step
from service.decoder.self_kv_cache import SelfKVCache


class Runner:
    def __init__(self, model: Decoder, self_kv: SelfKVCache, image_pages: ImagePages) -> None:
        self.model, self.self_kv, self.image_pages = model, self_kv, image_pages
        self.device = next(model.parameters()).device
        self.dtype = next(model.parameters()).dtype

    @torch.inference_mode()
    def run(self, step: Step) -> list[int | None]:
        """Compute a step; returns the token that follows each chunk, in order.

        None: a chunk that came to numbers that are not finite, or whose sequence has a picture that did. It shows in
        the chunk's last token, which attends to all others of its sequence. May be run again, whole or in parts.
        """
        broken_pages = self._fill(step)
        if not step.chunks:
            return []
        batch = make_batch(step.chunks, self.device)
        self.self_kv.clear(batch)
        logits = self.logits(batch)
        tokens = sample(logits, [chunk.sequence for chunk in step.chunks])
        finite = logits.sum(dim=-1).isfinite().tolist()
        return [
            token if fine and broken_pages.isdisjoint(chunk.sequence.image_pages.values()) else None
            for chunk, token, fine in zip(step.chunks, tokens, finite, strict=True)
        ]

    def logits(self, batch: Batch) -> Tensor:
        """Fp32 logits [B, V] of the rows that a batch wants."""
        attention = PagedAttention(self.self_kv, self.image_pages, batch)
        hidden = self.model(batch.input_ids, batch.positions, attention)
        return self.model.logits(hidden[batch.logits_rows])

    def _fill(self, step: Step) -> set[int]:
        """Put a step's new pictures onto their pages; returns the pages whose K or V is not finite."""
        if not step.image_fills:
            return set()
        pages = [page for page, _ in step.image_fills]
        latents = torch.stack([latents for _, latents in step.image_fills])  # (T, R, E)
        finite = self.image_pages.fill(pages, *self.model.project_image(latents.to(self.device, self.dtype)))
        return {page for page, fine in zip(pages, finite, strict=True) if not fine}


class PagedAttention:
    """The model's `Attention`, over the two caches, for one batch."""

    def __init__(self, self_kv: SelfKVCache, image_pages: ImagePages, batch: Batch) -> None:
        self.self_kv, self.image_pages, self.batch = self_kv, image_pages, batch
        self.sees = batch.sees
        self.any_sees = bool(batch.sight_groups)

    def self_attention(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.self_kv.attend(layer, q, k, v, self.batch)

    def cross_attention(self, layer: int, q: Tensor) -> Tensor:
        return self.image_pages.attend(layer, q, self.batch)

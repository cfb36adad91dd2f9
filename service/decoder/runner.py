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
    def run(self, step: Step) -> list[int]:
        """Compute a step; returns the next token of each chunk that samples, in order."""
        if step.image_fills:
            pages = [page for page, _ in step.image_fills]
            latents = torch.stack([latents for _, latents in step.image_fills])  # (T, R, E)
            self.image_pages.fill(pages, *self.model.project_image(latents.to(self.device, self.dtype)))
        if not step.chunks:
            return []
        logits = self.logits(make_batch(step.chunks, self.device))
        return sample(logits, [chunk.sequence for chunk in step.chunks if chunk.samples])

    def logits(self, batch: Batch) -> Tensor:
        """Fp32 logits [B', V] of the rows that a batch wants."""
        attention = PagedAttention(self.self_kv, self.image_pages, batch)
        hidden = self.model(batch.input_ids, batch.positions, attention)
        return self.model.logits(hidden[batch.logits_rows])


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

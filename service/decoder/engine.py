"""The decoder engine. One method is the machine: `step` = schedule -> run -> postprocess.

A request that breaks a step fails alone (`isolation`): the others get the tokens that they would have got without it.
Not thread-safe: one thread owns it (`loop.EngineLoop`). Knows nothing of Triton or HTTP.
"""

from __future__ import annotations

import logging
import math
import secrets
import time
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from service.checkpoint import load_weights
from service.contract import FinishReason, TokenEvent, ValidRequest
from service.decoder.image_pages import ImagePages
from service.decoder.kv_blocks import KVBlocks
from service.decoder.model import Decoder
from service.decoder.page_pool import PagePool, PageShape
from service.decoder.pool_sizes import pool_sizes
from service.decoder.runner import Runner
from service.decoder.scheduler import Chunk, Scheduler, Step
from service.decoder.sequence import Sequence
from service.decoder.settings import DTYPES, DecoderSettings
from service.errors import CrossgateError, ImageNotResident, Internal, InvalidRequest, TooLarge
from service.families.family import DecoderConfig, Family
from service.isolation import Pulse, all_finite, run_apart
from service.packed import pack_linears, packed_linear

logger = logging.getLogger(__name__)

Delivery = tuple[int, TokenEvent | CrossgateError]  # request id, and what to tell it


@dataclass(frozen=True)
class EngineStats:
    """Gauges, and counters since the start."""

    num_waiting: int
    num_running: int
    kv_blocks_used: int
    kv_blocks_total: int
    image_pages_used: int
    image_pages_total: int
    image_kv_bytes: int  # of resident pictures
    image_queries: int
    image_hits: int
    prefix_queries: int  # prompt tokens
    prefix_hits: int
    num_preemptions: int
    steps: int


class Engine:
    def __init__(self, family: Family, model: Decoder, settings: DecoderSettings) -> None:
        config, dtype, device = family.decoder, DTYPES[settings.dtype], torch.device(settings.device)
        num_blocks, num_pages = pool_sizes(family, model, settings)
        self.family = family
        self.scheduler = Scheduler(
            KVBlocks(num_blocks),
            ImagePages(num_pages),
            settings.max_running,
            settings.max_waiting,
            settings.max_step_tokens,
            fill_tokens=_fill_tokens(config),
            max_prefill_tokens=settings.max_prefill_tokens,
            position_cost=_position_cost(config),
            reading_cost=_reading_cost(config),
        )
        self.runner = Runner(
            model,
            PagePool(PageShape.of_text(config), num_blocks, device, dtype),
            PagePool(PageShape.of_images(config.cross_attention), num_pages, device, dtype),
        )
        self._sequences: dict[int, Sequence] = {}
        self._steps = 0
        self._pulse = Pulse(self._probe)

    @classmethod
    def from_family(cls, family: Family, settings: DecoderSettings) -> Engine:
        """Load the decoder's weights. Raises InvalidRequest, in one line, for a checkpoint that does not fit."""
        with torch.device("meta"):
            model = Decoder(family.decoder)
        load_weights(model, family.folder, family.decoder_weight, settings.device, DTYPES[settings.dtype])
        pack_linears(model)
        if model.lm_head is None:  # the embedding stays as it is, for lookups
            model.lm_head = packed_linear(model.embed_tokens.weight[: family.decoder.num_logits])
        return cls(family, model.eval(), settings)

    def add(
        self,
        request_id: int,
        request: ValidRequest,
        latents: Tensor | None = None,
        latent_index: list[int] = [],  # noqa: B006
    ) -> None:
        """Queue a request. `latents` [S, R, E]: row s is of picture `latent_index[s]`, one page; a picture's rows stand
        together, in the order of its tiles.

        Raises InvalidRequest, TooLarge, Overloaded, or ImageNotResident if a picture is neither sent nor resident.
        """
        sent = self._check(request, latents, latent_index)
        missing = tuple(
            k for k in dict.fromkeys(request.image_keys) if k not in sent and k not in self.scheduler.images
        )
        if missing:
            raise ImageNotResident("Pictures are not resident in the decoder.", keys=missing)
        sampling = request.sampling
        seed = sampling.seed if sampling.seed is not None else secrets.randbits(63)
        ends = frozenset(sampling.stop_token_ids).union(() if sampling.ignore_eos else self.family.eos_token_ids)
        sequence = Sequence(request_id, request, sent, self.family.see, time.monotonic(), seed, ends)
        self.scheduler.add(sequence)
        self._sequences[request_id] = sequence

    def cancel(self, request_id: int) -> None:
        """Drop a request in whatever state and free all that it holds. One that has ended is nobody's business."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is not None:
            self.scheduler.remove(sequence)

    @property
    def num_running(self) -> int:
        return len(self.scheduler.running)

    @property
    def has_work(self) -> bool:
        return bool(self._sequences)

    def step(self) -> list[Delivery]:
        """Compute one step. A delivery with a finish reason, or an error, is its request's last."""
        step = self.scheduler.schedule()
        deliveries: list[Delivery] = []
        for sequence, keys in step.lost_images:
            del self._sequences[sequence.request_id]
            lost = ImageNotResident("Pictures were evicted while the request waited.", keys=keys)
            deliveries.append((sequence.request_id, lost))
        now_s = time.monotonic()
        for chunk in step.chunks:
            chunk.sequence.first_scheduled_s = chunk.sequence.first_scheduled_s or now_s
        token_ids = run_apart(lambda chunks: self.runner.run(step.only(chunks)), step.chunks)
        settled = [self._settle(chunk, token_id) for chunk, token_id in zip(step.chunks, token_ids, strict=True)]
        deliveries += [delivery for delivery in settled if delivery is not None]
        self._steps += 1
        self._pulse.beat(not token_ids or any(token_id is not None for token_id in token_ids))
        return deliveries

    def stats(self) -> EngineStats:
        scheduler = self.scheduler
        return EngineStats(
            num_waiting=len(scheduler.waiting),
            num_running=len(scheduler.running),
            kv_blocks_used=scheduler.blocks.num_used,
            kv_blocks_total=scheduler.blocks.num_blocks,
            image_pages_used=scheduler.images.num_held,
            image_pages_total=scheduler.images.num_pages,
            image_kv_bytes=scheduler.images.num_resident * self.runner.image_kv.page_bytes,
            image_queries=scheduler.num_image_queries,
            image_hits=scheduler.num_image_hits,
            prefix_queries=scheduler.num_prefix_queries,
            prefix_hits=scheduler.num_prefix_hits,
            num_preemptions=scheduler.num_preemptions,
            steps=self._steps,
        )

    def _settle(self, chunk: Chunk, token_id: int | None) -> Delivery | None:
        """What a chunk's request is told, if anything. `token_id` None: the chunk failed, and with it its request."""
        sequence = chunk.sequence
        if token_id is not None:
            try:
                return self._advance(chunk, token_id)
            except Exception:
                logger.exception("a sequence could not go on")
        self.scheduler.remove(sequence)
        self._sequences.pop(sequence.request_id, None)
        return sequence.request_id, Internal("The decoder failed.")

    def _advance(self, chunk: Chunk, token_id: int) -> Delivery | None:
        """Count a chunk, append its sequence's new token; tell its request, and end it if this was its last."""
        sequence, now_s = chunk.sequence, time.monotonic()
        self.scheduler.computed(chunk)
        if not chunk.samples:
            return None
        sequence.append(token_id)
        sequence.first_token_s = sequence.first_token_s or now_s
        reason = self._finish_reason(sequence, token_id)
        if reason is None and not sequence.sampling.stream and sequence.num_generated > 1:
            return None
        token_ids, sequence.unsent = tuple(sequence.unsent), []
        if reason is None:
            return sequence.request_id, TokenEvent(token_ids)
        self.scheduler.remove(sequence)
        del self._sequences[sequence.request_id]
        return sequence.request_id, TokenEvent(token_ids, reason, sequence.usage(), sequence.timings(now_s))

    def _finish_reason(self, sequence: Sequence, token_id: int) -> FinishReason | None:
        if token_id in sequence.stop_token_ids:
            return FinishReason.STOP
        if sequence.num_generated >= sequence.sampling.max_tokens:
            return FinishReason.LENGTH
        if len(sequence.token_ids) >= self.family.decoder.max_positions:
            return FinishReason.LENGTH
        return None

    def _probe(self) -> bool:
        """Whether a step of one token works. Takes a block for it; without one it does not know, and says yes."""
        if self.scheduler.blocks.num_free == 0:
            return True
        nobody = -1  # requests count from 0
        sequence = Sequence(nobody, ValidRequest((0,)), {}, self.family.see, time.monotonic(), 0)
        sequence.block_table = self.scheduler.blocks.allocate(1)
        try:
            return self.runner.run(Step([Chunk.next(sequence, 1)])) != [None]
        finally:
            self.scheduler.blocks.release(sequence.block_table)

    def _check(self, request: ValidRequest, latents: Tensor | None, latent_index: list[int]) -> dict[str, Tensor]:
        """Refuse what the stage's contract does not allow; returns the latents sent, by key."""
        config = self.family.decoder
        if not request.input_ids:
            raise InvalidRequest("input_ids must hold at least one token.", param="input_ids")
        if len(request.input_ids) >= config.max_positions:  # lengths first: content takes time
            raise InvalidRequest(
                f"The prompt has {len(request.input_ids)} tokens; with one more to generate, at most "
                f"{config.max_positions} fit the model's context.",
                param="input_ids",
            )
        if min(request.input_ids) < 0 or max(request.input_ids) >= config.vocab_size:
            raise InvalidRequest(f"input_ids must be from 0 to {config.vocab_size - 1}.", param="input_ids")
        if any(token >= config.vocab_size for token in request.sampling.stop_token_ids):
            raise InvalidRequest(f"stop_token_ids must be from 0 to {config.vocab_size - 1}.", param="stop_token_ids")
        positions = request.image_positions
        if len(positions) != len(request.image_keys):
            raise InvalidRequest("image_positions and image_keys must have the same length.", param="image_positions")
        if len(positions) > len(request.input_ids):
            raise InvalidRequest("There are more pictures than tokens in the prompt.", param="image_positions")
        if list(positions) != sorted(set(positions)) or not all(0 <= p < len(request.input_ids) for p in positions):
            raise InvalidRequest("image_positions must ascend within the prompt.", param="image_positions")
        if latents is None:
            return {}
        num_latents, width = config.cross_attention.num_latents, config.cross_attention.vision_width
        if tuple(latents.shape) != (len(latent_index), num_latents, width):
            raise InvalidRequest(f"latents must be [len(latent_index), {num_latents}, {width}].", param="latents")
        num_pages = self.scheduler.images.num_pages
        if len(latent_index) > num_pages:
            raise TooLarge(f"latents have {len(latent_index)} rows; the cache holds {num_pages}.", param="latents")
        if not all(0 <= index < len(request.image_keys) for index in latent_index):
            raise InvalidRequest("latent_index must name pictures of the request.", param="latent_index")
        latents = latents.to(self.runner.dtype)
        if not all_finite(latents):
            raise InvalidRequest("latents must be finite numbers, as the decoder computes with them.", param="latents")
        runs = [(request.image_keys[index], len(list(rows))) for index, rows in groupby(latent_index)]
        if len(dict(runs)) < len(runs):
            raise InvalidRequest("latents must hold each picture once, its rows together.", param="latent_index")
        return dict(zip(dict(runs), latents.split([count for _, count in runs]), strict=True))


def _fill_tokens(config: DecoderConfig) -> int:
    """What filling a page costs, in tokens of a step's budget: by the weights that either is multiplied with."""
    cross = config.cross_attention
    num_products = PageShape.of_images(cross).num_values * cross.vision_width  # each K and V from E numbers
    return math.ceil(num_products / config.num_parameters)


def _position_cost(config: DecoderConfig) -> float:
    """What attending to one position more costs, in tokens of a step's budget: its products with q and of V, which are
    computed at about half the rate of those with weights."""
    heads = config.attention
    return 4 * config.num_layers * heads.num_heads * heads.head_width / config.num_parameters


def _reading_cost(config: DecoderConfig) -> float:
    """What one position costs that a single row attends to, in tokens of a step's budget: reading its K and V, beside
    reading all weights, which takes a CPU as long as computing some 16 tokens; what is gathered is read twice."""
    heads = config.attention
    return 32 * 2 * config.num_layers * heads.num_kv_heads * heads.head_width / config.num_parameters

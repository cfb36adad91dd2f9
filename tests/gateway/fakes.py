"""A backend without a model that behaves like the two stages: residency, a script of tokens, delays, errors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from service.contract import FinishReason, Timings, TokenEvent, Usage, ValidRequest
from service.errors import CrossgateError, ImageNotResident, OtherCheckpoint
from service.gateway.pictures.encode import Latents


@dataclass
class FakeBackend:
    """Answers every request with `script`, up to its max_tokens, and keeps what it was asked.

    `gate`: tokens from the second on wait for it. `failures`: raised by the next calls of generate, first one first.
    `fail_after`: (number of tokens, error) raised in mid-stream. `encoder_checkpoint`, `decoder_checkpoint`: of each.
    """

    script: tuple[int, ...]
    step_s: float = 0.0
    encode_s: float = 0.0
    tokens_per_event: int = 1
    gate: asyncio.Event | None = None
    encode_gate: asyncio.Event | None = None
    failures: list[CrossgateError] = field(default_factory=list)
    fail_after: tuple[int, CrossgateError] | None = None
    encode_failure: CrossgateError | None = None
    encoder_checkpoint: bytes = bytes(32)
    decoder_checkpoint: bytes = bytes(32)
    is_ready: bool = True
    resident: set[str] = field(default_factory=set)
    requests: list[ValidRequest] = field(default_factory=list)
    sent: list[set[str]] = field(default_factory=list)
    latents: dict[str, Latents] = field(default_factory=dict)
    num_encoded: int = 0
    num_encoding: int = 0
    max_encoding: int = 0
    num_beats: int = 0
    num_running: int = 0
    num_cancelled: int = 0
    closed: bool = False

    async def encode(self, pixels: NDArray[np.uint8]) -> Latents:
        assert pixels.dtype == np.uint8 and pixels.ndim == 3
        self.num_encoded += 1
        self.num_encoding += 1
        self.max_encoding = max(self.max_encoding, self.num_encoding)
        try:
            if self.encode_gate is not None:
                await self.encode_gate.wait()
            await asyncio.sleep(self.encode_s)
        finally:
            self.num_encoding -= 1
        if self.encode_failure is not None:
            raise self.encode_failure
        return Latents(np.full((1, 4, 8), pixels.mean(), np.float32), self.encoder_checkpoint)

    async def generate(self, request: ValidRequest, latents: Mapping[str, Latents]) -> AsyncGenerator[TokenEvent, None]:
        self.requests.append(request)
        self.sent.append(set(latents))
        self.latents |= latents
        if self.failures:
            raise self.failures.pop(0)
        if any(each.checkpoint != self.decoder_checkpoint for each in latents.values()):
            raise OtherCheckpoint("The two stages run different checkpoints.")
        keys = set(request.image_keys)
        cached = len(keys & self.resident)
        lacking = keys - self.resident - latents.keys()
        if lacking:
            raise ImageNotResident("Pictures are not resident.", keys=tuple(sorted(lacking)))
        self.resident |= keys
        self.num_running += 1
        try:
            async for event in self._events(request, cached):
                yield event
        except (asyncio.CancelledError, GeneratorExit):
            self.num_cancelled += 1
            raise
        finally:
            self.num_running -= 1

    async def _events(self, request: ValidRequest, cached: int) -> AsyncGenerator[TokenEvent, None]:
        limit = request.sampling.max_tokens
        tokens = self.script[:limit]
        reason = FinishReason.LENGTH if limit <= len(self.script) else FinishReason.STOP
        usage = Usage(len(request.input_ids), len(tokens), len(request.image_keys), cached)
        timings = Timings(queue_ms=1.0, prefill_ms=2.0, decode_ms=3.0)
        start = 0
        while start < len(tokens):
            whole = start > 0 and not request.sampling.stream
            end = len(tokens) if whole else start + self.tokens_per_event
            await asyncio.sleep(self.step_s * (end - start) / self.tokens_per_event)
            if start and self.gate is not None:
                await self.gate.wait()
            if self.fail_after is not None and start >= self.fail_after[0]:
                raise self.fail_after[1]
            if end < len(tokens):
                yield TokenEvent(tokens[start:end])
            else:
                yield TokenEvent(tokens[start:], reason, usage, timings)
            start = end

    def heard(self) -> bool:
        return False

    async def ready(self) -> bool:
        self.num_beats += 1
        return self.is_ready

    async def close(self) -> None:
        self.closed = True

"""The two stages as one stream of events: encode what the decoder lacks, decode, and try again where that is safe.

Safe means: before the first token. Until then a request waits for a stage that restarts. Deadlines are kept here,
whatever the backend. Knows nothing of text.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from service.contract import TokenEvent, ValidRequest
from service.errors import CrossgateError, ImageNotResident, Internal, OtherCheckpoint, StageTimeout, Unavailable
from service.gateway.pictures.encode import Latents, PictureEncoder
from service.gateway.pictures.residency import ResidentKeys
from service.gateway.stages.patience import Patience, until
from service.gateway.stages.triton import Backend

LET_END_S = 1.0


@dataclass(frozen=True)
class Deadlines:
    """`restart_wait_s`: how long a request waits for a stage that is away."""

    first_token_s: float
    inter_token_s: float
    restart_wait_s: float


@dataclass
class Trace:
    """What one run of the stages took, filled in on the way. `sent`: keys whose latents went along."""

    encode_s: float = 0.0
    sent: frozenset[str] = field(default_factory=frozenset)


class Stages:
    def __init__(self, backend: Backend, encoder: PictureEncoder, resident: ResidentKeys, deadlines: Deadlines) -> None:
        self._backend = backend
        self._encoder = encoder
        self._resident = resident
        self._deadlines = deadlines

    async def run(
        self, request: ValidRequest, pixels: Mapping[str, NDArray[np.uint8]], trace: Trace, end: float
    ) -> AsyncGenerator[TokenEvent, None]:
        """Ends with the event that has a finish reason. Closing it cancels both stages.

        `pixels`: of every key of the request. `end`: the request's deadline, as the event loop's time; all attempts
        and the pauses between them stay within it. Raises CrossgateError.
        """
        send = self._resident.missing(request.image_keys)
        patience = Patience(self._deadlines.restart_wait_s, end)
        started = False
        while True:
            try:
                latents = await self._encode(send, pixels, trace, end)
                async with aclosing(self._decode(request, latents, end)) as events:
                    async for event in events:
                        if event.token_ids and not started:
                            started = True
                            self._resident.add(request.image_keys)
                        yield event
                return
            except ImageNotResident as error:
                lacking = set(error.keys) & pixels.keys()
                if started or lacking <= send:  # every round sends more than the last, so there is a last one
                    raise Unavailable("The decoder has no room for the pictures.", retry_after_s=1) from error
                self._resident.discard(lacking)
                send |= lacking
            except Unavailable as error:
                if started:
                    raise
                if isinstance(error, OtherCheckpoint) and trace.sent:
                    self._encoder.forget()  # those that went along were made by another encoder than is there now
                await patience.wait_after(error)

    async def _encode(
        self, keys: Iterable[str], pixels: Mapping[str, NDArray[np.uint8]], trace: Trace, end: float
    ) -> dict[str, Latents]:
        keys = sorted(keys)
        trace.sent = frozenset(keys)
        if not keys:
            return {}
        start = time.perf_counter()
        async with until(end):
            latents = await self._encoder.latents({key: pixels[key] for key in keys})
        trace.encode_s += time.perf_counter() - start
        return latents

    async def _decode(
        self, request: ValidRequest, latents: dict[str, Latents], end: float
    ) -> AsyncGenerator[TokenEvent, None]:
        """The backend's events, each within its deadline. Without streaming there are two, the first token's early."""
        now = asyncio.get_running_loop().time
        deadline = min(end, now() + self._deadlines.first_token_s)
        async with aclosing(self._backend.generate(request, latents)) as events:
            while True:
                event = await _next_before(deadline, events)
                yield event
                if event.finish_reason is not None:
                    await _let_end(events)
                    return
                if event.token_ids:
                    deadline = min(end, now() + self._deadlines.inter_token_s) if request.sampling.stream else end


async def _next_before(deadline: float, events: AsyncIterator[TokenEvent]) -> TokenEvent:
    try:
        async with asyncio.timeout_at(deadline):
            return await anext(events)
    except StopAsyncIteration as error:
        raise Internal("The decoder ended before it had finished.") from error
    except TimeoutError as error:
        raise StageTimeout("The decoder did not answer in time.") from error


async def _let_end(events: AsyncIterator[TokenEvent]) -> None:
    """Read the end of a finished stream, so that closing it is no cancellation."""
    try:
        async with asyncio.timeout(LET_END_S):
            await anext(events, None)
    except (TimeoutError, CrossgateError):
        return

"""A request's way from a question to pieces of text; read it in order. Knows nothing of HTTP."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass

from service.contract import FinishReason, TokenEvent, Usage, ValidRequest
from service.contract import Timings as DecoderTimings
from service.errors import Unavailable
from service.gateway.admission import Admission
from service.gateway.pictures.read import PictureReader
from service.gateway.question import Question
from service.gateway.stages.patience import until
from service.gateway.stages.run import Stages, Trace
from service.gateway.telemetry.metrics import Metrics
from service.gateway.telemetry.record import Record
from service.gateway.telemetry.tracing import Tracing
from service.gateway.text.detokenize import Detokenizer, Vocabulary
from service.gateway.text.prompt import PromptBuilder
from service.gateway.text.stop_strings import StopStrings


@dataclass(frozen=True)
class Timings:
    """Milliseconds. `queue_ms`: for a place here and in the decoder; `encode_ms`: 0 if no picture had to be encoded."""

    queue_ms: float
    encode_ms: float
    prefill_ms: float
    decode_ms: float


@dataclass(frozen=True)
class Ending:
    finish_reason: FinishReason
    usage: Usage
    timings: Timings


@dataclass(frozen=True)
class Piece:
    """What became certain together; no text while that would be half a character. The last piece has the ending."""

    text: str
    token_ids: tuple[int, ...] = ()
    ending: Ending | None = None


class Pipeline:
    def __init__(
        self,
        admission: Admission,
        pictures: PictureReader,
        prompts: PromptBuilder,
        stages: Stages,
        vocabulary: Vocabulary,
        metrics: Metrics,
        tracing: Tracing,
        timeout_s: float,
    ) -> None:
        """`timeout_s`: of a request, from its arrival to its last token."""
        self._admission = admission
        self._pictures = pictures
        self._prompts = prompts
        self._stages = stages
        self._vocabulary = vocabulary
        self._metrics = metrics
        self._tracing = tracing
        self._timeout_s = timeout_s

    async def answer(self, question: Question, record: Record) -> AsyncGenerator[Piece, None]:
        """Closing or cancelling it cancels both stages. `record` learns what is to be told. Raises CrossgateError."""
        clock = _Clock(self._metrics)
        end = asyncio.get_running_loop().time() + self._timeout_s
        trace = Trace()
        record.pictures = len(question.pictures)
        try:
            async with AsyncExitStack() as held:
                async with until(end):
                    await held.enter_async_context(self._admission.slot(record.key))
                    record.admitted = True
                    clock.admitted()
                    self._tracing.passed("admission", clock.waited_s)
                    pictures = await self._pictures.read(question.pictures, record.cache_salt)
                    request = await self._prompts.build(question, tuple(picture.key for picture in pictures))
                    request = dataclasses.replace(request, cache_salt=record.cache_salt)
                question.drop()
                record.prompt_tokens, record.completion_tokens = len(request.input_ids), 0
                pixels = {picture.key: picture.pixels for picture in pictures}
                text = _Text(self._vocabulary, question.stop)
                async with aclosing(self._stages.run(request, pixels, trace, end)) as events:
                    async for event in events:
                        if event.finish_reason is FinishReason.CANCELLED:
                            raise Unavailable("The decoder gave the request up.", retry_after_s=1)
                        record.completion_tokens += len(event.token_ids)
                        clock.tokens(event, streamed=request.sampling.stream)
                        piece, stopped = text.push(event)
                        ending = None
                        if stopped or event.finish_reason is not None:
                            ending = _ending(event, stopped, request, record.completion_tokens, trace, clock)
                            self._finished(ending, len(pixels), clock, record)
                        yield Piece(piece, event.token_ids, ending)
                        if stopped:
                            return  # which closes the stages, and so cancels the decoder
        finally:
            if not record.timings:
                record.timings = dataclasses.asdict(_timings(None, trace, clock))

    def _finished(self, ending: Ending, num_images: int, clock: _Clock, record: Record) -> None:
        usage = ending.usage
        self._metrics.finished(ending.finish_reason, usage, num_images, time.perf_counter() - clock.arrival)
        record.finish_reason = ending.finish_reason
        record.prompt_tokens, record.completion_tokens = usage.prompt_tokens, usage.completion_tokens
        record.cached_pictures = usage.cached_images
        record.timings = dataclasses.asdict(ending.timings)


class _Text:
    """Tokens to text that ends before a stop string."""

    def __init__(self, vocabulary: Vocabulary, stop: tuple[str, ...]) -> None:
        self._detokenizer = Detokenizer(vocabulary)
        self._stops = StopStrings(stop)

    def push(self, event: TokenEvent) -> tuple[str, bool]:
        """(text that is certain, whether a stop string was met)"""
        last = event.finish_reason is not None
        text = self._detokenizer.push(event.token_ids)
        if last:
            text += self._detokenizer.flush()
        text, stopped = self._stops.push(text)
        if last and not stopped:
            text += self._stops.flush()
        return text, stopped


class _Clock:
    """When things happened to one request; tells the latency metrics."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self.arrival = time.perf_counter()
        self.admission: float | None = None
        self.first: float | None = None
        self.last = self.arrival

    def admitted(self) -> None:
        self.admission = time.perf_counter()

    @property
    def waited_s(self) -> float:
        """For a place; so far, if there is none yet."""
        return (self.admission or time.perf_counter()) - self.arrival

    def tokens(self, event: TokenEvent, *, streamed: bool) -> None:
        if not event.token_ids:
            return
        now = time.perf_counter()
        self._metrics.generation_tokens.inc(len(event.token_ids))
        if self.first is None:
            self.first = now
            self._metrics.time_to_first_token.observe(now - self.arrival)
        elif streamed:  # without streaming all but the first come at the end
            self._metrics.inter_token_latency.observe(now - self.last)
        self.last = now


def _ending(
    event: TokenEvent, stopped: bool, request: ValidRequest, num_tokens: int, trace: Trace, clock: _Clock
) -> Ending:
    """The decoder's account; ours where a stop string ended the request before the decoder gave one."""
    keys = frozenset(request.image_keys)
    usage = event.usage or Usage(
        prompt_tokens=len(request.input_ids),
        completion_tokens=num_tokens,
        images=len(request.image_keys),
        cached_images=len(keys - trace.sent),
    )
    return Ending(
        finish_reason=FinishReason.STOP if stopped else event.finish_reason or FinishReason.STOP,
        usage=usage,
        timings=_timings(event.timings, trace, clock),
    )


def _timings(decoder: DecoderTimings | None, trace: Trace, clock: _Clock) -> Timings:
    """As far as the request has come. Without the decoder's account its queue counts as prefill."""
    if decoder is None:
        first = clock.first or time.perf_counter()
        prefill_s = max(0.0, first - clock.arrival - clock.waited_s - trace.encode_s)
        decode_s = 0.0 if clock.first is None else clock.last - clock.first
        decoder = DecoderTimings(prefill_ms=prefill_s * 1e3, decode_ms=decode_s * 1e3)
    return Timings(
        queue_ms=round(clock.waited_s * 1e3 + decoder.queue_ms, 3),
        encode_ms=round(trace.encode_s * 1e3, 3),
        prefill_ms=round(decoder.prefill_ms, 3),
        decode_ms=round(decoder.decode_ms, 3),
    )

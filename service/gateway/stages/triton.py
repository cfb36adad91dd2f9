"""The two Triton models over gRPC, and the protocol that stands for them in tests.

One channel a process and one for its heartbeats, one bidirectional stream a request. `tritonclient`'s generated stubs
are used directly: its `aio.InferenceServerClient.stream_infer` builds a result object and numpy arrays a message and
lets raw gRPC errors out of its iterator; a stub's call gives the bytes, and cancels with one method. Latents that are
large do not travel where memory can be shared.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from functools import cached_property, partial
from typing import Any, Protocol

import grpc
import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2, service_pb2_grpc

from service.contract import FUSED_DECODER, VISION_ENCODER, SamplingParams, TokenEvent, ValidRequest
from service.errors import CrossgateError, Overloaded, StageLost, Unavailable
from service.families.vision import VisionConfig
from service.gateway.pictures.encode import Latents
from service.gateway.stages.failures import from_grpc, from_message
from service.gateway.stages.messages import decoder_message, encoder_message, read_event, read_latents
from service.gateway.stages.shared_memory import NotShared, Region, SharedMemory
from service.gateway.telemetry.tracing import Tracing

log = logging.getLogger(__name__)

IMAGE_KEY_HEADER = "x-image-key"  # a proxy hashes it, so that a picture's requests meet on one decoder
CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),  # gRPC's own is two minutes: far longer than a restart
    ("grpc.dns_min_time_between_resolutions_ms", 1000),  # its own is 30 s: a container may come back at a new address
    # A connection that has fallen silent is given up after 13 s: asked after 5 s without a word, 8 s for an answer.
    ("grpc.keepalive_time_ms", 5000),
    ("grpc.keepalive_timeout_ms", 8000),
    ("grpc.http2.ping_timeout_ms", 8000),  # the one that counts since gRPC 1.60; its own is a minute
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)
HEARTBEAT_OPTIONS = (*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1))  # else both would share a connection
MIN_SHARED_BYTES = 1 << 20  # below it a message is as fast
FIRST_ITEMSIZE = 4  # bytes of a number of latents, as long as none have come: fp32
FRESH_S = 2.0  # a model that answered anything so lately needs no heartbeat


class Backend(Protocol):
    """Both stages. Every method raises CrossgateError only."""

    async def encode(self, pixels: NDArray[np.uint8]) -> Latents:
        """`pixels` [3, H, W] -> latents [S, R, E]."""
        ...

    def generate(self, request: ValidRequest, latents: Mapping[str, Latents]) -> AsyncGenerator[TokenEvent, None]:
        """Events up to the one with a finish reason. `latents`: by key, of the pictures sent along. aclose cancels."""
        ...

    def heard(self) -> bool:
        """Whether both models have answered anything just now. Asks nobody."""
        ...

    async def ready(self) -> bool:
        """Whether both models really answer."""
        ...

    async def close(self) -> None: ...


class TritonBackend:
    """`config`: the identity of the checkpoint's config by which requests are made, hex. `probe_token`: of the tiny
    inferences that `ready` makes. `shared_memory_bytes`: how much of this host's shared memory may be used, if Triton
    sees it; 0: none. Belongs to one event loop.
    """

    def __init__(
        self,
        url: str,
        *,
        config: str,
        vision: VisionConfig,
        probe_token: int,
        heartbeat_timeout_s: float,
        tracing: Tracing | None = None,
        shared_memory_bytes: int = 0,
    ) -> None:
        self._url = url
        self._config = bytes.fromhex(config)
        self._channels: list[grpc.aio.Channel] = []
        self._vision = vision
        self._blank = np.zeros((3, vision.encoder.image_size, vision.encoder.image_size), np.uint8)
        self._probe = ValidRequest(input_ids=(probe_token,), sampling=SamplingParams(max_tokens=1, stream=False))
        self._heartbeat_timeout_s = heartbeat_timeout_s
        self._tracing = tracing or Tracing()
        self._itemsize = FIRST_ITEMSIZE
        self._shared = SharedMemory(lambda: self._stub, shared_memory_bytes) if shared_memory_bytes else None
        self._heard: dict[str, float] = {}  # model -> when it last answered; real answers spare the heartbeat

    async def encode(self, pixels: NDArray[np.uint8]) -> Latents:
        rows, columns = self._vision.grid(*pixels.shape[1:]) or (1, 1)
        region = await self._take(rows * columns * math.prod(self._vision.latents_shape) * self._itemsize)
        try:
            response = await self._encode(self._stub, encoder_message(pixels, region), region)
        except NotShared as error:
            self._turn_off(error)
            region = None
            response = await self._encode(self._stub, encoder_message(pixels))
        latents = read_latents(response, region)
        self._itemsize = latents.values.itemsize
        return latents

    async def _encode(
        self, stub: Any, message: service_pb2.ModelInferRequest, region: Region | None = None
    ) -> service_pb2.ModelInferResponse:
        with self._tracing.call("encode") as trace:
            try:
                response = await stub.ModelInfer(message, metadata=trace)
            except grpc.aio.AioRpcError as error:
                _check_shared(error.details(), region)
                raise from_grpc(error.code(), error.details()) from error
            except asyncio.CancelledError as error:
                raise _whose_cancel(error) from error
        self._heard[VISION_ENCODER] = time.monotonic()
        return response

    async def generate(self, request: ValidRequest, latents: Mapping[str, Latents]) -> AsyncGenerator[TokenEvent, None]:
        region = await self._gathered(list(latents.values()))
        try:
            async with aclosing(self._generate(self._stub, request, latents, region)) as events:
                async for event in events:
                    yield event
        except NotShared as error:  # before anything was computed
            self._turn_off(error)
            async with aclosing(self._generate(self._stub, request, latents)) as events:
                async for event in events:
                    yield event

    async def _take(self, num_bytes: int) -> Region | None:
        """Memory that Triton sees, too. None: what would lie there is to be sent."""
        if self._shared is None or num_bytes < MIN_SHARED_BYTES:
            return None
        return await self._shared.take(num_bytes)

    def _turn_off(self, error: NotShared) -> None:
        if self._shared is not None:
            self._shared.turn_off(error)

    async def _gathered(self, latents: Sequence[Latents]) -> Region | None:
        """All of a request's, one after the other. A single one lies where the encoder has put it."""
        if self._shared is None or not self._shared.is_on:
            return None
        if len(latents) == 1 and latents[0].region is not None:
            region: Region = latents[0].region
            return region
        region_of_all = await self._take(sum(each.values.nbytes for each in latents))
        if region_of_all is not None:
            await asyncio.to_thread(_copy, latents, region_of_all)
        return region_of_all

    async def _message(
        self, request: ValidRequest, latents: Mapping[str, Latents], region: Region | None
    ) -> service_pb2.ModelInferRequest:
        """Off the loop where latents are many bytes that are to go along."""
        make = partial(decoder_message, request, latents, self._config, region)
        is_large = region is None and sum(each.values.nbytes for each in latents.values()) >= MIN_SHARED_BYTES
        return await asyncio.to_thread(make) if is_large else make()

    async def _generate(
        self, stub: Any, request: ValidRequest, latents: Mapping[str, Latents], region: Region | None = None
    ) -> AsyncGenerator[TokenEvent, None]:
        message = await self._message(request, latents, region)
        metadata = ((IMAGE_KEY_HEADER, request.image_keys[0]),) if request.image_keys else ()
        with self._tracing.call("generate", pictures=len(request.image_keys), latents=len(latents)) as trace:
            call = stub.ModelStreamInfer(metadata=(*metadata, *trace))
            try:
                await call.write(message)
                await call.done_writing()
                while (response := await call.read()) is not grpc.aio.EOF:
                    if response.error_message:
                        _check_shared(response.error_message, region)
                        raise from_message(response.error_message)
                    self._heard[FUSED_DECODER] = time.monotonic()
                    yield read_event(response.infer_response)
            except grpc.aio.AioRpcError as error:
                _check_shared(error.details(), region)
                raise from_grpc(error.code(), error.details()) from error
            except asyncio.InvalidStateError as error:  # a write on a call that the server has ended
                raise from_grpc(await call.code(), await call.details()) from error
            except asyncio.CancelledError as error:
                raise _whose_cancel(error) from error
            finally:
                call.cancel()  # nothing happens if the stream has ended

    def heard(self) -> bool:
        return all(map(self._is_fresh, (VISION_ENCODER, FUSED_DECODER)))

    def _is_fresh(self, model: str) -> bool:
        return time.monotonic() - self._heard.get(model, -np.inf) < FRESH_S

    async def ready(self) -> bool:
        answers = await asyncio.gather(self._answers(VISION_ENCODER), self._answers(FUSED_DECODER))
        return all(answers)

    async def close(self) -> None:
        if self._shared is not None:
            await self._shared.close()
        for channel in self._channels:
            await channel.close()

    @cached_property
    def _stub(self) -> Any:
        """Made at the first call: a channel belongs to the event loop that runs when it is made."""
        return self._connect(CHANNEL_OPTIONS)

    @cached_property
    def _heartbeat_stub(self) -> Any:
        """On a connection of its own: no stream of a request takes its place, and no latents go before it."""
        return self._connect(HEARTBEAT_OPTIONS)

    def _connect(self, options: tuple[tuple[str, int], ...]) -> Any:
        channel = grpc.aio.insecure_channel(self._url, options=options)
        self._channels.append(channel)
        return service_pb2_grpc.GRPCInferenceServiceStub(channel)

    async def _answers(self, model: str) -> bool:
        if self._is_fresh(model):
            return True
        stub = self._heartbeat_stub
        try:
            async with asyncio.timeout(self._heartbeat_timeout_s):
                await self._check_ready(stub, model)
                if model == VISION_ENCODER:
                    await self._encode(stub, encoder_message(self._blank, wants_latents=False))
                else:
                    async for _ in self._generate(stub, self._probe, {}):
                        pass
        except Overloaded:
            return True  # busy is not dead
        except (CrossgateError, TimeoutError) as error:
            log.warning("%s does not answer the heartbeat: %r", model, error)
            return False
        return True

    async def _check_ready(self, stub: Any, model: str) -> None:
        """Raises Unavailable if Triton itself says that it is not: cheaper than an inference that would hang."""
        try:
            state = await stub.ModelReady(service_pb2.ModelReadyRequest(name=model))
        except grpc.aio.AioRpcError as error:
            raise from_grpc(error.code(), error.details()) from error
        if not state.ready:
            raise Unavailable("The model is not ready.", retry_after_s=5)


def _copy(latents: Sequence[Latents], region: Region) -> None:
    place = 0
    for each in latents:
        values = each.values.reshape(-1).view(np.uint8)
        region.memory[place : place + len(values)] = values
        place += len(values)


def _check_shared(message: str | None, region: Region | None) -> None:
    """Raises NotShared if what Triton says is about a region: it may have been started anew since."""
    if region is not None and region.name in (message or ""):
        raise NotShared(message)


def _whose_cancel(error: asyncio.CancelledError) -> BaseException:
    """gRPC raises CancelledError also where the server ended the call; only ours is to go on as one."""
    task = asyncio.current_task()
    return (
        error if task is None or task.cancelling() else StageLost("The model server ended the call.", retry_after_s=1)
    )

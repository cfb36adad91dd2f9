"""The two Triton models over gRPC, and the protocol that stands for them in tests.

One channel a process and one for its heartbeats, one bidirectional stream a request. `tritonclient`'s generated stubs
are used directly: its `aio.InferenceServerClient.stream_infer` builds a result object and numpy arrays a message and
lets raw gRPC errors out of its iterator; a stub's call gives the bytes, and cancels with one method.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Mapping
from functools import cached_property
from typing import Any, Protocol

import grpc
import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2, service_pb2_grpc

from service.contract import FUSED_DECODER, VISION_ENCODER, SamplingParams, TokenEvent, ValidRequest
from service.errors import CrossgateError, Overloaded, StageLost, Unavailable
from service.gateway.pictures.encode import Latents
from service.gateway.stages.failures import from_grpc, from_message
from service.gateway.telemetry.logs import request_id
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
FRESH_S = 2.0  # a model that answered anything so lately needs no heartbeat


class Backend(Protocol):
    """Both stages. Every method raises CrossgateError only."""

    async def encode(self, pixels: NDArray[np.uint8]) -> Latents:
        """`pixels` [3, H, W] -> latents [R, E]."""
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
    """`image_size` and `probe_token`: of the tiny inferences that `ready` makes. `config`: the identity of the
    checkpoint's config by which requests are made, hex. Belongs to one event loop.
    """

    def __init__(
        self,
        url: str,
        *,
        config: str,
        image_size: int,
        probe_token: int,
        heartbeat_timeout_s: float,
        tracing: Tracing | None = None,
    ) -> None:
        self._url = url
        self._config = bytes.fromhex(config)
        self._channels: list[grpc.aio.Channel] = []
        self._blank = np.zeros((3, image_size, image_size), np.uint8)
        self._probe = ValidRequest(input_ids=(probe_token,), sampling=SamplingParams(max_tokens=1, stream=False))
        self._heartbeat_timeout_s = heartbeat_timeout_s
        self._tracing = tracing or Tracing()
        self._heard: dict[str, float] = {}  # model -> when it last answered; real answers spare the heartbeat

    async def encode(self, pixels: NDArray[np.uint8]) -> Latents:
        return await self._encode(self._stub, pixels)

    async def _encode(self, stub: Any, pixels: NDArray[np.uint8]) -> Latents:
        message = service_pb2.ModelInferRequest(model_name=VISION_ENCODER, id=request_id.get() or "")
        _add_input(message, "pixels", "UINT8", (1, *pixels.shape), pixels.tobytes())
        with self._tracing.call("encode") as trace:
            try:
                response = await stub.ModelInfer(message, metadata=trace)
            except grpc.aio.AioRpcError as error:
                raise from_grpc(error.code(), error.details()) from error
            except asyncio.CancelledError as error:
                raise _whose_cancel(error) from error
        self._heard[VISION_ENCODER] = time.monotonic()
        return _read_latents(response)

    def generate(self, request: ValidRequest, latents: Mapping[str, Latents]) -> AsyncGenerator[TokenEvent, None]:
        return self._generate(self._stub, request, latents)

    async def _generate(
        self, stub: Any, request: ValidRequest, latents: Mapping[str, Latents]
    ) -> AsyncGenerator[TokenEvent, None]:
        metadata = ((IMAGE_KEY_HEADER, request.image_keys[0]),) if request.image_keys else ()
        with self._tracing.call("generate", pictures=len(request.image_keys), latents=len(latents)) as trace:
            call = stub.ModelStreamInfer(metadata=(*metadata, *trace))
            try:
                await call.write(decoder_message(request, latents, self._config))
                await call.done_writing()
                while (response := await call.read()) is not grpc.aio.EOF:
                    if response.error_message:
                        raise from_message(response.error_message)
                    self._heard[FUSED_DECODER] = time.monotonic()
                    yield _read_event(response.infer_response)
            except grpc.aio.AioRpcError as error:
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
                    await self._encode(stub, self._blank)
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


def decoder_message(
    request: ValidRequest, latents: Mapping[str, Latents], config: bytes
) -> service_pb2.ModelInferRequest:
    """The fused decoder's inputs; see the contract for when one is absent."""
    message = service_pb2.ModelInferRequest(model_name=FUSED_DECODER, id=request_id.get() or "")
    input_ids = np.asarray(request.input_ids, "<i4")
    _add_input(message, "input_ids", "INT32", input_ids.shape, input_ids.tobytes())
    if request.image_keys:
        keys = bytes.fromhex("".join(request.image_keys))
        _add_input(message, "image_keys", "UINT8", (len(request.image_keys), 32), keys)
        positions = np.asarray(request.image_positions, "<i4")
        _add_input(message, "image_positions", "INT32", positions.shape, positions.tobytes())
    if latents:
        stacked = np.stack([each.values for each in latents.values()])  # [S, R, E]
        _add_input(message, "latents", "FP16" if stacked.itemsize == 2 else "FP32", stacked.shape, stacked.tobytes())
        index = np.asarray([request.image_keys.index(key) for key in latents], "<i4")
        _add_input(message, "latent_index", "INT32", index.shape, index.tobytes())
        makers = b"".join(each.checkpoint for each in latents.values())
        _add_input(message, "latents_checkpoint", "UINT8", (len(latents), 32), makers)
    _add_input(message, "config", "UINT8", (32,), config)
    if request.cache_salt:
        _add_input(message, "cache_salt", "UINT8", (32,), request.cache_salt)
    sampling = request.sampling.to_json().encode()
    _add_input(message, "sampling", "UINT8", (len(sampling),), sampling)
    return message


def _add_input(
    message: service_pb2.ModelInferRequest, name: str, datatype: str, shape: tuple[int, ...], raw: bytes
) -> None:
    message.inputs.add(name=name, datatype=datatype, shape=shape)
    message.raw_input_contents.append(raw)


def _read_event(response: service_pb2.ModelInferResponse) -> TokenEvent:
    raw = {output.name: response.raw_output_contents[index] for index, output in enumerate(response.outputs)}
    token_ids = np.frombuffer(raw["token_ids"], "<i4").tolist()
    event = raw["event"]
    return TokenEvent(tuple(token_ids)) if event == b"{}" else TokenEvent.from_json(event, token_ids)


def _read_latents(response: service_pb2.ModelInferResponse) -> Latents:
    outputs = {
        output.name: (output, raw) for output, raw in zip(response.outputs, response.raw_output_contents, strict=True)
    }
    described, raw = outputs["latents"]
    dtype = {"FP16": "<f2", "FP32": "<f4"}[described.datatype]
    values = np.frombuffer(raw, dtype).reshape(tuple(described.shape))  # [1, R, E]
    return Latents(values[0], outputs["checkpoint"][1])


def _whose_cancel(error: asyncio.CancelledError) -> BaseException:
    """gRPC raises CancelledError also where the server ended the call; only ours is to go on as one."""
    task = asyncio.current_task()
    return (
        error if task is None or task.cancelling() else StageLost("The model server ended the call.", retry_after_s=1)
    )

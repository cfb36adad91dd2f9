"""The two Triton models over gRPC, and the protocol that stands for them in tests.

One channel a process, one bidirectional stream a request. `tritonclient`'s generated stubs are used directly: its
`aio.InferenceServerClient.stream_infer` builds a result object and numpy arrays a message and lets raw gRPC
errors out of its iterator; a stub's call gives the bytes, and cancels with one method.
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
from service.errors import CrossgateError, Internal, Overloaded, StageTimeout, Unavailable, from_triton
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
)
FRESH_S = 2.0  # a model that answered anything so lately needs no heartbeat
_STREAM_ENDED = ("Stream removed", "Received RST_STREAM", "Internal error from Core")  # the last: of a write on it
_NOT_READY = ("unknown model", "not ready", "not at ready state", "not healthy", "not found", "unavailable")


class Backend(Protocol):
    """Both stages. Every method raises CrossgateError only."""

    async def encode(self, pixels: NDArray[np.uint8]) -> NDArray[Any]:
        """`pixels` [3, H, W] -> latents [R, E]."""
        ...

    def generate(self, request: ValidRequest, latents: Mapping[str, NDArray[Any]]) -> AsyncGenerator[TokenEvent, None]:
        """Events up to the one with a finish reason. `latents`: by key, of the pictures sent along. aclose cancels."""
        ...

    async def ready(self) -> bool:
        """Whether both models really answer."""
        ...

    async def close(self) -> None: ...


class TritonBackend:
    """`image_size` and `probe_token`: of the tiny inferences that `ready` makes. Belongs to one event loop."""

    def __init__(
        self, url: str, *, image_size: int, probe_token: int, heartbeat_timeout_s: float, tracing: Tracing | None = None
    ) -> None:
        self._url = url
        self._channel: grpc.aio.Channel | None = None
        self._blank = np.zeros((3, image_size, image_size), np.uint8)
        self._probe = ValidRequest(input_ids=(probe_token,), sampling=SamplingParams(max_tokens=1, stream=False))
        self._heartbeat_timeout_s = heartbeat_timeout_s
        self._tracing = tracing or Tracing()
        self._heard: dict[str, float] = {}  # model -> when it last answered; real answers spare the heartbeat

    async def encode(self, pixels: NDArray[np.uint8]) -> NDArray[Any]:
        message = service_pb2.ModelInferRequest(model_name=VISION_ENCODER, id=request_id.get() or "")
        _add_input(message, "pixels", "UINT8", (1, *pixels.shape), pixels.tobytes())
        with self._tracing.call("encode") as trace:
            try:
                response = await self._stub.ModelInfer(message, metadata=trace)
            except grpc.aio.AioRpcError as error:
                raise _from_rpc(error) from error
            except asyncio.CancelledError as error:
                raise _whose_cancel(error) from error
        self._heard[VISION_ENCODER] = time.monotonic()
        return _read_latents(response)

    async def generate(
        self, request: ValidRequest, latents: Mapping[str, NDArray[Any]]
    ) -> AsyncGenerator[TokenEvent, None]:
        metadata = ((IMAGE_KEY_HEADER, request.image_keys[0]),) if request.image_keys else ()
        with self._tracing.call("generate", pictures=len(request.image_keys), latents=len(latents)) as trace:
            call = self._stub.ModelStreamInfer(metadata=(*metadata, *trace))
            try:
                await call.write(decoder_message(request, latents))
                await call.done_writing()
                while (response := await call.read()) is not grpc.aio.EOF:
                    if response.error_message:
                        raise _from_message(response.error_message)
                    self._heard[FUSED_DECODER] = time.monotonic()
                    yield _read_event(response.infer_response)
            except grpc.aio.AioRpcError as error:
                raise _from_rpc(error) from error
            except asyncio.InvalidStateError as error:  # a write on a call that the server has ended
                raise _from_rpc_state(await call.code(), await call.details()) from error
            except asyncio.CancelledError as error:
                raise _whose_cancel(error) from error
            finally:
                call.cancel()  # nothing happens if the stream has ended

    async def ready(self) -> bool:
        answers = await asyncio.gather(self._answers(VISION_ENCODER), self._answers(FUSED_DECODER))
        return all(answers)

    async def close(self) -> None:
        if self._channel is not None:
            await self._channel.close()

    @cached_property
    def _stub(self) -> Any:
        """Made at the first call: a channel belongs to the event loop that runs when it is made."""
        self._channel = grpc.aio.insecure_channel(self._url, options=CHANNEL_OPTIONS)
        return service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    async def _answers(self, model: str) -> bool:
        if time.monotonic() - self._heard.get(model, -np.inf) < FRESH_S:
            return True
        try:
            async with asyncio.timeout(self._heartbeat_timeout_s):
                if model == VISION_ENCODER:
                    await self.encode(self._blank)
                else:
                    async for _ in self.generate(self._probe, {}):
                        pass
        except Overloaded:
            return True  # busy is not dead
        except (CrossgateError, TimeoutError) as error:
            log.warning("%s does not answer the heartbeat: %r", model, error)
            return False
        return True


def decoder_message(request: ValidRequest, latents: Mapping[str, NDArray[Any]]) -> service_pb2.ModelInferRequest:
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
        stacked = np.stack(list(latents.values()))  # [S, R, E]
        _add_input(message, "latents", "FP16" if stacked.itemsize == 2 else "FP32", stacked.shape, stacked.tobytes())
        index = np.asarray([request.image_keys.index(key) for key in latents], "<i4")
        _add_input(message, "latent_index", "INT32", index.shape, index.tobytes())
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


def _read_latents(response: service_pb2.ModelInferResponse) -> NDArray[Any]:
    output = response.outputs[0]
    dtype = {"FP16": "<f2", "FP32": "<f4"}[output.datatype]
    latents = np.frombuffer(response.raw_output_contents[0], dtype).reshape(tuple(output.shape))  # [1, R, E]
    first: NDArray[Any] = latents[0]  # [R, E]
    return first


def _from_message(message: str) -> CrossgateError:
    """The error of a stage of ours, or a fixed text for what Triton itself says."""
    ours = from_triton(message)
    if ours is not None:
        return ours
    log.error("Triton: %s", message)
    if any(text in message.lower() for text in _NOT_READY):
        return Unavailable("The model is not ready.", retry_after_s=5)
    return Internal("The model server failed.")


def _whose_cancel(error: asyncio.CancelledError) -> BaseException:
    """gRPC raises CancelledError also where the server ended the call; only ours is to go on as one."""
    task = asyncio.current_task()
    return error if task is None or task.cancelling() else Unavailable("The model server ended the call.")


def _from_rpc(error: grpc.aio.AioRpcError) -> CrossgateError:
    return _from_rpc_state(error.code(), error.details())


def _from_rpc_state(code: grpc.StatusCode, details: str | None) -> CrossgateError:
    if code == grpc.StatusCode.DEADLINE_EXCEEDED:
        return StageTimeout("The model server did not answer in time.")
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.CANCELLED):
        ours = from_triton(details or "")
        return ours or Unavailable("The model server cannot be reached.", retry_after_s=5)
    if (details or "").startswith(_STREAM_ENDED):  # by a balancer whose server died: to gRPC an INTERNAL or UNKNOWN
        return Unavailable("The model server ended the call.", retry_after_s=1)
    return _from_message(details or "")

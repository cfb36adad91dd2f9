"""Triton's gRPC service, as far as the gateway uses it, over a FakeBackend. Real gRPC on a free port."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc

from service.contract import SamplingParams, TokenEvent, ValidRequest
from service.errors import CrossgateError, OtherCheckpoint
from service.gateway.pictures.encode import Latents
from tests.gateway.fakes import FakeBackend


class FakeTriton(service_pb2_grpc.GRPCInferenceServiceServicer):
    """`silent`: never answers. `says`: an error of Triton's own. `ends_with`: the status of a call cut off at once.

    `config`: the identity that requests must carry. `not_ready`: what ModelReady denies. `peers`: whence each inference
    came.
    """

    def __init__(self, backend: FakeBackend, config: str) -> None:
        self.backend = backend
        self.config = config
        self.not_ready: set[str] = set()
        self.peers: list[str] = []
        self.silent = False
        self.says: str | None = None
        self.ends_with: grpc.StatusCode | None = None
        self.metadata: list[dict[str, str]] = []
        self.ids: list[str] = []
        self.num_infer = 0

    async def ModelReady(self, request: Any, context: grpc.aio.ServicerContext) -> Any:
        await self._misbehave(context)
        return service_pb2.ModelReadyResponse(ready=request.name not in self.not_ready)

    async def ModelInfer(self, request: Any, context: grpc.aio.ServicerContext) -> Any:
        self.num_infer += 1
        self.ids.append(request.id)
        self.peers.append(context.peer())
        await self._misbehave(context)
        if self.says is not None:
            await context.abort(grpc.StatusCode.INTERNAL, self.says)
        shape = tuple(request.inputs[0].shape)
        pixels = np.frombuffer(request.raw_input_contents[0], np.uint8).reshape(shape)
        try:
            latents = await self.backend.encode(pixels[0])
        except CrossgateError as error:
            await context.abort(grpc.StatusCode.INTERNAL, error.to_triton())
        response = service_pb2.ModelInferResponse(model_name=request.model_name)
        response.outputs.add(name="latents", datatype="FP16", shape=(1, *latents.values.shape))
        response.raw_output_contents.append(latents.values.astype("<f2").tobytes())
        response.outputs.add(name="checkpoint", datatype="UINT8", shape=(1, len(latents.checkpoint)))
        response.raw_output_contents.append(latents.checkpoint)
        return response

    async def ModelStreamInfer(self, requests: AsyncIterator[Any], context: grpc.aio.ServicerContext) -> Any:
        self.metadata.append(dict(context.invocation_metadata()))
        self.peers.append(context.peer())
        async for message in requests:
            self.ids.append(message.id)
            await self._misbehave(context)
            if self.says is not None:
                yield service_pb2.ModelStreamInferResponse(error_message=self.says)
                return
            request, latents, config = read_request(message)
            try:
                if config != self.config:
                    raise OtherCheckpoint("The model server runs another checkpoint than the gateway.")
                async for event in self.backend.generate(request, latents):
                    yield service_pb2.ModelStreamInferResponse(infer_response=write_event(event))
            except CrossgateError as error:
                yield service_pb2.ModelStreamInferResponse(error_message=f"in ensemble: {error.to_triton()}")

    async def _misbehave(self, context: grpc.aio.ServicerContext) -> None:
        if self.silent:
            await asyncio.sleep(3600)
        if self.ends_with is not None:
            await context.abort(self.ends_with, "Server is stopping")


def read_request(message: Any) -> tuple[ValidRequest, dict[str, Latents], str]:
    raw = {each.name: (each, content) for each, content in zip(message.inputs, message.raw_input_contents, strict=True)}

    def ints(name: str) -> tuple[int, ...]:
        return tuple(np.frombuffer(raw[name][1], "<i4").tolist()) if name in raw else ()

    keys = ()
    if "image_keys" in raw:
        described, content = raw["image_keys"]
        assert tuple(described.shape) == (len(content) // 32, 32)
        keys = tuple(content[start : start + 32].hex() for start in range(0, len(content), 32))
    sampling = SamplingParams.from_json(raw["sampling"][1])
    latents: dict[str, Latents] = {}
    if "latents" in raw:
        described, content = raw["latents"]
        dtype = {"FP16": "<f2", "FP32": "<f4"}[described.datatype]
        stacked = np.frombuffer(content, dtype).reshape(tuple(described.shape))
        described, makers = raw["latents_checkpoint"]
        assert tuple(described.shape) == (len(stacked), 32) and len(makers) == 32 * len(stacked)
        latents = {
            keys[index]: Latents(stacked[number], makers[32 * number : 32 * number + 32])
            for number, index in enumerate(ints("latent_index"))
        }
    request = ValidRequest(
        ints("input_ids"), keys, ints("image_positions"), sampling, raw.get("cache_salt", (None, b""))[1]
    )
    return request, latents, raw["config"][1].hex()


def write_event(event: TokenEvent) -> Any:
    response = service_pb2.ModelInferResponse()
    token_ids = np.asarray(event.token_ids, "<i4")
    text = event.to_json().encode()
    response.outputs.add(name="token_ids", datatype="INT32", shape=token_ids.shape)
    response.outputs.add(name="event", datatype="UINT8", shape=(len(text),))
    response.raw_output_contents.extend([token_ids.tobytes(), text])
    return response

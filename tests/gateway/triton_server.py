"""Triton's gRPC service, as far as the gateway uses it, over a FakeBackend. Real gRPC on a free port."""

from __future__ import annotations

import asyncio
import mmap
from collections.abc import AsyncIterator
from itertools import groupby
from pathlib import Path
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

    `shared_memory_says`: why no memory is shared. `config`: the identity that requests must carry. `not_ready`: what
    ModelReady denies. `peers`: whence each inference came.
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
        self.shared_memory_says: str | None = None
        self.shared_memory_is_silent = False
        self.num_in_use = 0  # times that it does not let go
        self.forgets = False  # every region, once it is used
        self.regions: dict[str, mmap.mmap] = {}
        self.num_shared = 0  # tensors that came or went by a region

    async def SystemSharedMemoryRegister(self, request: Any, context: grpc.aio.ServicerContext) -> Any:
        if self.shared_memory_is_silent:
            await asyncio.sleep(3600)
        if self.shared_memory_says is not None:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, self.shared_memory_says)
        with Path("/dev/shm", request.key.removeprefix("/")).open("r+b") as file:
            self.regions[request.name] = mmap.mmap(file.fileno(), request.byte_size)
        return service_pb2.SystemSharedMemoryRegisterResponse()

    async def SystemSharedMemoryUnregister(self, request: Any, context: grpc.aio.ServicerContext) -> Any:
        if self.num_in_use:
            self.num_in_use -= 1
            await context.abort(
                grpc.StatusCode.INTERNAL, f"Cannot unregister '{request.name}', it is currently in use."
            )
        self.regions.pop(request.name, None)
        return service_pb2.SystemSharedMemoryUnregisterResponse()

    async def SystemSharedMemoryStatus(self, request: Any, context: grpc.aio.ServicerContext) -> Any:
        if self.shared_memory_is_silent:
            await asyncio.sleep(3600)
        if self.shared_memory_says is not None:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, self.shared_memory_says)
        status = service_pb2.SystemSharedMemoryStatusResponse()
        for name in self.regions:
            status.regions[name].name = name
        return status

    def _region(self, tensor: Any) -> mmap.mmap | None:
        """That of a tensor; None if it has none. Raises KeyError, in Triton's words, if it is not known."""
        name = tensor.parameters["shared_memory_region"].string_param
        if not name:
            return None
        if self.forgets:
            self.regions.clear()
        if name not in self.regions:
            raise KeyError(f"Unable to find shared memory region: '{name}'")
        self.num_shared += 1
        return self.regions[name]

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
        for asked in request.outputs:
            if asked.name == "latents":
                content = latents.values.astype("<f2").tobytes()
                response.outputs.add(name="latents", datatype="FP16", shape=(1, *latents.values.shape))
                try:
                    region = self._region(asked)
                except KeyError as error:
                    await context.abort(grpc.StatusCode.NOT_FOUND, error.args[0])
                if region is not None:
                    region[: len(content)] = content
                    content = b""
                response.raw_output_contents.append(content)
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
            try:
                self._fetch(message)
            except KeyError as error:
                yield service_pb2.ModelStreamInferResponse(error_message=error.args[0])
                return
            request, latents, config = read_request(message)
            try:
                if config != self.config:
                    raise OtherCheckpoint("The model server runs another checkpoint than the gateway.")
                async for event in self.backend.generate(request, latents):
                    yield service_pb2.ModelStreamInferResponse(infer_response=write_event(event))
            except CrossgateError as error:
                yield service_pb2.ModelStreamInferResponse(error_message=f"in ensemble: {error.to_triton()}")

    def _fetch(self, message: Any) -> None:
        """Latents that lie in a region, as if they had been sent."""
        for place, tensor in enumerate(message.inputs):
            if tensor.name == "latents" and (region := self._region(tensor)) is not None:
                length = tensor.parameters["shared_memory_byte_size"].int64_param
                message.raw_input_contents.insert(place, region[:length])

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
        for index, rows in groupby(enumerate(ints("latent_index")), key=lambda row: row[1]):
            numbers = [number for number, _ in rows]
            maker = makers[32 * numbers[0] : 32 * numbers[0] + 32]
            assert makers[32 * numbers[0] : 32 * numbers[-1] + 32] == maker * len(numbers)
            latents[keys[index]] = Latents(stacked[numbers], maker)
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

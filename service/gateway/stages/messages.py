"""What is said to the two Triton models and what they answer, as gRPC messages of the contract's tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2

from service.contract import FUSED_DECODER, VISION_ENCODER, TokenEvent, ValidRequest
from service.gateway.pictures.encode import Latents
from service.gateway.stages.shared_memory import Region
from service.gateway.telemetry.logs import request_id


def encoder_message(
    pixels: NDArray[np.uint8], region: Region | None = None, *, wants_latents: bool = True
) -> service_pb2.ModelInferRequest:
    """`region`: where the latents are to go; None: they are to be sent, if they are wanted at all."""
    message = service_pb2.ModelInferRequest(model_name=VISION_ENCODER, id=request_id.get() or "")
    _add_input(message, "pixels", "UINT8", (1, *pixels.shape), pixels.tobytes())
    message.outputs.add(name="checkpoint")
    if wants_latents:
        described = message.outputs.add(name="latents")
        if region is not None:
            _lie_in(region, described, region.memory.nbytes)
    return message


def read_latents(response: service_pb2.ModelInferResponse, region: Region | None = None) -> Latents:
    outputs = {
        output.name: (output, raw) for output, raw in zip(response.outputs, response.raw_output_contents, strict=True)
    }
    described, raw = outputs["latents"]
    dtype = {"FP16": "<f2", "FP32": "<f4"}[described.datatype]
    shape = tuple(described.shape)  # 1, S, R, E
    source = raw if region is None else region.memory
    values = np.frombuffer(source, dtype, count=math.prod(shape)).reshape(shape)
    return Latents(values[0], outputs["checkpoint"][1], region)


def decoder_message(
    request: ValidRequest, latents: Mapping[str, Latents], config: bytes, region: Region | None = None
) -> service_pb2.ModelInferRequest:
    """The fused decoder's inputs; see the contract for when one is absent. `region`: begins with all of the latents."""
    message = service_pb2.ModelInferRequest(model_name=FUSED_DECODER, id=request_id.get() or "")
    input_ids = np.asarray(request.input_ids, "<i4")
    _add_input(message, "input_ids", "INT32", input_ids.shape, input_ids.tobytes())
    if request.image_keys:
        keys = bytes.fromhex("".join(request.image_keys))
        _add_input(message, "image_keys", "UINT8", (len(request.image_keys), 32), keys)
        positions = np.asarray(request.image_positions, "<i4")
        _add_input(message, "image_positions", "INT32", positions.shape, positions.tobytes())
    if latents:
        pages = [(request.image_keys.index(key), each) for key, each in latents.items() for _ in each.values]
        first = pages[0][1].values
        shape, datatype = (len(pages), *first.shape[1:]), "FP16" if first.itemsize == 2 else "FP32"
        if region is None:
            raw = b"".join(each.values.tobytes() for each in latents.values())
            _add_input(message, "latents", datatype, shape, raw)
        else:
            described = message.inputs.add(name="latents", datatype=datatype, shape=shape)
            _lie_in(region, described, sum(each.values.nbytes for each in latents.values()))
        index = np.asarray([ordinal for ordinal, _ in pages], "<i4")
        _add_input(message, "latent_index", "INT32", index.shape, index.tobytes())
        makers = b"".join(each.checkpoint for _, each in pages)
        _add_input(message, "latents_checkpoint", "UINT8", (len(pages), 32), makers)
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


def _lie_in(region: Region, tensor: Any, num_bytes: int) -> None:
    tensor.parameters["shared_memory_region"].string_param = region.name
    tensor.parameters["shared_memory_byte_size"].int64_param = num_bytes


def read_event(response: service_pb2.ModelInferResponse) -> TokenEvent:
    raw = {output.name: response.raw_output_contents[index] for index, output in enumerate(response.outputs)}
    token_ids = np.frombuffer(raw["token_ids"], "<i4").tolist()
    event = raw["event"]
    return TokenEvent(tuple(token_ids)) if event == b"{}" else TokenEvent.from_json(event, token_ids)

"""What anyone can send straight to Triton's models: refused by name, and nobody else notices."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2, service_pb2_grpc

from service.contract import SamplingParams, ValidRequest
from service.errors import CrossgateError, from_triton
from service.families import load_family
from service.gateway.pictures.encode import Latents
from service.gateway.stages.messages import decoder_message
from tests.e2e.running import Running, picture, question

KEY = "ab" * 32
LATENTS = np.zeros((8, 48), "<f4")
SAMPLING = SamplingParams(max_tokens=2)


def ask(service: Running, message: service_pb2.ModelInferRequest) -> CrossgateError | None:
    """The error with which the decoder's stream ends, if it does."""
    port = service.wait_for(r"gRPC (\d+), HTTP")[1]
    with grpc.insecure_channel(f"127.0.0.1:{port}", [("grpc.max_send_message_length", -1)]) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        for response in stub.ModelStreamInfer(iter([message]), timeout=60):
            if response.error_message:
                error = from_triton(response.error_message)
                assert error is not None, response.error_message
                return error
    return None


class Maker:
    """Messages to the decoder of a checkpoint, as its gateway would make them, but for what is wrong with them."""

    def __init__(self, folder: Path) -> None:
        family = load_family(folder)
        self._config, self._checkpoint = bytes.fromhex(family.config_identity), bytes.fromhex(family.identity)

    def message(self, request: ValidRequest, latents: Mapping[str, NDArray[Any]]) -> service_pb2.ModelInferRequest:
        sent = {key: Latents(values[None], self._checkpoint) for key, values in latents.items()}
        return decoder_message(request, sent, self._config)

    def with_sampling(self, text: bytes) -> service_pb2.ModelInferRequest:
        message = self.message(ValidRequest((1, 5)), {})
        index = [tensor.name for tensor in message.inputs].index("sampling")
        message.inputs[index].shape[:] = [len(text)]
        message.raw_input_contents[index] = text
        return message

    def with_latents(self, value: float) -> service_pb2.ModelInferRequest:
        latents = LATENTS.copy()
        latents[3, 4] = value
        return self.message(ValidRequest((1, 5), (KEY,), (1,), SAMPLING), {KEY: latents})


@pytest.fixture(scope="session")
def maker(tiny_checkpoint: Path) -> Maker:
    return Maker(tiny_checkpoint)


HOSTILE: dict[str, tuple[Callable[[Maker], service_pb2.ModelInferRequest], str]] = {
    "a million ids": (lambda it: it.message(ValidRequest((5,) * 10**6, sampling=SAMPLING), {}), "input_ids"),
    "ids past the vocabulary": (
        lambda it: it.message(ValidRequest((1, 2**31 - 1), sampling=SAMPLING), {}),
        "input_ids",
    ),
    "100,000 keys": (lambda it: it.message(ValidRequest((1, 5), (KEY,) * 10**5, (0,) * 10**5), {}), "image_keys"),
    "NaN latents": (lambda it: it.with_latents(np.nan), "latents"),
    "infinite latents": (lambda it: it.with_latents(-np.inf), "latents"),
    "NaN temperature": (lambda it: it.with_sampling(b'{"temperature": NaN}'), "temperature"),
    "infinite seed": (lambda it: it.with_sampling(b'{"seed": -Infinity}'), "seed"),
    "a float of tokens": (lambda it: it.with_sampling(b'{"max_tokens": 1.5}'), "max_tokens"),
    "a million stop ids": (lambda it: it.with_sampling(b'{"stop_token_ids": [' + b"1," * 10**6 + b"1]}"), "sampling"),
    "a stop id past the vocabulary": (
        lambda it: it.with_sampling(b'{"stop_token_ids": [2000000000]}'),
        "stop_token_ids",
    ),
    "depth": (lambda it: it.with_sampling(b"[" * 4000), "sampling"),
    "no text": (lambda it: it.with_sampling(b"\xff\x00\xfe"), "sampling"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_the_decoder_cannot_work_with_is_refused_by_name(service: Running, maker: Maker, name: str) -> None:
    make, param = HOSTILE[name]
    error = ask(service, make(maker))
    assert error is not None and error.status == 400
    assert error.param == param


def test_nobody_notices_hostile_requests_beside_him(service: Running, maker: Maker) -> None:
    def stream(body: dict[str, Any]) -> list[int]:
        token_ids: list[int] = []
        with httpx.stream("POST", f"{service.url}/v1/generate", json={**body, "stream": True}, timeout=120) as reply:
            for line in reply.iter_lines():
                if line.startswith("data: {"):
                    token_ids += json.loads(line.removeprefix("data: ")).get("token_ids") or []
        return token_ids

    bodies = [question(*[picture(700 + number)] * (number % 2), max_tokens=60, ignore_eos=True) for number in range(8)]
    tiny = question(picture(700), max_tokens=60, ignore_eos=True, temperature=1e-38, top_p=1e-300)
    alone = [stream(body) for body in bodies]
    with ThreadPoolExecutor(12) as threads:
        together = [threads.submit(stream, body) for body in bodies]
        tinies = [threads.submit(stream, tiny) for _ in range(3)]
        for make, _ in HOSTILE.values():
            ask(service, make(maker))
        assert [one.result() for one in together] == alone
        assert all(len(one.result()) == 60 for one in tinies)
    assert service.metric("crossgate_kv_cache_usage_ratio") == 0

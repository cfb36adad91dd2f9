"""What hostile clients are made of: bytes to one gateway, or tensors straight to its Triton, and what came back."""

from __future__ import annotations

import json
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2, service_pb2_grpc

from tests.e2e.running import data_url

PATIENCE_S = 15.0  # then a hostile client gives up; whoever waits longer for it is not its victim

Answers = Counter[str]  # what each request was told: a status, "closed", "nothing"


@dataclass(frozen=True)
class Target:
    """`latents_shape`: of a picture, [R, E]."""

    port: int
    triton_port: int
    image_token: int
    latents_shape: tuple[int, int]
    key: str = ""


def send(target: Target, pieces: Iterable[bytes], *, pause_s: float = 0.0, patience_s: float = PATIENCE_S) -> Answers:
    """Bytes, as they are, on a connection of their own; then the first line of the reply."""
    deadline_s = time.monotonic() + patience_s
    with socket.create_connection(("127.0.0.1", target.port), timeout=patience_s) as connection:
        with suppress(OSError):  # it may answer and close before it has read everything
            for piece in pieces:
                connection.sendall(piece)
                time.sleep(pause_s)
                if time.monotonic() > deadline_s:
                    return Counter(["nothing"])
        connection.settimeout(max(0.1, deadline_s - time.monotonic()))
        try:
            line = connection.recv(4096)
            with suppress(OSError):
                while connection.recv(1 << 16):  # a client that wants the answer
                    pass
        except TimeoutError:
            return Counter(["nothing"])
        except OSError:
            return Counter(["closed"])
    return Counter([line[9:12].decode("ascii", "replace") if line.startswith(b"HTTP/1.1 ") else "closed"])


def head(
    target: Target, path: str, length: int | None, content_type: str, *headers: str, method: str = "POST"
) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: x", "Connection: close", f"Content-Type: {content_type}", *headers]
    lines.append("Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}")
    if target.key:
        lines.append(f"Authorization: Bearer {target.key}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


def post(target: Target, body: bytes, path: str = "/v1/generate", content_type: str = "application/json") -> Answers:
    return send(target, [head(target, path, len(body), content_type), body])


def ask(target: Target, **fields: Any) -> Answers:
    return post(target, json.dumps({"prompt": "Hello", "max_tokens": 4, **fields}).encode())


def chat(target: Target, content: Any, **fields: Any) -> Answers:
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 4, **fields}
    return post(target, json.dumps(body).encode(), "/v1/chat/completions")


def show(target: Target, *pictures: bytes, prompt: str = "What?", **fields: Any) -> Answers:
    """Ask about pictures."""
    return ask(
        target, prompt="<image>" * len(pictures) + prompt, images=[data_url(each) for each in pictures], **fields
    )


def form(target: Target, parts: Iterable[tuple[str, bytes]], charset: str = "") -> Answers:
    """A multipart form: (what stands behind form-data;, content)."""
    body = b"".join(
        b"--b\r\nContent-Disposition: form-data; " + what.encode() + b"\r\n\r\n" + content + b"\r\n"
        for what, content in parts
    )
    return post(target, body + b"--b--\r\n", content_type=f"multipart/form-data; boundary=b{charset}")


def at_once(count: int, attack: Callable[[int], Answers]) -> Answers:
    with ThreadPoolExecutor(count) as threads:
        return sum(threads.map(attack, range(count)), Counter())


def decode(target: Target, **changes: NDArray[Any]) -> Answers:
    """Straight to the decoder's gRPC port, as nobody but the gateway should be able to: with these tensors changed."""
    sampling = json.dumps({"max_tokens": 4}).encode()
    tensors: dict[str, NDArray[Any]] = {
        "input_ids": np.array([1, target.image_token, 50, 60], np.int32),
        "sampling": np.frombuffer(sampling, np.uint8),
        "image_keys": np.random.default_rng().integers(0, 256, (1, 32), dtype=np.uint8),
        "image_positions": np.array([1], np.int32),
        "latents": np.ones((1, *target.latents_shape), np.float32),
        "latent_index": np.array([0], np.int32),
        **changes,
    }
    kinds = {np.dtype("int32"): "INT32", np.dtype("uint8"): "UINT8", np.dtype("float32"): "FP32"}
    message = service_pb2.ModelInferRequest(model_name="fused_decoder")
    for name, tensor in tensors.items():
        message.inputs.add(name=name, datatype=kinds[tensor.dtype], shape=tensor.shape)
        message.raw_input_contents.append(tensor.tobytes())
    with grpc.insecure_channel(f"127.0.0.1:{target.triton_port}") as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        try:
            answers = list(stub.ModelStreamInfer(iter([message]), timeout=PATIENCE_S))
        except grpc.RpcError as error:
            return Counter([f"gRPC {error.code().name}"])
    return Counter(["gRPC error" if any(answer.error_message for answer in answers) else "gRPC OK"])

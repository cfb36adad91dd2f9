"""A stand-in for the module that Triton's stub gives to a model: tensors and responses that stay in this process.

Put into `sys.modules` as `triton_python_backend_utils` by who runs the decoder's adapter without Triton.
"""

from __future__ import annotations

import queue
from typing import Any

import torch

TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1


class Tensor:
    def __init__(self, name: str, values: torch.Tensor) -> None:
        self.name, self.values = name, values

    @classmethod
    def from_dlpack(cls, name: str, values: torch.Tensor) -> Tensor:
        return cls(name, torch.from_dlpack(values))

    def to_dlpack(self) -> torch.Tensor:
        return self.values


class TritonError(Exception):
    pass


class InferenceResponse:
    def __init__(self, outputs: list[Tensor] = [], error: TritonError | None = None) -> None:  # noqa: B006
        self.outputs = {output.name: output.values for output in outputs}
        self.error = error


class Request:
    """With its sender in one. `responses`: what was sent, in order; None after the last."""

    def __init__(self, **inputs: torch.Tensor) -> None:
        self.inputs = inputs
        self.responses: queue.SimpleQueue[InferenceResponse | None] = queue.SimpleQueue()

    def request_id(self) -> str:
        return ""

    def get_response_sender(self) -> Request:
        return self

    def is_cancelled(self) -> bool:
        return False

    def send(self, response: InferenceResponse | None = None, flags: int = 0) -> None:
        if response is not None:
            self.responses.put(response)
        if flags == TRITONSERVER_RESPONSE_COMPLETE_FINAL:
            self.responses.put(None)


def get_input_tensor_by_name(request: Request, name: str) -> Tensor | None:
    return Tensor(name, request.inputs[name]) if name in request.inputs else None


class MetricFamily:
    GAUGE, COUNTER = "gauge", "counter"

    def __init__(self, name: str, description: str, kind: str) -> None:
        self.name = name

    def Metric(self, labels: dict[str, str]) -> Metric:
        return Metric()


class Metric:
    def set(self, value: float) -> None:
        pass

    def increment(self, value: float) -> None:
        pass


class Logger:
    @staticmethod
    def log_error(message: str) -> None:
        raise AssertionError(message)


def answer(request: Request) -> list[Any]:
    """The token ids of a request's answer, waited for. Any error is the caller's."""
    token_ids: list[int] = []
    while (response := request.responses.get(timeout=30)) is not None:
        assert response.error is None, response.error
        token_ids += response.outputs["token_ids"].tolist()
    return token_ids

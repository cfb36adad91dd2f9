"""Questions over HTTP as a client asks them, and load made of them. Everything is bounded in count and time."""

from __future__ import annotations

import base64
import io
import itertools
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
from PIL import Image

TIMEOUT_S = 90.0


def picture(number: int) -> str:
    """A data URL; another number is another picture."""
    pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


@dataclass
class Answer:
    """What came over one stream. `status` None: there was no HTTP reply."""

    status: int | None = None
    num_tokens: int = 0
    finish_reason: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    error: dict[str, Any] | None = None
    done: bool = False

    @property
    def is_complete(self) -> bool:
        return self.status == 200 and self.done and self.finish_reason == "length" and self.error is None

    @property
    def outcome(self) -> str:
        """A clean error after the first token: an error event, and no [DONE]."""
        if self.is_complete:
            return "complete"
        if self.num_tokens and self.error is not None and not self.done:
            return "clean error after the first token"
        return "broken after the first token" if self.num_tokens else "failed before the first token"


def ask(url: str, number: int | None, max_tokens: int, started: threading.Event | None = None) -> Answer:
    """Ask about a picture (None: text alone) for exactly `max_tokens` tokens. `started` is set by the first."""
    body = {
        "prompt": "what is it" if number is None else "<image>what is it",
        "images": [] if number is None else [picture(number)],
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    answer = Answer()
    try:
        with httpx.stream("POST", f"{url}/v1/generate", json=body, timeout=TIMEOUT_S) as reply:
            answer.status = reply.status_code
            if reply.status_code != 200:
                answer.error = json.loads(reply.read())["error"]
                return answer
            for line in reply.iter_lines():
                if line == "data: [DONE]":
                    answer.done = True
                elif line.startswith("data: "):
                    read_event(json.loads(line.removeprefix("data: ")), answer)
                if started is not None and answer.num_tokens:
                    started.set()
    except httpx.HTTPError as error:
        answer.error = answer.error or {"message": repr(error)}
        answer.done = False
    return answer


def read_event(event: dict[str, Any], answer: Answer) -> None:
    if "error" in event:
        answer.error = event["error"]
        return
    answer.num_tokens += len(event["token_ids"])
    answer.finish_reason = event.get("finish_reason") or answer.finish_reason
    answer.usage = event.get("usage") or answer.usage


@contextmanager
def load(url: str, num_clients: int, max_tokens: int, limit_s: float = 120.0) -> Iterator[list[Answer]]:
    """Clients that each ask about one picture after another, until the block ends. Yields what came, so far."""
    answers: list[Answer] = []
    stop = threading.Event()
    numbers = itertools.count(1_000)
    end_s = time.monotonic() + limit_s

    def client() -> None:
        while not stop.is_set() and time.monotonic() < end_s:
            answers.append(ask(url, next(numbers), max_tokens))

    clients = [threading.Thread(target=client) for _ in range(num_clients)]
    for thread in clients:
        thread.start()
    try:
        yield answers
    finally:
        stop.set()
        for thread in clients:
            thread.join()


def at_once(url: str, number: int, max_tokens: int, count: int) -> list[Answer]:
    """`count` clients ask the same thing at the same time."""
    answers: list[Answer] = []
    clients = [
        threading.Thread(target=lambda: answers.append(ask(url, number, max_tokens)), daemon=True) for _ in range(count)
    ]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    return answers


def outcomes(answers: list[Answer]) -> Counter[str]:
    return Counter(answer.outcome for answer in answers)

"""One question over HTTP, and what a person would have felt of the answer.

The standard library's client on purpose: it hands over a line as soon as the line is there. Clients that read in blocks
would put the first token's time where the first kilobyte was full. Knows nothing of locust.
"""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from loadtest.pictures import data_url
from loadtest.scenarios import Ask, Message

KEEP_ALIVE_S = 5.0  # as HTTPX; a connection that idles longer may be one that the server is just closing
CHAT, GENERATE = "/v1/chat/completions", "/v1/generate"


@dataclass
class Reply:
    """Milliseconds from sending on. `error` None is a success; `left`: we hung up as planned, no failure."""

    status: int = 0
    text: str = ""
    ttft_ms: float | None = None
    gaps_ms: list[float] = field(default_factory=list)  # between pieces of text; a piece is a token or a few
    e2e_ms: float = 0.0
    usage: dict[str, Any] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)
    error: str | None = None
    left: bool = False


class Client:
    """One user's connection, kept open between questions that follow soon."""

    def __init__(self, base_url: str, *, api_key: str | None = None, timeout_s: float = 120.0) -> None:
        url = urlsplit(base_url)
        kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
        self._connection = kind(url.hostname or "127.0.0.1", url.port, timeout=timeout_s)
        self._idle_since = 0.0
        self._headers = {"content-type": "application/json"}
        if api_key:
            self._headers["authorization"] = f"Bearer {api_key}"

    def ask(self, ask: Ask, route: str, *, stream: bool) -> Reply:
        """Never raises: whatever goes wrong is the reply's error."""
        reply = Reply()
        body = json.dumps(chat_body(ask, stream) if route == CHAT else generate_body(ask, stream))
        start = time.perf_counter()
        if start - self._idle_since > KEEP_ALIVE_S:
            self._connection.close()  # the request opens another
        try:
            self._connection.request("POST", route, body, self._headers)
            response = self._connection.getresponse()
            reply.status = response.status
            if response.status != 200:
                reply.error = f"{response.status} {_error_code(response.read())}"
            elif stream:
                _read_stream(response, reply, start, ask.leave_after)
            else:
                _read_whole(json.loads(response.read()), reply)
        except (OSError, ValueError, http.client.HTTPException) as error:
            reply.error = type(error).__name__
        if reply.error or reply.left:
            self._connection.close()  # whatever is left on it belongs to nobody
        self._idle_since = time.perf_counter()
        reply.e2e_ms = (self._idle_since - start) * 1e3
        return reply

    def close(self) -> None:
        self._connection.close()


def chat_body(ask: Ask, stream: bool) -> dict[str, Any]:
    body = {"messages": [_message(message) for message in ask.messages], **_limits(ask), "stream": stream}
    if stream:
        body["stream_options"] = {"include_usage": True}
    return body


def generate_body(ask: Ask, stream: bool) -> dict[str, Any]:
    """The conversation as plain text: this route knows no roles."""
    prompt = "\n".join("<image>" * len(message.pictures) + message.text for message in ask.messages)
    images = [data_url(number) for message in ask.messages for number in message.pictures]
    return {"prompt": prompt, "images": images, **_limits(ask), "stream": stream}


def _limits(ask: Ask) -> dict[str, Any]:
    return {"max_tokens": ask.max_tokens, "temperature": 0.0, "ignore_eos": ask.to_the_limit}


def _message(message: Message) -> dict[str, Any]:
    if message.role != "user":
        return {"role": message.role, "content": message.text}
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": data_url(number)}} for number in message.pictures
    ]
    return {"role": "user", "content": [*parts, {"type": "text", "text": message.text}]}


def _read_stream(response: http.client.HTTPResponse, reply: Reply, start: float, leave_after: int | None) -> None:
    """Until `[DONE]`. A stream that ends otherwise, or holds an error, has failed."""
    last: float | None = None
    num_pieces = 0
    for data in _events(response):
        now = time.perf_counter()
        if data == "[DONE]":
            response.read()  # the end of the last chunk, so that the connection can be used again
            return
        chunk = json.loads(data)
        if "error" in chunk:
            reply.error = f"in the stream: {chunk['error'].get('code')}"
            return
        text, finished = _take(chunk, reply)
        if not text and not finished:
            continue  # the role, the usage: no token
        if last is None:
            reply.ttft_ms = (now - start) * 1e3
        elif text:
            reply.gaps_ms.append((now - last) * 1e3)
        last = now
        num_pieces += 1
        if leave_after is not None and num_pieces >= leave_after:
            reply.left = True
            return
    reply.error = "the stream ended without [DONE]"


def _events(response: http.client.HTTPResponse) -> Iterator[str]:
    while line := response.readline():
        if line.startswith(b"data:"):
            yield line[5:].strip().decode()


def _read_whole(body: dict[str, Any], reply: Reply) -> None:
    if "choices" in body:
        reply.text = body["choices"][0]["message"]["content"]
    else:
        reply.text = body["text"]
    reply.usage, reply.timings = body["usage"], body.get("timings", {})


def _take(chunk: dict[str, Any], reply: Reply) -> tuple[str, bool]:
    """(text of a chunk of either route, whether the answer is complete); usage and timings go to the reply."""
    reply.usage = chunk.get("usage") or reply.usage
    reply.timings = chunk.get("timings") or reply.timings
    if "choices" not in chunk:
        text, finished = chunk["text"], chunk.get("finish_reason") is not None
    elif chunk["choices"]:
        choice = chunk["choices"][0]
        text, finished = choice["delta"].get("content") or "", choice.get("finish_reason") is not None
    else:
        return "", False
    reply.text += text
    return text, finished


def _error_code(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["code"])
    except (ValueError, KeyError, TypeError):
        return "without an error body"

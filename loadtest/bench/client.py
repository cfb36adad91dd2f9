"""The users, in one process apart from what they ask: every question of a round at once, and what that cost.

python -m loadtest.bench.client
"""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import httpx

from loadtest.bench.scenario import Request
from loadtest.bench.worker import serve
from loadtest.pictures import data_url

TIMEOUT_S = 600.0


def body(request: Request, *, stream: bool) -> dict[str, Any]:
    """Of /v1/generate; every system takes it."""
    return {
        "prompt": list(request.input_ids),
        "images": [data_url(number) for number in request.pictures],
        "max_tokens": request.max_tokens,
        "ignore_eos": True,
        "return_token_ids": True,
        "stream": stream,
    }


class Users:
    """They keep their connections."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._client = httpx.AsyncClient(timeout=TIMEOUT_S, trust_env=False, limits=httpx.Limits(max_connections=None))

    def handle(self, message: dict[str, Any]) -> dict[str, Any]:
        """{url, requests, stream} -> {seconds, client_cpu_s, tokens}. Raises if a question is not answered."""
        stream = message.get("stream", False)
        requests = [Request.from_json(fields) for fields in message["requests"]]
        bodies = [json.dumps(body(request, stream=stream)).encode() for request in requests]
        ask = self._stream if stream else self._whole

        async def everybody() -> list[list[int]]:
            return await asyncio.gather(*(ask(message["url"], content) for content in bodies))

        cpu_s, begin_s = time.process_time(), time.perf_counter()
        tokens = self._loop.run_until_complete(everybody())
        seconds = time.perf_counter() - begin_s
        return {"seconds": seconds, "client_cpu_s": time.process_time() - cpu_s, "tokens": tokens}

    async def _whole(self, url: str, content: bytes) -> list[int]:
        response = await self._client.post(url, content=content, headers={"content-type": "application/json"})
        if response.status_code != 200:
            raise RuntimeError(f"{url} answered {response.status_code}: {response.text[:500]}")
        tokens: list[int] = response.json()["token_ids"]
        return tokens

    async def _stream(self, url: str, content: bytes) -> list[int]:
        """Reads as the bytes come, and looks into them at the end, so that reading costs the machine little."""
        received = bytearray()
        headers = {"content-type": "application/json"}
        async with self._client.stream("POST", url, content=content, headers=headers) as response:
            async for part in response.aiter_raw():
                received += part
        if response.status_code != 200 or not received.rstrip().endswith(b"[DONE]"):
            raise RuntimeError(f"{url} answered {response.status_code}: {bytes(received[-500:])!r}")
        events = (line[5:] for line in received.split(b"\n") if line.startswith(b"data:"))
        return [token for event in events if b"{" in event for token in json.loads(event)["token_ids"]]


if __name__ == "__main__":
    serve(lambda: Users().handle)

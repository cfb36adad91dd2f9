"""Server-sent events: their framing, and a response that ends its source when the client leaves."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.errors import CrossgateError, Internal

log = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # nginx would hold events back
}
_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))  # json.dumps would make one a call
Result = TypeVar("Result")


def frame(data: dict[str, Any]) -> bytes:
    return b"data: " + _ENCODER.encode(data).encode() + b"\n\n"


def error_frame(error: CrossgateError) -> bytes:
    return b"event: error\n" + frame(error.body())


class EventStream(Response):
    """Sends each list of chunks of `source` as events, then `[DONE]`.

    An error becomes an `error` event and the stream ends without `[DONE]`; `on_error` is told. When the client leaves,
    or takes nothing for `client_timeout_s`, the source is cancelled where it stands.
    """

    def __init__(
        self,
        source: AsyncGenerator[list[dict[str, Any]], None],
        *,
        client_timeout_s: float,
        on_error: Callable[[CrossgateError], None],
    ) -> None:
        super().__init__(headers=HEADERS)
        del self.headers["content-length"]
        self._source = source
        self._client_timeout_s = client_timeout_s
        self._on_error = on_error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await or_disconnected(receive, self._pump(send))
        except ClientDisconnect:
            return

    async def _pump(self, send: Send) -> None:
        async with aclosing(self._source) as source:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                async for chunks in source:
                    if chunks:
                        await self._send(send, b"".join(map(frame, chunks)))
                await self._send(send, DONE)
            except CrossgateError as error:
                self._on_error(error)
                await self._send(send, error_frame(error))
            except ClientDisconnect:
                raise
            except Exception:
                log.exception("a stream failed")
                failure = Internal("The server failed.")
                self._on_error(failure)
                await self._send(send, error_frame(failure))
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, body: bytes) -> None:
        try:
            async with asyncio.timeout(self._client_timeout_s):
                await send({"type": "http.response.body", "body": body, "more_body": True})
        except TimeoutError as error:
            raise ClientDisconnect from error


async def or_disconnected(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is cancelled when the client leaves: then raises ClientDisconnect.

    The request's body must have been read.
    """
    working = asyncio.create_task(work)
    watching = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass

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

from service.errors import CrossgateError, Internal, Unavailable

log = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
ENDING = "The server is shutting down."
END = {"type": "http.response.body", "body": b"", "more_body": False}
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
    """Sends each list of chunks of `source` as events, then `[DONE]`; a comment after each silence of a ping interval.

    The headers go out with the first of these. An error before them is raised, and so has its HTTP status; one after
    them becomes an `error` event, `on_error` is told, and the stream ends without `[DONE]`. When the client leaves,
    the source is cancelled where it stands and ClientDisconnect is raised; when the server ends, that is an error, too.
    `on_end` is called however it ends.
    """

    def __init__(
        self,
        source: AsyncGenerator[list[dict[str, Any]], None],
        *,
        ping_interval_s: float,
        on_error: Callable[[CrossgateError], None],
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(headers=HEADERS)
        del self.headers["content-length"]
        self._source = source
        self._ping_interval_s = ping_interval_s
        self._on_error = on_error
        self._on_end = on_end
        self._writing = asyncio.Lock()
        self._begun = False
        self._last_s = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._last_s = asyncio.get_running_loop().time()
        try:
            await or_disconnected(receive, self._pump(send), self._ping(send))
        except asyncio.CancelledError:
            if self._begun:
                await self._fail(send, Unavailable(ENDING, retry_after_s=1))
            raise
        finally:
            self._on_end()

    async def _pump(self, send: Send) -> None:
        async with aclosing(self._source) as source:
            try:
                async for chunks in source:
                    if chunks:
                        await self._write(send, b"".join(map(frame, chunks)))
                await self._write(send, DONE)
            except ClientDisconnect:
                raise
            except Exception as error:
                if not self._begun:
                    raise
                await self._fail(send, error)
                return
        await send(END)

    async def _ping(self, send: Send) -> None:
        """Balancers and clients cut off what is silent for long."""
        while True:
            silent_s = asyncio.get_running_loop().time() - self._last_s
            if silent_s >= self._ping_interval_s:
                await self._write(send, PING)
            else:
                await asyncio.sleep(self._ping_interval_s - silent_s)

    async def _write(self, send: Send, body: bytes) -> None:
        async with self._writing:  # a ping must come neither before the headers nor amid an event
            self._last_s = asyncio.get_running_loop().time()
            if not self._begun:
                self._begun = True
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": body, "more_body": True})

    async def _fail(self, send: Send, error: Exception) -> None:
        if not isinstance(error, CrossgateError):
            log.error("a stream failed", exc_info=error)
            error = Internal("The server failed.")
        self._on_error(error)
        await self._write(send, error_frame(error))
        await send(END)


async def or_disconnected(
    receive: Receive, work: Coroutine[Any, Any, Result], beside: Coroutine[Any, Any, None] | None = None
) -> Result:
    """The result of `work`, which is cancelled when the client leaves: then raises ClientDisconnect.

    What `beside` raises ends it, too. The request's body must have been read.
    """
    working = asyncio.create_task(work)
    others = [asyncio.create_task(_disconnected(receive))]
    if beside is not None:
        others.append(asyncio.create_task(beside))
    try:
        done, _ = await asyncio.wait((working, *others), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            for task in done:
                task.result()
        return await working
    finally:
        for task in (working, *others):
            task.cancel()
        await asyncio.gather(working, *others, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    raise ClientDisconnect

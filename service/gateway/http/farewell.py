"""How a connection ends with a reply: when the server drains, and when the reply comes before the body has ended.

A connection that is closed on unread bytes is reset, and the client loses the reply. So what still comes is read for a
moment, and forgotten, before the connection ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LINGER_S = 2.0


class Farewell:
    def __init__(self, app: ASGIApp, *, draining: Callable[[], bool]) -> None:
        self._app = app
        self._draining = draining

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        coming = "transfer-encoding" in headers or headers.get("content-length", "0") != "0"
        invited = "expect" not in headers  # who expects 100-continue sends nothing before somebody receives
        last: Message | None = None

        async def watched() -> Message:
            nonlocal coming, invited
            invited = True
            message = await receive()
            if not message.get("more_body", False):
                coming = False
            return message

        async def read_on(seconds: float) -> None:
            try:
                async with asyncio.timeout(seconds):
                    while coming:
                        await watched()
            except TimeoutError:
                pass

        async def closing(message: Message) -> None:
            nonlocal last
            if message["type"] == "http.response.start":
                if invited:
                    await read_on(0.0)  # what came already
                if coming or self._draining():
                    MutableHeaders(scope=message)["connection"] = "close"
            if coming and invited and message["type"] == "http.response.body" and not message.get("more_body", False):
                last = {**message, "body": b""}
                message = {**message, "more_body": True}
            await send(message)

        await self._app(scope, watched, closing)
        if last is not None:
            await read_on(LINGER_S)
            await send(last)

"""A client's connection: uvicorn's own, with bounds on everything but bodies and replies.

httptools bounds nothing, and uvicorn's only timer starts after a reply. Here the head of a request is bounded in bytes,
lines and time, and so is what frames a body; connections are bounded in number, and who takes no reply loses his. h11
bounds the bytes of a head, but none of the rest; a stream costs the same with either.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from service.errors import CrossgateError, HeadTooLarge, InvalidRequest, RequestTimeout, Unavailable

MAX_HEADERS = 100
MAX_PIPELINED = 4  # requests that came before the reply to the one under way
SLICE_BYTES = 64 << 10  # fed to the parser at a time, between two looks at what it made of them
UPGRADE = re.compile(rb"\nupgrade(?=:)", re.IGNORECASE)
STOOD_STILL_S = (
    1.0  # a timer that fires so late: it was this process that stood still, and what came then is not read yet
)
FRAMING_PART = 8  # chunks of some 40 bytes and more frame a body in less than this part of it


@dataclass(frozen=True)
class ConnectionLimits:
    max_connections: int  # of each listener
    max_header_bytes: int
    header_timeout_s: float
    write_timeout_s: float


class Listener:
    """The connections of one port. `waiting`: those between requests, the longest waiting first."""

    def __init__(self) -> None:
        self.connections: set[Connection] = set()
        self.waiting: dict[Connection, None] = {}


class Connection(HttpToolsProtocol):
    """Made by uvicorn for each connection."""

    def __init__(
        self, *args: Any, limits: ConnectionLimits, listeners: defaultdict[int | None, Listener], **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._limits = limits
        self._listeners = listeners
        self._listener: Listener | None = None  # None once it is not counted any more
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._in_head = True
        self._has_begun = False  # the head, or what follows it
        self._framing_bytes = 0  # of this request: its head, then what frames its body
        self._body_bytes = 0
        self._refusal: CrossgateError | None = None
        self._running: RequestResponseCycle | None = None

    # what the transport calls

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        listener = self._listeners[self.server[1] if self.server else None]
        if len(listener.connections) >= self._limits.max_connections:
            if not listener.waiting:
                self._refuse(Unavailable("Too many connections are open.", retry_after_s=1))
                return
            next(iter(listener.waiting)).drop()  # it asked for nothing, or is still asking after all others
        self._listener = listener
        listener.connections.add(self)
        self._wait()
        self._mind_head()

    def data_received(self, data: bytes) -> None:
        start = 0
        if not self._has_begun:
            data = _without_upgrade(data)
        while start < len(data) and not self.transport.is_closing():
            size = SLICE_BYTES
            if self._in_head:
                size = min(size, self._limits.max_header_bytes + 1 - self._framing_bytes)
            piece = data[start : start + size]
            start += len(piece)
            self._framing_bytes += len(piece)
            super().data_received(piece)
            self._framing_bytes = max(0, self._framing_bytes)
            if self._framing_bytes > self._limits.max_header_bytes + self._body_bytes // FRAMING_PART:
                self._refuse(self._too_large() if self._in_head else InvalidRequest("The body's chunks are too small."))
        self._mind_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._leave()
        for timer in (self._head_timer, self._write_timer):
            if timer is not None:
                timer.cancel()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True  # uvicorn tells the last request alone, which may wait behind this one
            self._running.message_event.set()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._mind_write()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None and not self.transport.is_closing():
            self._write_timer.cancel()
            self._write_timer = None

    # what the parser calls

    def on_message_begin(self) -> None:
        self._has_begun = True
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_head:
            return  # a trailer would join the headers of a request that others read already
        if len(self.headers) >= MAX_HEADERS:
            self._refusal = self._too_large()
            raise self._refusal
        super().on_header(name, value.rstrip(b" \t"))  # which is no part of it, and which httptools leaves

    def on_headers_complete(self) -> None:
        if len(self.pipeline) >= MAX_PIPELINED:
            self._refusal = InvalidRequest("Too many requests wait in one connection.")
            raise self._refusal
        if self.parser.should_upgrade():  # the parser would take no body, and what follows for another request
            self._refusal = InvalidRequest("No other protocol is spoken here: send the request without Upgrade.")
            raise self._refusal
        self._in_head = False
        self._framing_bytes = self._body_bytes = 0
        if self._listener is not None:
            self._listener.waiting.pop(self, None)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._framing_bytes -= len(body)
        self._body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_head = True
        self._has_begun = False
        self._framing_bytes = self._body_bytes = 0
        super().on_message_complete()

    # what uvicorn calls

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._mind_write()
        elif self._is_idle():
            self._wait()

    def send_400_response(self, msg: str) -> None:
        self._refuse(self._refusal or InvalidRequest("This is no HTTP/1.1 request."))

    def timeout_keep_alive_handler(self) -> None:
        if self._stood_still(self.timeout_keep_alive_task):
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )
        else:
            self.drop()

    # ours

    def drop(self) -> None:
        """End it at once, whatever still waits to be sent."""
        self._leave()
        self.transport.abort()

    def _leave(self) -> None:
        if self._listener is not None:
            self._listener.connections.discard(self)
            self._listener.waiting.pop(self, None)
            self._listener = None

    def _wait(self) -> None:
        if self._listener is not None:
            self._listener.waiting[self] = None

    def _is_idle(self) -> bool:
        return self.cycle is None or (self.cycle.response_complete and not self.pipeline)

    def _mind_head(self) -> None:
        """A connection without a request has a timer: this one, or keep-alive's until the next byte comes."""
        if self._is_idle() and not self.transport.is_closing():
            if self._head_timer is None and self.timeout_keep_alive_task is None:
                self._head_timer = self.loop.call_later(self._limits.header_timeout_s, self._head_is_late)
        elif self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        if self._stood_still(self._head_timer):
            self._head_timer = None
            self._mind_head()
        elif self._framing_bytes:
            self._refuse(RequestTimeout("The head of the request did not come in time."))
        else:
            self.drop()

    def _mind_write(self) -> None:
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(self._limits.write_timeout_s, self._write_is_late)

    def _write_is_late(self) -> None:
        if self._stood_still(self._write_timer):
            self._write_timer = None
            self._mind_write()
        else:
            self.drop()

    def _stood_still(self, timer: asyncio.TimerHandle | None) -> bool:
        return timer is not None and self.loop.time() - timer.when() > STOOD_STILL_S

    def _refuse(self, error: CrossgateError) -> None:
        """Say why, unless a reply is under way, and close."""
        if self.transport.is_closing():
            return
        if self._is_idle() or not (self.cycle.response_started or self.pipeline):
            body = json.dumps(error.body()).encode()
            retry_after = b"" if error.retry_after_s is None else b"retry-after: %d\r\n" % error.retry_after_s
            self.transport.write(
                STATUS_LINE[error.status]
                + b"content-type: application/json\r\ncontent-length: %d\r\n" % len(body)
                + retry_after
                + b"connection: close\r\n\r\n"
                + body
            )
        self._leave()
        self.transport.close()
        self._mind_write()

    def _too_large(self) -> HeadTooLarge:
        limit = self._limits.max_header_bytes
        return HeadTooLarge(f"The head of a request takes at most {limit} bytes and {MAX_HEADERS} headers.")


def _without_upgrade(head: bytes) -> bytes:
    """Bytes that begin with a head, which asks for no other protocol any more.

    Java's client and others ask for HTTP/2 with each first request, also with one that has a body. That is to be
    answered as if it had not asked; httptools cannot be told so, and would drop the body.
    """
    end = head.find(b"\r\n\r\n")
    if end < 0 or UPGRADE.search(head, 0, end) is None:
        return head
    return UPGRADE.sub(b"\nx-asked", head[:end]) + head[end:]

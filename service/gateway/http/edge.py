"""The outermost layer, around every request: its id, its log line, the limit of its body, and the last catch-all."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import Internal, InvalidRequest, TooLarge
from service.gateway.telemetry.logs import request_id
from service.gateway.telemetry.metrics import Metrics
from service.gateway.telemetry.record import Record
from service.gateway.telemetry.tracing import Tracing

log = logging.getLogger(__name__)

REQUEST_ID_HEADER = "x-request-id"
SAFE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
QUIET_PATHS = frozenset({"/livez", "/readyz", "/metrics"})
CLIENT_LEFT = 499  # never sent; nginx's number, for logs and metrics


class Edge:
    def __init__(
        self, app: ASGIApp, *, metrics: Metrics, tracing: Tracing, max_body_bytes: int, client_timeout_s: float
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._tracing = tracing
        self._max_body_bytes = max_body_bytes
        self._client_timeout_s = client_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif scope["path"] in QUIET_PATHS:
            await self._handle(scope, receive, send)
        else:
            with self._tracing.request(scope["method"], Headers(scope=scope)) as span:
                status = await self._handle(scope, receive, send)
                span.update_name(f"{scope['method']} {_route(scope)}")
                span.set_attribute("http.response.status_code", status)

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> int:
        """Returns the status that was sent."""
        given = Headers(scope=scope).get(REQUEST_ID_HEADER, "")
        current = given if SAFE_ID.fullmatch(given) else uuid.uuid4().hex
        token = request_id.set(current)
        record = Record(current)
        scope.setdefault("state", {})["record"] = record
        status = CLIENT_LEFT
        complete = False
        start = time.perf_counter()

        async def send_with_id(message: Message) -> None:
            nonlocal status, complete
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = current
            try:
                async with asyncio.timeout(self._client_timeout_s):
                    await send(message)
            except TimeoutError as error:  # a client that takes nothing
                raise ClientDisconnect from error
            complete = message["type"] == "http.response.body" and not message.get("more_body", False)

        try:
            await self._app(scope, self._limited(receive), send_with_id)
        except ClientDisconnect:
            pass
        except Exception:
            log.exception("a request failed")
            record.error = Internal("The server failed.")
            self._metrics.failure.labels(record.error.code).inc()
            if status == CLIENT_LEFT:
                await JSONResponse(record.error.body(), record.error.status)(scope, receive, send_with_id)
        finally:
            record.left = not complete
            self._tell(scope, status, time.perf_counter() - start, record)
            request_id.reset(token)
        return status

    def _limited(self, receive: Receive) -> Receive:
        """`receive` that counts the bytes which really come and, until the body has ended, waits only so long."""
        num_bytes = 0
        ended = False

        async def limited() -> Message:
            nonlocal num_bytes, ended
            if ended:
                return await receive()
            try:
                async with asyncio.timeout(self._client_timeout_s):
                    message = await receive()
            except TimeoutError as error:
                raise InvalidRequest("The body did not come in time.") from error
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_body_bytes:
                raise TooLarge(f"A body takes at most {self._max_body_bytes} bytes.")
            ended = not message.get("more_body", False)
            return message

        return limited

    def _tell(self, scope: Scope, status: int, seconds: float, record: Record) -> None:
        self._metrics.http_requests.labels(_route(scope), status).inc()
        path = scope["path"]
        fields = {"method": scope["method"], "path": path[:200], "status": status, "ms": round(seconds * 1e3, 1)}
        level = logging.DEBUG if path in QUIET_PATHS else logging.INFO
        log.log(level, "request", extra={"fields": fields | record.fields()})


def _route(scope: Scope) -> str:
    """Of the path only what we have named ourselves: anybody can invent paths."""
    return str(getattr(scope.get("route"), "path", "other"))

"""The outermost layer, around every request: its id, its log line, and the last catch-all."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import CrossgateError, Internal, Unavailable
from service.gateway.http.ops import OPS_PATHS
from service.gateway.http.sse import ENDING
from service.gateway.telemetry.logs import request_id
from service.gateway.telemetry.metrics import Metrics
from service.gateway.telemetry.record import Record
from service.gateway.telemetry.tracing import Tracing

log = logging.getLogger(__name__)

REQUEST_ID_HEADER = "x-request-id"
SAFE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
CLIENT_LEFT = 499  # never sent; nginx's number, for logs and metrics


class Edge:
    """`draining`: whether the server is about to end."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics, tracing: Tracing, draining: Callable[[], bool]) -> None:
        self._app = app
        self._draining = draining
        self._metrics = metrics
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif scope["path"] in OPS_PATHS:
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
            await send(message)
            complete = message["type"] == "http.response.body" and not message.get("more_body", False)

        async def fail(error: CrossgateError) -> None:
            if record.error is None:
                record.error = error
                self._metrics.failure.labels(error.code).inc()
            if status == CLIENT_LEFT:
                headers = {} if error.retry_after_s is None else {"retry-after": str(error.retry_after_s)}
                await JSONResponse(error.body(), error.status, headers)(scope, receive, send_with_id)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientDisconnect:
            pass
        except asyncio.CancelledError:
            if not self._draining():
                raise
            await fail(Unavailable(ENDING, retry_after_s=1))
        except Exception:
            log.exception("a request failed")
            await fail(Internal("The server failed."))
        finally:
            record.left = not complete
            self._tell(scope, status, time.perf_counter() - start, record)
            request_id.reset(token)
        return status

    def _tell(self, scope: Scope, status: int, seconds: float, record: Record) -> None:
        self._metrics.http_requests.labels(_route(scope), status).inc()
        path = scope["path"]
        fields = {"method": scope["method"], "path": path[:200], "status": status, "ms": round(seconds * 1e3, 1)}
        level = logging.DEBUG if path in OPS_PATHS else logging.INFO
        log.log(level, "request", extra={"fields": fields | record.fields()})


def _route(scope: Scope) -> str:
    """Of the path only what we have named ourselves: anybody can invent paths."""
    return str(getattr(scope.get("route"), "path", "other"))

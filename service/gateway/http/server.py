"""Serves the app until a signal, then drains: /readyz says 503, running requests finish, the process ends with 0."""

from __future__ import annotations

import logging
import resource
import signal
import socket
import time
from collections import defaultdict
from functools import partial
from types import FrameType

import uvicorn
from fastapi import FastAPI

from service.errors import InvalidRequest
from service.gateway.admission import Admission
from service.gateway.http.connections import Connection, ConnectionLimits, Listener
from service.gateway.http.sockets import drop_stalled
from service.gateway.settings import Settings

log = logging.getLogger(__name__)

BACKLOG = 1024
OTHER_FILES = 256  # that are open beside connections


def serve(app: FastAPI, settings: Settings, listeners: list[socket.socket]) -> None:
    """Returns when the server has ended. Raises InvalidRequest if the process may not open as many files as it must."""
    allow_open_files(settings.max_connections * len(listeners) + OTHER_FILES)
    for listener in listeners:
        host, port = listener.getsockname()[:2]
        log.info("listening on http://%s:%d", host, port)
    make_server(app, settings).run(sockets=listeners)


def make_server(app: FastAPI, settings: Settings) -> DrainingServer:
    limits = ConnectionLimits(
        max_connections=settings.max_connections,
        max_header_bytes=settings.max_header_bytes,
        header_timeout_s=settings.header_timeout_s,
        write_timeout_s=settings.client_timeout_s,
    )
    config = uvicorn.Config(
        app,
        http=partial(Connection, limits=limits, listeners=defaultdict(Listener)),  # type: ignore[arg-type]
        ws="none",
        log_config=None,
        access_log=False,
        timeout_keep_alive=settings.keep_alive_s,  # type: ignore[arg-type]  # a fraction of a second will do
    )
    return DrainingServer(config, app.state.admission, settings.drain_timeout_s)


def listen(host: str, port: int, client_timeout_s: float = 60.0) -> socket.socket:
    """Raises InvalidRequest, in one line for an operator, if the port is taken or the host is not ours.

    A client that takes nothing for `client_timeout_s` loses its connection.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise InvalidRequest(f"Cannot listen on {host}:{port}: {error.strerror}.", param="PORT") from error
    drop_stalled(listener, client_timeout_s)
    return listener


def allow_open_files(count: int) -> None:
    """Raise the soft limit where it is lower: without a free one no connection is accepted. Raises InvalidRequest."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < count:
        raise InvalidRequest(
            f"CROSSGATE_MAX_CONNECTIONS needs {count} open files, and this process may have {hard}.",
            param="CROSSGATE_MAX_CONNECTIONS",
        )
    if soft != resource.RLIM_INFINITY and soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


class DrainingServer(uvicorn.Server):
    """uvicorn closes its listener at once on a signal; this one first keeps answering until running requests are done.

    A second signal, or the end of the drain timeout, cuts off who still runs.
    """

    def __init__(self, config: uvicorn.Config, admission: Admission, drain_timeout_s: float) -> None:
        super().__init__(config)
        self._admission = admission
        self._drain_timeout_s = drain_timeout_s
        self._drain_until: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._drain_until is None:
            log.info("%s: draining", signal.Signals(sig).name)
            self._admission.drain()
            self._drain_until = time.monotonic() + self._drain_timeout_s
        else:
            self._drain_until = 0.0

    async def on_tick(self, counter: int) -> bool:
        if self._drain_until is not None:
            idle = not self._admission.num_running and not self._admission.num_waiting
            if idle or time.monotonic() >= self._drain_until:
                self.config.timeout_graceful_shutdown = 1  # for last bytes; who still runs is cancelled after it
                return True
        return await super().on_tick(counter)

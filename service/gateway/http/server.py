"""Serves the app until a signal, then drains: /readyz says 503, running requests finish, the process ends with 0."""

from __future__ import annotations

import logging
import signal
import socket
import time
from types import FrameType

import uvicorn
from fastapi import FastAPI

from service.errors import InvalidRequest
from service.gateway.admission import Admission
from service.gateway.http.sockets import drop_stalled

log = logging.getLogger(__name__)

BACKLOG = 1024
KEEP_ALIVE_S = 30


def serve(app: FastAPI, listener: socket.socket, drain_timeout_s: float) -> None:
    """Returns when the server has ended."""
    config = uvicorn.Config(app, log_config=None, access_log=False, timeout_keep_alive=KEEP_ALIVE_S)
    host, port = listener.getsockname()[:2]
    log.info("listening on http://%s:%d", host, port)
    DrainingServer(config, app.state.admission, drain_timeout_s).run(sockets=[listener])


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

"""Where the routes for machines are: at a port of their own and nowhere else, or beside the model's."""

from __future__ import annotations

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from service.errors import NotFound

OPS_PATHS = frozenset({"/livez", "/readyz", "/metrics"})


class OpsPort:
    """`port` None: every route at every port. Below `Edge`, whose record learns of what is refused here."""

    def __init__(self, app: ASGIApp, *, port: int | None) -> None:
        self._app = app
        self._port = port

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._port is not None:
            _, local_port = scope["server"]
            if (scope["path"] in OPS_PATHS) != (local_port == self._port):
                error = NotFound(f"There is no {scope['path'][:200]} here.")
                scope["state"]["record"].error = error
                await JSONResponse(error.body(), error.status)(scope, receive, send)
                return
        await self._app(scope, receive, send)

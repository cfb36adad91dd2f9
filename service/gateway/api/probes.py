"""Routes for machines: is the loop alive, may requests come, and the metrics. Open without a key."""

from __future__ import annotations

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import JSONResponse, Response

from service.errors import Unavailable
from service.gateway.admission import Admission
from service.gateway.stages.heartbeat import Heartbeat
from service.gateway.telemetry.metrics import Metrics

CLOSE = {"connection": "close"}  # a probe's idle connection would hold up a shutdown


def probe_routes(admission: Admission, heartbeat: Heartbeat, metrics: Metrics) -> APIRouter:
    router = APIRouter()

    @router.get("/livez")
    async def livez() -> Response:
        return JSONResponse({"status": "alive"}, headers=CLOSE)

    @router.get("/readyz")
    async def readyz() -> Response:
        """Ready: not draining, and both models answered the last heartbeat, or somebody since."""
        if admission.draining:
            error = Unavailable("The server is shutting down.")
        elif not await heartbeat.ready():
            error = Unavailable("A model does not answer.")
        else:
            return JSONResponse({"status": "ready"}, headers=CLOSE)
        return JSONResponse(error.body(), error.status, headers=CLOSE)

    @router.get("/metrics")
    async def scrape() -> Response:
        return Response(generate_latest(metrics.registry), headers={"content-type": CONTENT_TYPE_LATEST})

    return router

"""Puts the gateway together: one FastAPI app from settings, a family, a tokenizer and a backend."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncGenerator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from prometheus_client import CollectorRegistry
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from tokenizers import Tokenizer

from service.errors import CrossgateError, InvalidRequest, NotFound, Unauthorized
from service.families import Family
from service.families.family import read_json
from service.gateway.admission import Admission
from service.gateway.http.docs import install_docs
from service.gateway.http.edge import Edge
from service.gateway.http.probes import probe_routes
from service.gateway.http.routes import model_routes
from service.gateway.http.validation import invalid_request
from service.gateway.pictures.encode import PictureEncoder
from service.gateway.pictures.read import PictureLimits, PictureReader
from service.gateway.pictures.residency import ResidentKeys
from service.gateway.pipeline import Pipeline
from service.gateway.question import SamplingDefaults
from service.gateway.settings import Settings
from service.gateway.stages.run import Deadlines, Stages
from service.gateway.stages.triton import Backend
from service.gateway.telemetry.metrics import Metrics
from service.gateway.telemetry.tracing import Tracing
from service.gateway.text.detokenize import Vocabulary
from service.gateway.text.prompt import PromptBuilder


def create_app(
    settings: Settings, family: Family, tokenizer: Tokenizer, backend: Backend, tracing: Tracing | None = None
) -> FastAPI:
    """The app closes `backend` when it ends. `app.state.admission` is there for whoever drains it.

    Raises InvalidRequest, for an operator, if the checkpoint's template or the key file is no good.
    """
    tracing = tracing or Tracing()
    metrics = Metrics(CollectorRegistry())
    admission = Admission(
        max_running=settings.max_concurrent_requests,
        max_waiting=settings.max_queue,
        max_wait_s=settings.first_token_timeout_s,
        on_end=lambda outcome: metrics.ended.labels(outcome).inc(),
    )
    metrics.watch(admission)
    threads = ThreadPoolExecutor(max_workers=os.cpu_count() or 1, thread_name_prefix="gateway")
    limits = PictureLimits(settings.max_images, settings.max_image_bytes, settings.max_image_pixels)
    encoder = PictureEncoder(
        backend.encode,
        timeout_s=settings.encode_timeout_s,
        cache_bytes=settings.latents_cache_bytes,
        on_encoded=metrics.encode.observe,
    )
    deadlines = Deadlines(settings.first_token_timeout_s, settings.inter_token_timeout_s, settings.request_timeout_s)
    pipeline = Pipeline(
        admission,
        PictureReader(family, limits, threads),
        PromptBuilder(family, tokenizer, threads, settings.default_max_tokens),
        Stages(backend, encoder, ResidentKeys(settings.max_resident_keys), deadlines),
        Vocabulary(tokenizer),
        metrics,
        tracing,
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None, None]:
        yield
        await backend.close()
        threads.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(title="Crossgate", lifespan=lifespan, redirect_slashes=False)  # what is not here is not here
    app.state.admission = admission
    app.include_router(model_routes(settings, pipeline, metrics, chat_defaults(family.folder), int(time.time())))
    app.include_router(probe_routes(admission, backend, metrics))
    app.add_middleware(
        Edge,
        metrics=metrics,
        tracing=tracing,
        max_body_bytes=settings.max_body_bytes,
        client_timeout_s=settings.client_timeout_s,
    )
    install_docs(app)
    install_errors(app, metrics)
    return app


def install_errors(app: FastAPI, metrics: Metrics) -> None:
    """One translation to HTTP for every error; what is not ours ends at the edge."""

    def respond(error: CrossgateError, status: int | None = None, headers: Mapping[str, str] | None = None) -> Response:
        metrics.failure.labels(error.code).inc()
        headers = dict(headers or {})
        if error.retry_after_s is not None:
            headers["retry-after"] = str(error.retry_after_s)
        if isinstance(error, Unauthorized):
            headers["www-authenticate"] = "Bearer"
        return JSONResponse(error.body(), status or error.status, headers)

    @app.exception_handler(CrossgateError)
    async def ours(request: Request, error: CrossgateError) -> Response:
        return respond(error)

    @app.exception_handler(RequestValidationError)
    async def fastapis(request: Request, error: RequestValidationError) -> Response:
        return respond(invalid_request(error.errors(), error.body))

    @app.exception_handler(HTTPException)
    async def starlettes(request: Request, error: HTTPException) -> Response:
        if error.status_code == 404:
            return respond(NotFound(f"There is no {request.url.path[:200]} here."))
        refused = InvalidRequest(f"{request.method} is not possible here.")
        return respond(refused, error.status_code, error.headers)


def chat_defaults(folder: Path) -> SamplingDefaults:
    """OpenAI's (temperature 1), unless the checkpoint's generation_config.json says how it wants to be sampled."""
    config = read_json(folder / "generation_config.json")
    if "do_sample" not in config:
        return SamplingDefaults(temperature=1.0)
    if not config["do_sample"]:
        return SamplingDefaults(temperature=0.0)
    return SamplingDefaults(
        temperature=config.get("temperature") or 1.0,
        top_p=config.get("top_p") or 1.0,
        top_k=config.get("top_k") or None,
    )

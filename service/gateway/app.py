"""Puts the gateway together: one FastAPI app from settings, a family, a tokenizer and a backend."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
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

from service.cores import num_cores
from service.errors import CrossgateError, InvalidRequest, NotFound, Unauthorized
from service.families import Family
from service.families.card import ModelCard
from service.families.family import read_json
from service.gateway.admission import Admission
from service.gateway.api.docs import install_docs
from service.gateway.api.keys import KeyRing
from service.gateway.api.probes import probe_routes
from service.gateway.api.questions import QuestionReader
from service.gateway.api.routes import model_routes
from service.gateway.api.validation import invalid_request
from service.gateway.http.bodies import BodyBudget
from service.gateway.http.edge import Edge
from service.gateway.http.farewell import Farewell
from service.gateway.http.ops import OpsPort
from service.gateway.pictures.decode import PictureLimits
from service.gateway.pictures.encode import PictureEncoder
from service.gateway.pictures.read import PictureReader
from service.gateway.pictures.residency import ResidentKeys
from service.gateway.pipeline import Pipeline
from service.gateway.question import SamplingDefaults
from service.gateway.settings import Settings
from service.gateway.stages.heartbeat import Heartbeat
from service.gateway.stages.run import Deadlines, Stages
from service.gateway.stages.triton import Backend
from service.gateway.telemetry.metrics import Metrics
from service.gateway.telemetry.tracing import Tracing
from service.gateway.text.detokenize import Vocabulary
from service.gateway.text.prompt import PromptBuilder

log = logging.getLogger(__name__)

NICENESS = 5  # of threads that tokenize
MAX_DECODING_CORES = 4  # each worker process takes some 35 MB, used or not


def create_app(
    settings: Settings, family: Family, tokenizer: Tokenizer, backend: Backend, tracing: Tracing | None = None
) -> FastAPI:
    """The app closes `backend` when it ends. `app.state.admission` is there for whoever drains it.

    Raises InvalidRequest, for an operator, if the checkpoint's template or the key file is no good.
    """
    tracing = tracing or Tracing()
    metrics = Metrics(CollectorRegistry(), with_keys=settings.has_keys)
    admission = Admission(
        max_running=settings.max_concurrent_requests,
        max_shared=settings.max_shared_requests,
        max_waiting=settings.max_queue,
        max_wait_s=settings.first_token_timeout_s,
        on_end=metrics.count_end,
    )
    metrics.watch(admission)
    keys = _keys(settings, admission, metrics)
    threads = ThreadPoolExecutor(max_workers=num_cores(), thread_name_prefix="text", initializer=_give_way)
    pictures = PictureReader(
        family,
        PictureLimits(
            settings.max_images, settings.max_image_bytes, settings.max_image_pixels, settings.picture_memory_bytes
        ),
        num_workers=settings.picture_workers or min(num_cores(), MAX_DECODING_CORES) + 1,
        timeout_s=settings.picture_timeout_s,
        max_wait_s=settings.first_token_timeout_s,
    )
    encoder = PictureEncoder(
        backend.encode,
        max_calls=settings.max_concurrent_encodes,
        timeout_s=settings.encode_timeout_s,
        cache_bytes=settings.latents_cache_bytes,
        on_encoded=metrics.encode.observe,
    )
    deadlines = Deadlines(settings.first_token_timeout_s, settings.inter_token_timeout_s, settings.restart_wait_s)
    heartbeat = Heartbeat(
        backend.ready, backend.heard, period_s=settings.heartbeat_period_s, timeout_s=settings.heartbeat_timeout_s
    )
    pipeline = Pipeline(
        admission,
        pictures,
        PromptBuilder(family, tokenizer, threads, settings.default_max_tokens),
        Stages(backend, encoder, ResidentKeys(settings.max_resident_keys), deadlines),
        Vocabulary(tokenizer),
        metrics,
        tracing,
        settings.request_timeout_s,
    )

    bodies = BodyBudget(
        max_bytes=settings.max_inflight_body_bytes,
        max_body_bytes=settings.max_body_bytes,
        timeout_s=settings.body_timeout_s,
    )
    parser = ThreadPoolExecutor(max_workers=1, thread_name_prefix="bodies")
    questions = QuestionReader(
        served_name=settings.served_name,
        max_images=settings.max_images,
        max_image_bytes=settings.max_image_bytes,
        max_json_bytes=settings.max_json_bytes,
        max_prompt_tokens=family.decoder.max_positions,
        chat_defaults=chat_defaults(family.folder),
        bodies=bodies,
        threads=parser,
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None, None]:
        pictures.workers.start()
        beating = asyncio.create_task(heartbeat.run())
        yield
        beating.cancel()
        await asyncio.gather(beating, return_exceptions=True)
        await pictures.workers.close()
        await backend.close()
        threads.shutdown(wait=False, cancel_futures=True)
        parser.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(title="Crossgate", lifespan=lifespan, redirect_slashes=False)  # what is not here is not here
    app.state.admission = admission
    app.state.bodies = bodies
    card = ModelCard.of(family, settings.dtype_of_stages)
    log.info("%s", card.line())
    app.include_router(model_routes(settings, keys, questions, pipeline, metrics, card, int(time.time())))
    app.include_router(probe_routes(admission, heartbeat, metrics))
    app.add_middleware(OpsPort, port=settings.ops_port)  # the last one is the outermost
    app.add_middleware(Edge, metrics=metrics, tracing=tracing, draining=lambda: admission.draining)
    app.add_middleware(Farewell, draining=lambda: admission.draining)
    install_docs(app)
    install_errors(app, metrics)
    return app


def _give_way() -> None:
    """A long text must not take the cores from the decoder, which may be on the same: for the thread that calls."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)


def install_errors(app: FastAPI, metrics: Metrics) -> None:
    """One translation to HTTP for every error; what is not ours ends at the edge."""

    def respond(
        request: Request, error: CrossgateError, status: int | None = None, headers: Mapping[str, str] | None = None
    ) -> Response:
        request.state.record.error = error
        metrics.failure.labels(error.code).inc()
        headers = dict(headers or {})
        if error.retry_after_s is not None:
            headers["retry-after"] = str(error.retry_after_s)
        if isinstance(error, Unauthorized):
            headers["www-authenticate"] = "Bearer"
        return JSONResponse(error.body(), status or error.status, headers)

    @app.exception_handler(CrossgateError)
    async def ours(request: Request, error: CrossgateError) -> Response:
        return respond(request, error)

    @app.exception_handler(RequestValidationError)
    async def fastapis(request: Request, error: RequestValidationError) -> Response:
        return respond(request, invalid_request(error.errors(), error.body))

    @app.exception_handler(HTTPException)
    async def starlettes(request: Request, error: HTTPException) -> Response:
        if error.status_code == 404:
            return respond(request, NotFound(f"There is no {request.url.path[:200]} here."))
        refused = InvalidRequest(f"{request.method} is not possible here.")
        return respond(request, refused, error.status_code, error.headers)


def _keys(settings: Settings, admission: Admission, metrics: Metrics) -> KeyRing | None:
    if not settings.has_keys:
        return None

    def changed(ring: KeyRing) -> None:
        shared = len(ring.names) > 1
        admission.share(shared)
        metrics.know(ring.names)
        if shared:
            places = min(settings.max_concurrent_requests, settings.max_shared_requests)
            log.info("%d keys share %d places: CROSSGATE_MAX_SHARED_REQUESTS", len(ring.names), places)

    ring = KeyRing(settings.api_keys.get_secret_value(), settings.api_keys_file, changed)
    changed(ring)
    return ring


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

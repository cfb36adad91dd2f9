"""The model's routes: from a body to a Question, through the pipeline, to a body or a stream."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from service.errors import CrossgateError
from service.families.card import ModelCard
from service.gateway.api.auth import key_check
from service.gateway.api.docs import CHAT_DOCS, GENERATE_DOCS
from service.gateway.api.keys import KeyRing
from service.gateway.api.questions import QuestionReader, check_model
from service.gateway.api.replies import ChatReply, GenerateReply, Reply
from service.gateway.http.sse import EventStream, or_disconnected
from service.gateway.pipeline import Piece, Pipeline
from service.gateway.question import Question
from service.gateway.settings import Settings
from service.gateway.telemetry.metrics import Metrics
from service.gateway.telemetry.record import Record


def model_routes(
    settings: Settings,
    keys: KeyRing | None,
    questions: QuestionReader,
    pipeline: Pipeline,
    metrics: Metrics,
    card: ModelCard,
    created: int,
) -> APIRouter:
    """`keys` None: the door is open."""
    router = APIRouter(
        prefix="/v1", dependencies=[] if keys is None else [Depends(key_check(keys, isolate=settings.isolate_keys))]
    )
    served_name = settings.served_name
    listed = {"id": served_name, "object": "model", "created": created, "owned_by": "crossgate", **card.to_json()}

    @router.post("/generate", openapi_extra=GENERATE_DOCS)
    async def generate(request: Request) -> Response:
        """Text for a prompt with pictures, whole or streamed. Greedy unless asked otherwise."""
        question = await questions.generate(request)
        return await reply(request, question, GenerateReply(served_name, question, request.state.record.request_id))

    @router.post("/chat/completions", openapi_extra=CHAT_DOCS)
    async def chat_completions(request: Request) -> Response:
        """OpenAI's chat completions with pictures as data URLs, whole or streamed."""
        question = await questions.chat(request)
        return await reply(request, question, ChatReply(served_name, question, request.state.record.request_id))

    @router.get("/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [listed]}

    @router.get("/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        check_model(model, served_name)
        return listed

    async def reply(request: Request, question: Question, reply: Reply) -> Response:
        record: Record = request.state.record
        record.streamed = question.stream
        pieces = pipeline.answer(question, record)
        if not question.stream:
            try:
                return JSONResponse(reply.whole(await or_disconnected(request.receive, _all(pieces))))
            finally:
                question.drop()

        def failed(error: CrossgateError) -> None:
            record.error = error
            metrics.failure.labels(error.code).inc()

        chunks = _chunks(reply, pieces)
        return EventStream(chunks, ping_interval_s=settings.ping_interval_s, on_error=failed, on_end=question.drop)

    return router


async def _all(pieces: AsyncGenerator[Piece, None]) -> list[Piece]:
    async with aclosing(pieces):
        return [piece async for piece in pieces]


async def _chunks(reply: Reply, pieces: AsyncGenerator[Piece, None]) -> AsyncGenerator[list[dict[str, Any]], None]:
    async with aclosing(pieces):
        async for piece in pieces:
            yield list(reply.chunks(piece))

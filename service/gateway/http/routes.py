"""The model's routes: from a body to a Question, through the pipeline, to a body or a stream."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from service.errors import CrossgateError
from service.gateway.http.auth import bearer_check
from service.gateway.http.bodies import BodyBudget
from service.gateway.http.docs import CHAT_DOCS, GENERATE_DOCS
from service.gateway.http.questions import QuestionReader, check_model
from service.gateway.http.replies import ChatReply, GenerateReply, Reply
from service.gateway.http.sse import EventStream, or_disconnected
from service.gateway.pipeline import Piece, Pipeline
from service.gateway.question import Question
from service.gateway.settings import Settings
from service.gateway.telemetry.metrics import Metrics


def model_routes(
    settings: Settings,
    bodies: BodyBudget,
    questions: QuestionReader,
    pipeline: Pipeline,
    metrics: Metrics,
    created: int,
) -> APIRouter:
    router = APIRouter(prefix="/v1", dependencies=[Depends(bearer_check(settings.read_api_keys()))])
    served_name = settings.served_name
    card = {"id": served_name, "object": "model", "created": created, "owned_by": "crossgate"}

    @router.post("/generate", openapi_extra=GENERATE_DOCS)
    async def generate(request: Request) -> Response:
        """Text for a prompt with pictures, whole or streamed. Greedy unless asked otherwise."""
        async with bodies.lease() as lease:
            question = await questions.generate(request, lease)
            return await reply(request, question, GenerateReply(served_name, question))

    @router.post("/chat/completions", openapi_extra=CHAT_DOCS)
    async def chat_completions(request: Request) -> Response:
        """OpenAI's chat completions with pictures as data URLs, whole or streamed."""
        async with bodies.lease() as lease:
            question = await questions.chat(request, lease)
            return await reply(request, question, ChatReply(served_name, question))

    @router.get("/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @router.get("/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        check_model(model, served_name)
        return card

    async def reply(request: Request, question: Question, reply: Reply) -> Response:
        pieces = pipeline.answer(question)
        if not question.stream:
            return JSONResponse(reply.whole(await or_disconnected(request.receive, _all(pieces))))
        # the first piece comes before the first byte, so that whatever is wrong until then has its HTTP status
        first = await or_disconnected(request.receive, anext(pieces))
        return EventStream(
            _chunks(reply, first, pieces), client_timeout_s=settings.client_timeout_s, on_error=count_failure
        )

    def count_failure(error: CrossgateError) -> None:
        metrics.failure.labels(error.code).inc()

    return router


async def _all(pieces: AsyncGenerator[Piece, None]) -> list[Piece]:
    async with aclosing(pieces):
        return [piece async for piece in pieces]


async def _chunks(
    reply: Reply, first: Piece, pieces: AsyncGenerator[Piece, None]
) -> AsyncGenerator[list[dict[str, Any]], None]:
    async with aclosing(pieces):
        yield list(reply.chunks(first))
        async for piece in pieces:
            yield list(reply.chunks(piece))

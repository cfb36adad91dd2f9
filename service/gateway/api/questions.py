"""From a request's bytes to a Question. What is long is parsed in a thread; what was read is dropped with it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor

from python_multipart.multipart import parse_options_header
from starlette.requests import Request

from service.errors import InvalidRequest, NotFound
from service.gateway.api.forms import FormLimits, parse_form
from service.gateway.api.json_body import JsonLimits, load_json
from service.gateway.api.schemas import ChatBody, GenerateBody
from service.gateway.api.validation import validate
from service.gateway.http.bodies import BodyBudget
from service.gateway.question import Question, SamplingDefaults

MAX_MEDIA_TYPE_CHARS = 1024
INLINE_BYTES = 16 << 10  # parsed within a millisecond, which is less than a thread would cost


class QuestionReader:
    """A question holds its body's bytes of the budget until it is dropped.

    `threads`: one is best, so that only one body at a time lies in memory both as bytes and parsed."""

    def __init__(
        self,
        *,
        served_name: str,
        max_images: int,
        max_image_bytes: int,
        max_json_bytes: int,
        max_prompt_tokens: int,
        chat_defaults: SamplingDefaults,
        bodies: BodyBudget,
        threads: Executor,
    ) -> None:
        self._bodies = bodies
        self._served_name = served_name
        self._json_limits = JsonLimits(max_json_bytes, max_images, max_image_bytes)
        self._form_limits = FormLimits(max_images, max_json_bytes, max_prompt_tokens)
        self._max_prompt_tokens = max_prompt_tokens
        self._chat_defaults = chat_defaults
        self._threads = threads

    async def generate(self, request: Request) -> Question:
        """From JSON or a form. Raises InvalidRequest, and what reading a body raises."""
        kind, options = _media_type(request)
        if kind == b"multipart/form-data":
            boundary = options.get(b"boundary", b"")
            return await self._parse(lambda body: self._form(body, boundary), request)
        if kind != b"application/json":
            raise InvalidRequest("The body must be application/json or multipart/form-data.")
        return await self._parse(self._generate, request)

    async def chat(self, request: Request) -> Question:
        """Raises InvalidRequest, and what reading a body raises."""
        _media_type(request)
        return await self._parse(self._chat, request)

    async def _parse(self, parse: Callable[[bytearray], Question], request: Request) -> Question:
        lease = self._bodies.lease()
        try:
            body = await lease.read(request)
            if len(body) <= INLINE_BYTES:
                question = parse(body)
            else:
                question = await asyncio.get_running_loop().run_in_executor(self._threads, parse, body)
        except BaseException:
            lease.release()
            raise
        question.on_dropped = lease.release
        return question

    def _generate(self, body: bytearray) -> Question:
        fields = load_json(body, self._json_limits)
        asked = validate(GenerateBody, fields, strict=True, max_prompt_tokens=self._max_prompt_tokens)
        check_model(asked.model, self._served_name)
        return asked.question()

    def _form(self, body: bytearray, boundary: bytes) -> Question:
        fields, pictures = parse_form(body, boundary, self._form_limits)
        check_model(fields.model, self._served_name)
        return fields.question(pictures)

    def _chat(self, body: bytearray) -> Question:
        fields = load_json(body, self._json_limits)
        chat = validate(ChatBody, fields, strict=True, max_prompt_tokens=self._max_prompt_tokens)
        check_model(chat.model, self._served_name)
        return chat.question(self._chat_defaults)


def check_model(name: str | None, served_name: str) -> None:
    """Raises NotFound."""
    if name is not None and name != served_name:
        raise NotFound(f"The model served here is {served_name}.", param="model")


def _media_type(request: Request) -> tuple[bytes, dict[bytes, bytes]]:
    text = request.headers.get("content-type", "application/json")
    if len(text) > MAX_MEDIA_TYPE_CHARS:
        raise InvalidRequest(f"Content-Type has at most {MAX_MEDIA_TYPE_CHARS} characters.")
    kind, options = parse_options_header(text)
    if options.get(b"charset", b"utf-8").lower() not in (b"utf-8", b"utf8"):
        raise InvalidRequest("A body is UTF-8 here; another charset is not read.")
    return kind, options

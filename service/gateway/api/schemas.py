"""What clients may send as JSON, and how it becomes a Question.

Nothing is silently dropped: a parameter is used, declared as harmless, or refused by name. Knows nothing
of tokens, pixels or HTTP.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import GroupedMetadata, MaxLen, MinLen
from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, ValidationInfo, model_validator
from pydantic_core import PydanticKnownError

from service.contract import MAX_STOP_TOKEN_IDS, SamplingParams
from service.errors import InvalidRequest
from service.gateway.question import PictureSource, Question, SamplingDefaults

MAX_STOP_STRINGS = 4
MAX_STOP_CHARS = 256
MAX_NAME_CHARS = 512
MAX_IMAGES = 1024  # of a list; the setting of that name is checked later, and by name
MAX_MESSAGES = 1024
MAX_PROMPT_TOKENS = 1 << 20  # the context's length is the real limit; it comes as the validation's context
MAX_PARTS = 1024  # of all messages
MAX_KEYS = 64  # of an object: each unknown one is an error to be told
REPLY_KEYS = ("refusal", "annotations", "audio", "function_call", "tool_calls")
UNSUPPORTED: dict[str, tuple[Any, ...]] = {  # name -> values that ask for nothing
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "function_call": ("none",),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "web_search_options": (),
}


@dataclass(frozen=True)
class AtMost(GroupedMetadata):
    """A list that is so long at most, and ends at its first mistake: each would be an error to be told."""

    max_length: int

    def __iter__(self) -> Iterator[object]:
        yield FailFast()
        yield MaxLen(self.max_length)


def _short(value: Any, max_length: int) -> Any:
    """Length before content."""
    if isinstance(value, list | dict) and len(value) > max_length:
        kind = type(value).__name__.capitalize()
        raise PydanticKnownError(
            "too_long", {"field_type": kind, "max_length": max_length, "actual_length": len(value)}
        )
    return value


def _fits(value: Any, info: ValidationInfo[int | None]) -> Any:
    return _short(value, info.context or MAX_PROMPT_TOKENS)


def _few_parts(messages: Any) -> Any:
    if isinstance(_short(messages, MAX_MESSAGES), list):
        contents = [message.get("content") for message in messages if isinstance(message, dict)]
        if sum(len(content) for content in contents if isinstance(content, list)) > MAX_PARTS:
            raise InvalidRequest(f"messages hold at most {MAX_PARTS} parts.", param="messages")
    return messages


TokenIds = Annotated[list[int], AtMost(MAX_PROMPT_TOKENS), BeforeValidator(_fits)]


class _Object(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _has_few_keys(cls, data: Any) -> Any:
        return _short(data, MAX_KEYS)


class _Body(_Object):
    model_config = ConfigDict(allow_inf_nan=False)

    model: Annotated[str, Field(max_length=MAX_NAME_CHARS)] | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: str | Annotated[list[str], AtMost(MAX_STOP_STRINGS)] | None = None
    stop_token_ids: Annotated[list[int], AtMost(MAX_STOP_TOKEN_IDS)] | None = None
    ignore_eos: bool = False
    stream: bool = False

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: dict[str, Any]) -> dict[str, Any]:
        """null means absent, as with OpenAI."""
        return {name: value for name, value in data.items() if value is not None or name not in cls.model_fields}

    def _sampling(self, max_tokens: int | None, defaults: SamplingDefaults) -> SamplingParams:
        return SamplingParams(
            max_tokens=1 if max_tokens is None else max_tokens,
            temperature=defaults.temperature if self.temperature is None else self.temperature,
            top_p=defaults.top_p if self.top_p is None else self.top_p,
            top_k=defaults.top_k if self.top_k is None else self.top_k,
            seed=self.seed,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=self.ignore_eos,
            # a stop string is ours to find, so the tokens must come as they are made
            stream=self.stream or bool(self.stop),
        )

    def _stop(self) -> tuple[str, ...]:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if not all(0 < len(text) <= MAX_STOP_CHARS for text in stop):
            raise InvalidRequest(f"A stop string has 1 to {MAX_STOP_CHARS} characters.", param="stop")
        return stop


class GenerateBody(_Body):
    """Body of /v1/generate. `images` are data URLs; as multipart, `image` files stand in their place."""

    prompt: str | TokenIds
    images: Annotated[list[str], AtMost(MAX_IMAGES)] = []
    return_token_ids: bool = False

    def question(self, uploads: tuple[PictureSource, ...] = ()) -> Question:
        """Raises InvalidRequest."""
        urls = tuple(PictureSource(url, f"images[{index}]") for index, url in enumerate(self.images))
        return Question(
            prompt=self.prompt if isinstance(self.prompt, str) else tuple(self.prompt),
            pictures=uploads + urls,
            sampling=self._sampling(self.max_tokens, SamplingDefaults()),
            max_tokens_given=self.max_tokens is not None,
            stop=self._stop(),
            stream=self.stream,
            return_token_ids=self.return_token_ids,
        )


class TextPart(_Object):
    type: Literal["text"]
    text: str


class ImageURL(_Object):
    url: str
    detail: Literal["auto", "low", "high"] | None = None  # harmless: every picture is seen as the encoder sees it


class ImagePart(_Object):
    type: Literal["image_url"]
    image_url: ImageURL


class ChatMessage(_Object):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Annotated[TextPart | ImagePart, Field(discriminator="type")]], AtMost(MAX_PARTS)]

    @model_validator(mode="before")
    @classmethod
    def _drop_empty(cls, data: Any) -> Any:
        """A reply's message, sent back as the next request's, has these keys with nothing in them."""
        if not isinstance(data, dict):
            return data
        return {name: value for name, value in data.items() if name not in REPLY_KEYS or value}


class StreamOptions(_Object):
    include_usage: bool = False
    include_obfuscation: bool = False  # harmless: we never obfuscate


class ChatBody(_Body):
    """Body of /v1/chat/completions: OpenAI's, with `top_k`, `stop_token_ids` and `ignore_eos` beside it."""

    messages: Annotated[list[ChatMessage], AtMost(MAX_MESSAGES), MinLen(1), BeforeValidator(_few_parts)]
    max_completion_tokens: int | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    # these say nothing about the answer, and are ignored
    user: Any = None
    metadata: Any = None
    store: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    service_tier: Any = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, data: dict[str, Any]) -> dict[str, Any]:
        for name in UNSUPPORTED.keys() & data.keys():
            value = data[name]
            if value is not None and value not in UNSUPPORTED[name]:
                raise InvalidRequest(f"{name} is not supported.", param=name)
        return {name: value for name, value in data.items() if name not in UNSUPPORTED}

    def question(self, defaults: SamplingDefaults) -> Question:
        """Raises InvalidRequest."""
        if self.n not in (None, 1):
            raise InvalidRequest("n other than 1 is not supported.", param="n")
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options needs stream to be true.", param="stream_options")
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise InvalidRequest("max_tokens and max_completion_tokens differ.", param="max_tokens")
        max_tokens = limits.pop() if limits else None
        messages, pictures = self._messages()
        return Question(
            prompt=messages,
            pictures=pictures,
            sampling=self._sampling(max_tokens, defaults),
            max_tokens_given=max_tokens is not None,
            stop=self._stop(),
            stream=self.stream,
            include_usage=self.stream_options is not None and self.stream_options.include_usage,
        )

    def _messages(self) -> tuple[list[dict[str, Any]], tuple[PictureSource, ...]]:
        messages: list[dict[str, Any]] = []
        pictures: list[PictureSource] = []
        for number, message in enumerate(self.messages):
            content: list[dict[str, str]] = []
            if isinstance(message.content, str):
                content.append({"type": "text", "text": message.content})
            else:
                for index, part in enumerate(message.content):
                    if isinstance(part, TextPart):
                        content.append({"type": "text", "text": part.text})
                        continue
                    field = f"messages[{number}].content[{index}].image_url.url"
                    if message.role != "user":
                        raise InvalidRequest("Only user messages can hold pictures.", param=field)
                    pictures.append(PictureSource(part.image_url.url, field))
                    content.append({"type": "image"})
            role = "system" if message.role == "developer" else message.role
            messages.append({"role": role, "content": content})
        return messages, tuple(pictures)

"""What clients may send as JSON, and how it becomes a Question.

Nothing is silently dropped: a parameter is used, declared as harmless, or refused by name. Knows nothing
of tokens, pixels or HTTP.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from service.contract import SamplingParams
from service.errors import InvalidRequest
from service.gateway.question import PictureSource, Question, SamplingDefaults

MAX_STOP_STRINGS = 4
MAX_STOP_CHARS = 256
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


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
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
        if len(stop) > MAX_STOP_STRINGS:
            raise InvalidRequest(f"stop takes at most {MAX_STOP_STRINGS} strings.", param="stop")
        if not all(0 < len(text) <= MAX_STOP_CHARS for text in stop):
            raise InvalidRequest(f"A stop string has 1 to {MAX_STOP_CHARS} characters.", param="stop")
        return stop


class GenerateBody(_Body):
    """Body of /v1/generate. `images` are data URLs; as multipart, `image` files stand in their place."""

    prompt: str | list[int]
    images: list[str] = []
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


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TextPart(_Part):
    type: Literal["text"]
    text: str


class ImageURL(_Part):
    url: str
    detail: Literal["auto", "low", "high"] | None = None  # harmless: every picture is seen as the encoder sees it


class ImagePart(_Part):
    type: Literal["image_url"]
    image_url: ImageURL


class ChatMessage(_Part):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Annotated[TextPart | ImagePart, Field(discriminator="type")]]

    @model_validator(mode="before")
    @classmethod
    def _drop_empty(cls, data: Any) -> Any:
        """A reply's message, sent back as the next request's, has these keys with nothing in them."""
        if not isinstance(data, dict):
            return data
        return {name: value for name, value in data.items() if name not in REPLY_KEYS or value}


class StreamOptions(_Part):
    include_usage: bool = False
    include_obfuscation: bool = False  # harmless: we never obfuscate


class ChatBody(_Body):
    """Body of /v1/chat/completions: OpenAI's, with `top_k`, `stop_token_ids` and `ignore_eos` beside it."""

    messages: list[ChatMessage] = Field(min_length=1)
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

"""OpenAI's Python SDK, unmodified, against the running service."""

from __future__ import annotations

from typing import Any

import openai

from tests.e2e.running import Running, data_url, picture


def client(service: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0, timeout=60)


def messages(seed: int) -> list[Any]:
    parts = [
        {"type": "text", "text": "What is this?"},
        {"type": "image_url", "image_url": {"url": data_url(picture(seed))}},
    ]
    return [{"role": "user", "content": parts}]


def test_a_chat_with_a_picture_completes(service: Running) -> None:
    with client(service) as sdk:
        model = sdk.models.list().data[0].id
        completion = sdk.chat.completions.create(model=model, messages=messages(20), max_tokens=12)
    assert completion.choices[0].finish_reason in ("stop", "length")
    assert completion.choices[0].message.role == "assistant"
    assert completion.usage is not None
    assert 1 <= completion.usage.completion_tokens <= 12


def test_a_streamed_chat_says_the_same_as_the_whole_one(service: Running) -> None:
    with client(service) as sdk:
        model = sdk.models.list().data[0].id
        asked: dict[str, Any] = {"model": model, "messages": messages(21), "max_tokens": 12, "temperature": 0.0}
        whole = sdk.chat.completions.create(**asked)
        chunks = list(sdk.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_a_mistake_is_the_sdks_bad_request_error_with_the_field(service: Running) -> None:
    with client(service) as sdk:
        model = sdk.models.list().data[0].id
        try:
            sdk.chat.completions.create(model=model, messages=messages(22), temperature=9.0)
        except openai.BadRequestError as error:
            assert error.param == "temperature"
        else:
            raise AssertionError("accepted")

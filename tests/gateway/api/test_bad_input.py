"""Every mistake of a client is a 4xx with OpenAI's error body that names the field."""

from __future__ import annotations

import inspect
import struct
import zlib
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import pytest_asyncio
from fastapi import FastAPI
from PIL import Image
from tokenizers import Tokenizer

from service import errors
from service.gateway.app import create_app
from service.gateway.settings import Settings
from tests.gateway.checkpoints import make_family
from tests.gateway.conftest import Connect
from tests.gateway.fakes import FakeBackend
from tests.gateway.picture_files import RED, TRUNCATED_JPEG, data_url, encoded, file_of

TEXT_FILE = data_url(b"this is no picture")
GIF = data_url(file_of(Image.new("RGB", (8, 8)), "GIF"))
HUGE = data_url(encoded(size=(300, 300)))
LIMITS = {"max_images": 2, "max_image_pixels": 10_000, "max_image_bytes": 20_000, "max_body_bytes": 100_000}


def generate(**fields: Any) -> dict[str, Any]:
    return {"prompt": "Hi", **fields}


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], **fields}


def say(*parts: Any, role: str = "user") -> dict[str, Any]:
    return chat(messages=[{"role": role, "content": list(parts)}])


def show(url: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


URL = "messages[0].content[0].image_url.url"
GENERATE = [
    ("broken picture", generate(images=[TRUNCATED_JPEG]), 400, "images[0]"),
    ("not a picture", generate(images=[RED, TEXT_FILE]), 400, "images[1]"),
    ("a format we do not take", generate(images=[GIF]), 400, "images[0]"),
    ("too many pixels", generate(images=[HUGE]), 413, "images[0]"),
    ("too many bytes", generate(images=[data_url(b"x" * 21_000)]), 413, "images[0]"),
    ("too many pictures", generate(images=[RED] * 3), 413, "images[2]"),
    ("bad base64", generate(images=["data:image/png;base64,a$b="]), 400, "images[0]"),
    ("base64 without padding", generate(images=["data:image/png;base64,abc"]), 400, "images[0]"),
    ("base64 that is not ASCII", generate(images=["data:image/png;base64,äöü="]), 400, "images[0]"),
    ("a data URL that is not base64", generate(images=["data:image/png,abc"]), 400, "images[0]"),
    ("an http URL", generate(images=["https://example.org/a.png"]), 400, "images[0]"),
    ("bare base64", generate(images=[RED.partition(",")[2]]), 400, "images[0]"),
    ("more marks than pictures", generate(prompt="<image><image>Hi", images=[RED]), 400, "prompt"),
    ("fewer marks than pictures", generate(prompt="<image>Hi", images=[RED, RED]), 400, "prompt"),
    ("over-long prompt", generate(prompt=[1] * 160), 400, "prompt"),
    ("over-long text", generate(prompt="word " * 10_000), 400, "prompt"),
    ("over-long prompt and answer", generate(prompt=[1] * 100, max_tokens=61), 400, "max_tokens"),
    ("empty prompt", generate(prompt=""), 400, "prompt"),
    ("empty ids", generate(prompt=[]), 400, "prompt"),
    ("an id past the vocabulary", generate(prompt=[1, 10**6]), 400, "prompt[1]"),
    ("a negative id", generate(prompt=[-1]), 400, "prompt[0]"),
    ("no prompt", {"images": []}, 400, "prompt"),
    ("unknown parameter", generate(best_of=2), 400, "best_of"),
    ("text for a number", generate(temperature="0.5"), 400, "temperature"),
    ("fraction for an integer", generate(max_tokens=1.5), 400, "max_tokens"),
    ("true for an integer", generate(max_tokens=True), 400, "max_tokens"),
    ("number for a prompt", generate(prompt=5), 400, "prompt"),
    ("a number as long as the whole of sampling may be", generate(top_k=10**4200), 400, "top_k"),
    ("object for a prompt", generate(prompt={"a": 1}), 400, "prompt"),
    ("object for a stop string", generate(stop={"a": 1}), 400, "stop"),
    ("text among ids", generate(prompt=[1, "a"]), 400, "prompt[1]"),
    ("number for a picture", generate(images=[1]), 400, "images[0]"),
    ("zero tokens", generate(max_tokens=0), 400, "max_tokens"),
    ("temperature out of range", generate(temperature=2.5), 400, "temperature"),
    ("top_p out of range", generate(top_p=0), 400, "top_p"),
    ("top_k out of range", generate(top_k=0), 400, "top_k"),
    ("negative seed", generate(seed=-1), 400, "seed"),
    ("five stop strings", generate(stop=list("abcde")), 400, "stop"),
    ("empty stop string", generate(stop=""), 400, "stop"),
    ("another model", generate(model="gpt-9"), 404, "model"),
]
CHAT = [
    ("broken picture", say(show(TRUNCATED_JPEG)), 400, URL),
    ("not a picture", say(show(TEXT_FILE)), 400, URL),
    ("too many pixels", say(show(HUGE)), 413, URL),
    ("too many pictures", say(*[show(RED)] * 3), 413, "messages[0].content[2].image_url.url"),
    ("an http URL", say(show("http://example.org/a.png")), 400, URL),
    ("bad base64", say(show("data:image/png;base64,!!!!")), 400, URL),
    ("a picture of the assistant's", say(show(RED), role="assistant"), 400, URL),
    ("over-long context", say({"type": "text", "text": "word " * 200}), 400, "messages"),
    ("over-long prompt and answer", chat(max_completion_tokens=10_000), 400, "max_tokens"),
    ("unknown parameter", chat(temprature=1), 400, "temprature"),
    ("unknown key of a message", chat(messages=[{"role": "user", "content": "a", "x": 1}]), 400, "messages[0].x"),
    ("unknown role", chat(messages=[{"role": "tool", "content": "a"}]), 400, "messages[0].role"),
    ("no content", chat(messages=[{"role": "user"}]), 400, "messages[0].content"),
    ("number for content", chat(messages=[{"role": "user", "content": 5}]), 400, "messages[0].content"),
    ("unknown part", say({"type": "video", "video": "a"}), 400, "messages[0].content[0]"),
    ("a part without its text", say({"type": "text"}), 400, "messages[0].content[0].text"),
    ("number for a URL", say(show(5)), 400, URL),
    ("text for a list", chat(messages="Hi"), 400, "messages"),
    ("no messages", chat(messages=[]), 400, "messages"),
    ("two answers", chat(n=2), 400, "n"),
    ("two limits", chat(max_tokens=1, max_completion_tokens=2), 400, "max_tokens"),
    ("stream options without a stream", chat(stream_options={"include_usage": True}), 400, "stream_options"),
    ("logprobs", chat(logprobs=True), 400, "logprobs"),
    ("tools", chat(tools=[{"type": "function"}]), 400, "tools"),
    ("response_format", chat(response_format={"type": "json_object"}), 400, "response_format"),
    ("another model", chat(model="gpt-9"), 404, "model"),
]
CASES = [("/v1/generate", *case) for case in GENERATE] + [("/v1/chat/completions", *case) for case in CHAT]


def check(reply: Any, status: int, param: str | None) -> None:
    assert reply.status_code == status, reply.text
    assert reply.json().keys() == {"error"}
    error = reply.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    if param is not None:
        assert error["param"] == param
    assert "Traceback" not in reply.text and "pydantic" not in reply.text
    assert reply.headers["x-request-id"]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def app(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> AsyncIterator[FastAPI]:
    """One for all cases: none of them changes anything."""
    family = make_family(tmp_path_factory.mktemp("checkpoint"), tokenizer)
    settings = Settings(model_path=family.folder, model_name="tiny", **LIMITS)
    app = create_app(settings, family, tokenizer, FakeBackend(script=(1, 2, 3)))
    async with app.router.lifespan_context(app):
        yield app


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    ("path", "mistake", "body", "status", "param"), CASES, ids=[f"{c[0].split('/')[2]}-{c[1]}" for c in CASES]
)
async def test_a_mistake_is_refused_by_name(
    app: FastAPI, path: str, mistake: str, body: Any, status: int, param: str | None, stream: bool
) -> None:
    if stream and "stream_options" not in body:
        body = {**body, "stream": True}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:
        check(await client.post(path, json=body), status, param)
    assert app.state.admission.num_running == app.state.admission.num_waiting == 0


@pytest.mark.asyncio
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'"text"', b"\xff", b'{"prompt": NaN}', b"[" * 100_000])
async def test_a_body_that_is_no_json_object_is_refused(connect: Connect, content: bytes) -> None:
    async with connect(max_body_bytes=200_000) as client:
        for path in ("/v1/generate", "/v1/chat/completions"):
            check(await client.post(path, content=content), 400, None)


@pytest.mark.asyncio
async def test_a_body_past_the_limit_is_refused_whatever_its_header_says(connect: Connect) -> None:
    async def pieces():
        for _ in range(100):
            yield b"x" * 10_000

    async with connect(**LIMITS) as client:
        check(await client.post("/v1/generate", content=pieces()), 413, None)
        form = {"image": ("a.png", b"x" * 200_000)}
        check(await client.post("/v1/generate", data={"prompt": "Hi"}, files=form), 413, None)


@pytest.mark.asyncio
async def test_a_bad_form_is_refused_by_name(connect: Connect) -> None:
    def upload(content: bytes) -> dict[str, Any]:
        return {"image": ("a.png", content)}

    async with connect(**LIMITS) as client:
        cases = [
            ({"prompt": "Hi"}, upload(b"no picture"), 400, "image[0]"),
            ({"prompt": "Hi"}, upload(encoded(size=(200, 200))), 413, "image[0]"),
            ({"prompt": "Hi", "temperature": "warm"}, upload(encoded()), 400, "temperature"),
            ({"prompt": "Hi", "stream": "perhaps"}, upload(encoded()), 400, "stream"),
            ({"prompt": "Hi", "size": "5"}, upload(encoded()), 400, "size"),
            ({}, upload(encoded()), 400, "prompt"),
            ({"prompt": ["Hi", "again"]}, upload(encoded()), 400, "prompt"),
            ({"prompt": "Hi"}, {"picture": ("a.png", encoded())}, 400, "picture"),
            ({"prompt": "Hi"}, {"images": ("a.png", encoded())}, 400, "images"),
        ]
        for form, files, status, param in cases:
            check(await client.post("/v1/generate", data=form, files=files), status, param)
        headers = {"content-type": "multipart/form-data; boundary=x"}
        check(await client.post("/v1/generate", content=b"garbage", headers=headers), 400, None)
        check(await client.post("/v1/generate", content=b"x", headers={"content-type": "text/plain"}), 400, None)


@pytest.mark.asyncio
async def test_unknown_paths_and_methods_have_the_same_body(connect: Connect) -> None:
    async with connect() as client:
        check(await client.get("/v1/nothing"), 404, None)
        check(await client.get("/v1/generate"), 405, None)
        check(await client.get("/v1/models/other"), 404, "model")


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@pytest.mark.asyncio
async def test_a_decompression_bomb_is_refused_before_it_is_decoded(connect: Connect) -> None:
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in ((b"IHDR", header), (b"IDAT", b""), (b"IEND", b"")))
    async with connect() as client:
        check(await client.post("/v1/generate", json=generate(images=[data_url(bomb)])), 413, "images[0]")


def test_every_error_has_a_status() -> None:
    kinds = [
        kind
        for _, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, errors.CrossgateError) and kind is not errors.CrossgateError
    ]
    assert set(kinds) == set(errors.ALL_ERRORS)
    assert all(400 <= kind.status < 600 for kind in kinds)
    assert len({kind.code for kind in kinds}) == len(kinds)

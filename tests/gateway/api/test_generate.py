from __future__ import annotations

import asyncio
import json

import httpx
import pytest

from tests.gateway.conftest import REPLY, Connect
from tests.gateway.fakes import FakeBackend
from tests.gateway.picture_files import BLUE, GREEN, RED, data_url, encoded

pytestmark = pytest.mark.asyncio


def events(text: str) -> list[str]:
    return [line.removeprefix("data: ") for line in text.split("\n\n") if line]


async def test_json_with_a_picture_answers_text_usage_and_timings(connect: Connect, backend: FakeBackend) -> None:
    async with connect() as client:
        reply = await client.post(
            "/v1/generate", json={"prompt": "<image>What is it?", "images": [RED], "return_token_ids": True}
        )
    assert reply.status_code == 200
    body = reply.json()
    assert body["text"] == REPLY
    assert body["token_ids"] == list(backend.script)
    assert body["finish_reason"] == "stop"
    assert body["model"] == "tiny" and body["id"].startswith("gen-")
    assert body["usage"]["images"] == 1 and body["usage"]["cached_images"] == 0
    assert body["usage"]["completion_tokens"] == len(backend.script)
    assert set(body["timings"]) == {"queue_ms", "encode_ms", "prefill_ms", "decode_ms"}
    assert backend.requests[0].sampling.temperature == 0.0
    assert not backend.requests[0].sampling.stream
    assert reply.headers["x-request-id"]


async def test_streamed_pieces_add_up_and_end_with_done(connect: Connect, backend: FakeBackend) -> None:
    async with connect() as client:
        body = {"prompt": "Tell me.", "stream": True, "return_token_ids": True}
        reply = await client.post("/v1/generate", json=body)
    assert reply.headers["content-type"].startswith("text/event-stream")
    *pieces, done = events(reply.text)
    assert done == "[DONE]"
    chunks = [json.loads(piece) for piece in pieces]
    assert "".join(chunk["text"] for chunk in chunks) == REPLY
    assert [token for chunk in chunks for token in chunk["token_ids"]] == list(backend.script)
    assert [chunk["finish_reason"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["finish_reason"] == "stop" and chunks[-1]["usage"]["prompt_tokens"] > 0
    assert "�" not in reply.text


async def test_multipart_takes_files_and_form_values(connect: Connect, backend: FakeBackend) -> None:
    files = [("image", ("a.png", encoded("red"))), ("image", ("b.webp", encoded("blue", form="WEBP")))]
    form = {"prompt": "<image> or <image>?", "temperature": "0.5", "max_tokens": "4", "seed": "7", "top_k": "3"}
    async with connect() as client:
        reply = await client.post("/v1/generate", data=form, files=files)
    assert reply.status_code == 200, reply.text
    sampling = backend.requests[0].sampling
    assert (sampling.temperature, sampling.max_tokens, sampling.seed, sampling.top_k) == (0.5, 4, 7, 3)
    assert reply.json()["finish_reason"] == "length"
    assert len(set(backend.requests[0].image_keys)) == 2


async def test_pictures_without_marks_go_before_the_text(connect: Connect, backend: FakeBackend) -> None:
    async with connect() as client:
        await client.post("/v1/generate", json={"prompt": "Which?", "images": [RED, GREEN]})
        await client.post("/v1/generate", json={"prompt": "<image><image>Which?", "images": [RED, GREEN]})
    assert backend.requests[0] == backend.requests[1]
    assert backend.requests[0].image_positions == (0, 1)


async def test_token_ids_are_taken_as_they_are(connect: Connect, backend: FakeBackend, tokenizer) -> None:
    image = tokenizer.token_to_id("<image>")
    async with connect() as client:
        reply = await client.post("/v1/generate", json={"prompt": [5, image, 6], "images": [RED]})
    assert reply.status_code == 200
    assert backend.requests[0].input_ids == (5, image, 6)
    assert backend.requests[0].image_positions == (1,)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_across_tokens_ends_the_text_and_cancels_the_decoder(
    connect: Connect, backend: FakeBackend, stream: bool
) -> None:
    body = {"prompt": "Tell me.", "stop": ["nowhere", "ee cats a"], "stream": stream}
    async with connect() as client:
        reply = await client.post("/v1/generate", json=body)
    if stream:
        *pieces, done = events(reply.text)
        chunks = [json.loads(piece) for piece in pieces]
        assert done == "[DONE]"
        text, last = "".join(chunk["text"] for chunk in chunks), chunks[-1]
    else:
        last = reply.json()
        text = last["text"]
    assert text == "There are thr"
    assert last["finish_reason"] == "stop"
    assert 0 < last["usage"]["completion_tokens"] < len(backend.script)
    assert backend.num_cancelled == 1 and backend.num_running == 0


async def test_text_that_only_begins_like_a_stop_string_is_delivered(connect: Connect) -> None:
    async with connect() as client:
        reply = await client.post("/v1/generate", json={"prompt": "Tell me.", "stop": "bird.x"})
    assert reply.json()["text"] == REPLY


async def test_max_tokens_is_filled_up_to_what_fits(connect: Connect, backend: FakeBackend, family) -> None:
    async with connect() as client:
        await client.post("/v1/generate", json={"prompt": [5] * 150})
        await client.post("/v1/generate", json={"prompt": [5] * 10, "max_tokens": 150})
    assert backend.requests[0].sampling.max_tokens == family.decoder.max_positions - 150
    assert backend.requests[1].sampling.max_tokens == 150


async def test_the_same_picture_is_sent_once_and_said_to_be_cached(connect: Connect, backend: FakeBackend) -> None:
    body = {"prompt": "<image>?", "images": [RED]}
    async with connect() as client:
        first, second = [(await client.post("/v1/generate", json=body)).json() for _ in range(2)]
    assert backend.num_encoded == 1
    assert [len(sent) for sent in backend.sent] == [1, 0]
    assert (first["usage"]["cached_images"], second["usage"]["cached_images"]) == (0, 1)
    assert second["timings"]["encode_ms"] == 0
    assert first["text"] == second["text"]


async def test_pictures_keep_their_places(connect: Connect, backend: FakeBackend) -> None:
    async with connect() as client:
        await client.post("/v1/generate", json={"prompt": "<image>a<image>b<image>", "images": [RED, BLUE, RED]})
    one, two, three = backend.requests[0].image_keys
    assert one == three != two
    assert backend.num_encoded == 2


async def test_images_do_not_leak_between_requests(connect: Connect, backend: FakeBackend) -> None:
    """Each key's latents are those of its own picture, whatever is asked at the same time."""
    greys = [data_url(encoded(f"rgb({level}, {level}, {level})")) for level in range(0, 240, 30)]
    backend.encode_s = 0.01
    async with connect() as client:
        asked = [{"prompt": f"{n} <image>", "images": [grey]} for n, grey in enumerate(greys)]
        replies = await asyncio.gather(*(client.post("/v1/generate", json=body) for body in asked))
    assert {reply.status_code for reply in replies} == {200}
    by_prompt = sorted(backend.requests, key=lambda request: request.input_ids)
    assert len({request.image_keys for request in by_prompt}) == len(greys)
    assert [backend.latents[request.image_keys[0]].values[0, 0, 0] for request in by_prompt] == list(range(0, 240, 30))


async def test_an_error_after_the_first_byte_is_an_event_without_done(connect: Connect, backend: FakeBackend) -> None:
    from service.errors import Unavailable

    backend.fail_after = (3, Unavailable("The decoder is gone."))
    async with connect() as client:
        reply = await client.post("/v1/generate", json={"prompt": "Tell me.", "stream": True})
    assert reply.status_code == 200
    *_, last = [part for part in reply.text.split("\n\n") if part]
    assert last.startswith("event: error\ndata: ")
    assert json.loads(last.split("data: ")[1])["error"]["code"] == "unavailable"
    assert "[DONE]" not in reply.text


async def test_an_error_before_the_first_byte_has_its_status(connect: Connect, backend: FakeBackend) -> None:
    from service.errors import Overloaded

    backend.failures = [Overloaded("The decoder's queue is full.", retry_after_s=2)]
    async with connect() as client:
        reply = await client.post("/v1/generate", json={"prompt": "Tell me.", "stream": True})
    assert reply.status_code == 429
    assert reply.headers["retry-after"] == "2"


async def test_an_unexpected_failure_is_a_fixed_text(connect: Connect, backend: FakeBackend) -> None:
    async def broken(pixels):
        raise ZeroDivisionError("secret detail")

    backend.encode = broken  # type: ignore[method-assign]
    async with connect() as client:
        reply: httpx.Response = await client.post("/v1/generate", json={"prompt": "?", "images": [RED]})
    assert reply.status_code == 500
    assert reply.json()["error"] == {
        "message": "The server failed.",
        "type": "server_error",
        "param": None,
        "code": "internal",
    }
    assert reply.headers["x-request-id"]

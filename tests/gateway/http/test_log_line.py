"""One log line for each request, which says how it ended, and whose ids lead to the stages."""

from __future__ import annotations

import asyncio
import logging
import signal
from typing import Any

import httpx
import pytest

from service.errors import Internal, Overloaded, StageTimeout, Unavailable
from service.gateway.pictures.read import PictureReader
from tests.gateway.conftest import Connect
from tests.gateway.fakes import FakeBackend
from tests.gateway.http.raw import until
from tests.gateway.picture_files import RED, TRUNCATED_JPEG
from tests.gateway.test_main import free_port

ASK = {"prompt": "<image>What?", "images": [RED]}
TIMINGS = {"queue_ms", "encode_ms", "prefill_ms", "decode_ms"}


class Lines(logging.Handler):
    """What the edge said of each request."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[dict[str, Any]] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage() == "request" and record.levelno >= logging.INFO:
            self.told.append(record.fields)


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    caplog.set_level(logging.INFO)
    handler = Lines()
    logging.getLogger().addHandler(handler)
    yield handler.told
    logging.getLogger().removeHandler(handler)


async def ended(client: httpx.AsyncClient) -> dict[str, float]:
    """Of the metrics, what is not 0."""
    text = (await client.get("/metrics")).text
    values = dict(
        line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("crossgate_requests_ended_total")
    )
    return {name.split('"')[1]: float(value) for name, value in values.items() if float(value)}


@pytest.mark.parametrize("stream", [False, True])
async def test_a_finished_request_s_line_says_what_it_took(
    connect: Connect, backend: FakeBackend, lines: list[dict[str, Any]], stream: bool
) -> None:
    async with connect() as client:
        for _ in range(2):
            await client.post("/v1/generate", json={**ASK, "stream": stream})
    assert len(lines) == 2
    for line, cached in zip(lines, (0, 1), strict=True):
        numbers = {name: line.pop(name) for name in (*TIMINGS, "ms", "prompt_tokens")}
        assert all(value >= 0 for value in numbers.values())
        assert numbers["prefill_ms"] == 2.0 and numbers["prompt_tokens"] > 1
        assert line == {
            "method": "POST",
            "path": "/v1/generate",
            "status": 200,
            "outcome": "finished",
            "streamed": stream,
            "finish_reason": "stop",
            "completion_tokens": len(backend.script),
            "pictures": 1,
            "cached_pictures": cached,
        }


@pytest.mark.parametrize(
    "failure", [Unavailable("gone"), StageTimeout("late"), Internal("broken"), ZeroDivisionError()]
)
async def test_a_stream_that_fails_after_its_first_byte_does_not_look_like_a_plain_200(
    connect: Connect, backend: FakeBackend, lines: list[dict[str, Any]], failure: Exception
) -> None:
    backend.fail_after = (3, failure)
    async with connect() as client:
        reply = await client.post("/v1/generate", json={**ASK, "stream": True})
        assert reply.status_code == 200 and "[DONE]" not in reply.text
        counts, text = await ended(client), (await client.get("/metrics")).text
    (line,) = lines
    code = getattr(failure, "code", "internal")
    assert (line["status"], line["outcome"], line["code"]) == (200, "failed", code)
    assert line["completion_tokens"] == 3 and line["decode_ms"] >= 0 and "finish_reason" not in line
    assert counts == {"failed": 1}
    assert f'crossgate_request_failure_total{{code="{code}"}} 1.0' in text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("failure", "outcome"),
    [(Unavailable("gone"), "failed"), (Internal("broken"), "failed"), (Overloaded("full"), "refused")],
)
async def test_an_error_before_the_first_byte_is_told_apart_from_a_refusal(
    connect: Connect, backend: FakeBackend, lines: list[dict[str, Any]], failure: Any, outcome: str, stream: bool
) -> None:
    backend.failures = [failure]
    async with connect(restart_wait_s=0) as client:
        reply = await client.post("/v1/generate", json={**ASK, "stream": stream})
        counts = await ended(client)
    (line,) = lines
    assert (line["status"], line["outcome"], line["code"]) == (reply.status_code, outcome, failure.code)
    assert reply.status_code == failure.status and line["pictures"] == 1
    assert counts == {outcome: 1}


async def test_refusals_say_their_code(serve: Connect, lines: list[dict[str, Any]]) -> None:
    async with serve(max_body_bytes=3000) as client:
        await client.post("/v1/generate", content=b"{")
        await client.post("/v1/generate", json={"prompt": "Hi", "images": [TRUNCATED_JPEG]})
        await client.post("/v1/generate", json={"prompt": "x" * 4000})
        await client.get("/v1/models/other")
        await client.get("/nowhere" + "/x" * 200)
        client.server.handle_exit(signal.SIGTERM, None)
        await client.post("/v1/generate", json={"prompt": "Hi"})
    told = [(line["status"], line["code"]) for line in lines]
    codes = ["invalid_request", "invalid_request", "too_large", "not_found", "not_found", "unavailable"]
    assert told == list(zip([400, 400, 413, 404, 404, 503], codes, strict=True))
    assert {line["outcome"] for line in lines} == {"refused"}
    assert max(len(line["path"]) for line in lines) == 200


async def test_what_is_not_at_a_port_is_a_refusal(serve: Connect, lines: list[dict[str, Any]]) -> None:
    port = free_port()
    async with serve(ops_port=port), httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as ops:
        assert (await ops.get("/v1/models")).status_code == 404
    (line,) = lines
    assert (line["status"], line["outcome"], line["code"]) == (404, "refused", "not_found")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("where", ["queue", "pictures", "encode", "first token", "amid"])
async def test_who_leaves_frees_everything_and_is_counted_once(
    serve: Connect,
    backend: FakeBackend,
    lines: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    stream: bool,
) -> None:
    gate = asyncio.Event()
    reached = asyncio.Event()
    if where == "pictures":

        async def read(*_: Any) -> Any:
            reached.set()
            await gate.wait()

        monkeypatch.setattr(PictureReader, "read", read)
    elif where == "encode":
        backend.encode_gate = gate
    elif where == "first token":
        backend.step_s = 3600.0
    else:
        backend.gate = gate
    async with serve(max_concurrent_requests=1) as client:
        admission = client.app.state.admission
        if where == "queue":
            holder = asyncio.create_task(client.post("/v1/generate", json=ASK))
            await until(lambda: backend.num_running)
        asking = asyncio.create_task(client.post("/v1/generate", json={**ASK, "stream": stream}))
        await until(
            {
                "queue": lambda: admission.num_waiting,
                "pictures": reached.is_set,
                "encode": lambda: backend.num_encoded,
            }.get(where, lambda: backend.num_running)
        )
        await asyncio.sleep(0.05)
        asking.cancel()
        await until(lambda: lines)
        await until(lambda: not admission.num_waiting)
        assert lines[0]["outcome"] == "cancelled" and lines[0]["streamed"] is stream and "code" not in lines[0]
        assert lines[0]["status"] == (200 if where == "amid" and stream else 499)
        if where == "queue":
            assert admission.num_running == 1 and lines[0]["queue_ms"] >= 40 and "prompt_tokens" not in lines[0]
            gate.set()
            await holder
            assert await ended(client) == {"finished": 1}  # who waited was not admitted
        else:
            await until(lambda: not admission.num_running)
            assert backend.num_running == 0
            assert await ended(client) == {"cancelled": 1}
    assert len(lines) == (2 if where == "queue" else 1)


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_s_id_contains_the_request_s(connect: Connect, stream: bool) -> None:
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
    async with connect() as client:
        for path, body, prefix in (
            ("/v1/generate", {"prompt": "Hi"}, "gen"),
            ("/v1/chat/completions", chat, "chatcmpl"),
        ):
            for given in ("my-id.1", None):
                headers = {} if given is None else {"x-request-id": given}
                reply = await client.post(path, json={**body, "stream": stream}, headers=headers)
                assert given in (None, reply.headers["x-request-id"])
                assert f'"id":"{prefix}-{reply.headers["x-request-id"]}"' in reply.text.replace('": ', '":')


async def test_requests_with_the_same_id_are_answered_apart(connect: Connect, backend: FakeBackend) -> None:
    async with connect() as client:
        asked = [{"prompt": f"{n}", "max_tokens": n, "return_token_ids": True} for n in range(1, 9)]
        replies = await asyncio.gather(
            *(client.post("/v1/generate", json=body, headers={"x-request-id": "same"}) for body in asked)
        )
    assert [reply.json()["token_ids"] for reply in replies] == [list(backend.script[:n]) for n in range(1, 9)]
    assert {reply.json()["id"] for reply in replies} == {"gen-same"}

"""Streams that are silent for long, and readers that take nothing."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import httpx
import openai
import pytest

from service.contract import TokenEvent, ValidRequest
from service.errors import CrossgateError, Unavailable
from tests.gateway.conftest import REPLY, Connect
from tests.gateway.fakes import FakeBackend
from tests.gateway.http.raw import until

ASK = {"prompt": "Tell me.", "stream": True}


def wait_before(backend: FakeBackend, number: int, seconds: float, then: CrossgateError | None = None) -> None:
    """The decoder is silent for so long before its event of this number, and fails then if it is to."""
    generate = backend.generate

    async def halting(request: ValidRequest, latents: Mapping[str, Any]) -> AsyncGenerator[TokenEvent, None]:
        async def events() -> AsyncGenerator[TokenEvent, None]:
            index = 0
            async for event in generate(request, latents):
                if index == number:
                    await asyncio.sleep(seconds)
                    if then is not None:
                        raise then
                yield event
                index += 1

        source = events()
        try:
            async for event in source:
                yield event
        finally:
            await source.aclose()

    backend.generate = halting  # type: ignore[method-assign]


@pytest.mark.parametrize("silent_before", [0, 4])
async def test_silence_is_broken_by_comments(connect: Connect, backend: FakeBackend, silent_before: int) -> None:
    wait_before(backend, silent_before, 2.0)
    async with connect(ping_interval_s=0.4) as client:  # what is not meant to be silent takes some 0.02 s
        reply = await client.post("/v1/generate", json=ASK)
    *events, end = reply.text.split("\n\n")[:-1]
    pings = [index for index, event in enumerate(events) if event == ": ping"]
    assert 2 <= len(pings) <= 5 and end == "data: [DONE]"
    text = [json.loads(event.removeprefix("data: "))["text"] for event in events if event != ": ping"]
    assert "".join(text) == REPLY
    assert (pings[0] == 0) == (silent_before == 0)


async def test_headers_and_a_comment_come_before_the_first_token(serve: Connect, backend: FakeBackend) -> None:
    wait_before(backend, 0, 3600.0)
    async with serve(ping_interval_s=0.1) as client, client.stream("POST", "/v1/generate", json=ASK) as reply:
        assert reply.status_code == 200 and reply.headers["content-type"].startswith("text/event-stream")
        lines = reply.aiter_lines()
        assert await anext(lines) == ": ping"
        assert backend.num_running == 1
    await until(lambda: backend.num_cancelled == 1)


async def test_who_waits_for_a_place_hears_that_the_line_is_open(serve: Connect, backend: FakeBackend) -> None:
    backend.gate = asyncio.Event()
    async with (
        serve(ping_interval_s=0.1, max_concurrent_requests=1) as client,
        client.stream("POST", "/v1/generate", json=ASK) as first,
    ):
        first_lines = first.aiter_lines()
        assert '"text":"' in await anext(first_lines)
        async with client.stream("POST", "/v1/generate", json=ASK) as second:
            second_lines = second.aiter_lines()
            assert await anext(second_lines) == ": ping"
            assert client.app.state.admission.num_waiting == 1


async def test_fast_streams_have_no_comments(connect: Connect, backend: FakeBackend) -> None:
    backend.step_s = 0.02
    async with connect(ping_interval_s=5.0) as client:
        assert "ping" not in (await client.post("/v1/generate", json=ASK)).text


async def test_an_error_before_the_first_comment_keeps_its_status(connect: Connect, backend: FakeBackend) -> None:
    wait_before(backend, 0, 0.05, Unavailable("gone", retry_after_s=3))
    async with connect(ping_interval_s=5.0, restart_wait_s=0) as client:
        reply = await client.post("/v1/generate", json=ASK)
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "3")
    assert reply.json()["error"]["code"] == "unavailable"


async def test_an_error_after_the_first_comment_is_an_event(connect: Connect, backend: FakeBackend) -> None:
    wait_before(backend, 0, 0.35, Unavailable("gone", retry_after_s=3))
    async with connect(ping_interval_s=0.1, restart_wait_s=0) as client:
        reply = await client.post("/v1/generate", json=ASK)
    assert reply.status_code == 200
    *pings, error = reply.text.split("\n\n")[:-1]
    assert set(pings) == {": ping"} and error.startswith("event: error\ndata: ")
    assert json.loads(error.split("data: ")[1])["error"]["code"] == "unavailable"


async def test_openai_s_client_does_not_mind_comments(serve: Connect, backend: FakeBackend) -> None:
    for number in (0, 4):
        wait_before(backend, number, 0.35)
    async with serve(ping_interval_s=0.1, restart_wait_s=0) as client:
        sdk = openai.AsyncOpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0, timeout=20)
        messages: list[Any] = [{"role": "user", "content": "Hi"}]
        async with sdk:
            stream = await sdk.chat.completions.create(model="tiny", messages=messages, stream=True)
            chunks = [chunk async for chunk in stream]
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == REPLY
            assert chunks[-1].choices[0].finish_reason == "stop"
            wait_before(backend, 0, 0.35, Unavailable("gone"))
            with pytest.raises(openai.APIError) as caught:
                async for _ in await sdk.chat.completions.create(model="tiny", messages=messages, stream=True):
                    pass
            assert caught.value.code == "unavailable"


def stalled(client: httpx.AsyncClient, request: bytes) -> socket.socket:
    """A connection that has asked and never reads, with next to no room of its own."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    connection.connect(("127.0.0.1", client.base_url.port))
    connection.sendall(request)
    return connection


def post(body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST /v1/generate HTTP/1.1\r\nhost: it\r\nx-request-id: {'x' * 128}\r\ncontent-length: {len(content)}"
    return f"{head}\r\ncontent-type: application/json\r\n\r\n".encode() + content


@pytest.mark.parametrize("silent_at", [None, 60])
async def test_a_reader_that_stalls_loses_its_connection_and_its_decoder(
    serve: Connect, backend: FakeBackend, silent_at: int | None
) -> None:
    """Whether more is to come or only comments are: what lies unread counts."""
    backend.script = backend.script * 20
    backend.step_s = 0.03
    if silent_at is not None:
        backend.step_s = 0.001
        wait_before(backend, silent_at, 3600.0)
    async with serve(client_timeout_s=1.0, ping_interval_s=0.2) as client:
        with stalled(client, post({**ASK, "max_tokens": 140, "ignore_eos": True})):
            await until(lambda: backend.num_running == 1)
            await until(lambda: backend.num_running == 0)
            assert backend.num_cancelled == 1
            await until(lambda: not client.server.server_state.connections)
        assert client.app.state.admission.num_running == 0
        assert 'ended_total{outcome="cancelled"} 1.0' in (await client.get("/metrics")).text


async def test_a_reader_that_reads_slowly_keeps_its_connection(serve: Connect, backend: FakeBackend) -> None:
    backend.script = backend.script[:-1] * 20
    backend.step_s = 0.001
    async with serve(client_timeout_s=1.0) as client:
        with stalled(client, post({**ASK, "max_tokens": 140, "ignore_eos": True})) as connection:
            connection.setblocking(False)
            loop, read = asyncio.get_running_loop(), b""
            async with asyncio.timeout(60):
                while b"[DONE]" not in read:
                    read += await loop.sock_recv(connection, 2048)
                    await asyncio.sleep(0.1)
    assert backend.num_cancelled == 0


async def test_the_kernel_looks_after_silent_connections(serve: Connect) -> None:
    async with serve(client_timeout_s=30.0) as client:
        await client.get("/v1/models")
        (protocol,) = client.server.server_state.connections
        accepted = protocol.transport.get_extra_info("socket")
        assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 30_000
        idle = accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)
        between = accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL)
        assert idle + 3 * between <= 30
        assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) <= 512 << 10

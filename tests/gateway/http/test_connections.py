"""Connections: heads bounded in bytes, lines and time, connections in number; innocents are answered meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import signal
import socket
import time

import pytest

from service.errors import InvalidRequest
from service.gateway.http.server import allow_open_files
from tests.gateway.conftest import Connect
from tests.gateway.fakes import FakeBackend
from tests.gateway.http.raw import (
    all_of,
    connection,
    error_of,
    head,
    measured_stall,
    reply_to,
    status,
    until,
)

pytestmark = pytest.mark.asyncio
MIB = 1 << 20
GET = head("/livez", method="GET")
LONG = "x" * 20_000
HEADS = {
    "one long header": head("/v1/generate", f"x: {LONG}"),
    "a header without end": b"GET / HTTP/1.1\r\nhost: a\r\nx: " + b"x" * (4 * MIB),
    "a header's name without end": b"GET / HTTP/1.1\r\n" + b"x" * (4 * MIB),
    "a URL without end": b"GET /" + b"x" * (4 * MIB),
    "many headers": head("/v1/generate", *[f"a{index}: b" for index in range(200)]),
    "tiny headers without end": b"GET / HTTP/1.1\r\n" + b"a:b\r\n" * 100_000,
    "empty lines": b"\r\n" * MIB,
    "folded lines": b"GET / HTTP/1.1\r\na: b\r\n" + b" c\r\n" * 100_000,
    "no HTTP at all": b"\x16\x03\x01" + b"\0" * 1000,
    "a method without end": b"G" * MIB,
}


@pytest.mark.parametrize("name", HEADS)
async def test_the_head_of_a_request_is_bounded(serve: Connect, name: str) -> None:
    async with serve(header_timeout_s=30) as client, measured_stall() as stall:
        start = time.process_time()
        reply = await reply_to(client, HEADS[name])
        assert time.process_time() - start < 5
        if reply:  # who is cut off while he still sends may not read it
            assert status(reply) in (400, 431) and error_of(reply)["type"] == "invalid_request_error"
        if len(HEADS[name]) < 30_000:
            assert status(reply) == (400 if name == "no HTTP at all" else 431)
        assert (await client.get("/livez")).status_code == 200
        assert stall.worst_s < 0.5


async def test_a_head_below_the_limits_is_answered(serve: Connect) -> None:
    async with serve() as client:
        headers = {f"x-{index}": "y" * 100 for index in range(90)}
        assert (await client.get("/livez", headers=headers)).status_code == 200


async def test_spaces_behind_a_header_are_no_part_of_it(serve: Connect) -> None:
    body = b'{"prompt": "hi", "max_tokens": 1}'
    lines = (f"content-length: {len(body)} \t", "connection: close ", "x-request-id: mine ")
    async with serve() as client:
        reply = await reply_to(client, head("/v1/generate", *lines) + body)
        assert status(reply) == 200 and b"gen-mine" in reply


@pytest.mark.parametrize("sent", [b"", b"\r\n", b"GET / HT"], ids=["silent", "an empty line", "half a head"])
async def test_who_does_not_ask_in_time_loses_his_connection(serve: Connect, sent: bytes) -> None:
    async with serve(header_timeout_s=0.5) as client:
        start = time.perf_counter()
        async with connection(client) as (reader, writer):
            writer.write(sent)
            reply = await all_of(reader)
        assert 0.4 < time.perf_counter() - start < 10
        assert not reply or status(reply) == 408


@pytest.mark.parametrize("kept", [False, True], ids=["a new connection", "a kept one"])
async def test_a_byte_now_and_then_does_not_keep_a_head_open(serve: Connect, kept: bool) -> None:
    async with serve(header_timeout_s=0.5, keep_alive_s=60) as client, contextlib.AsyncExitStack() as stack:
        start = time.perf_counter()
        reader, writer = await stack.enter_async_context(connection(client))
        if kept:
            writer.write(head("/v1/models", method="GET"))
            assert status(await reader.readuntil(b"}]}")) == 200
        reading = asyncio.create_task(all_of(reader))
        for byte in head("/v1/models", method="GET") * 9:
            if reading.done():
                break
            writer.write(bytes([byte]))
            await asyncio.sleep(0.1)
        assert status(await reading) == 408
        assert 0.4 < time.perf_counter() - start < 10


@pytest.mark.parametrize("kept", [False, True], ids=["a new connection", "a kept one"])
async def test_who_asked_while_the_process_stood_still_is_answered(serve: Connect, kept: bool) -> None:
    async with serve(header_timeout_s=0.5, keep_alive_s=0.5) as client, connection(client) as (reader, writer):
        connections = client.server.server_state.connections
        await until(lambda: len(connections) == 1)
        (protocol,) = connections
        if kept:
            writer.write(head("/v1/models", method="GET"))
            assert status(await reader.readuntil(b"}]}")) == 200
        protocol.transport.pause_reading()
        writer.write(head("/v1/models", method="GET"))
        asyncio.get_running_loop().call_soon(protocol.transport.resume_reading)
        time.sleep(2.0)  # the timers are due before the loop comes to what has arrived
        assert status(await reader.readuntil(b"}]}")) == 200


async def test_who_leaves_with_requests_in_line_cancels_the_one_that_runs(serve: Connect, backend: FakeBackend) -> None:
    backend.gate = asyncio.Event()
    async with serve() as client:
        async with connection(client) as (_, writer):
            writer.write((head("/v1/generate", length=15) + b'{"prompt":"Hi"}') * 2)
            await until(lambda: backend.num_running == 1)
        await until(lambda: backend.num_cancelled == 1)


async def test_an_idle_connection_is_kept_for_its_time_and_no_longer(serve: Connect) -> None:
    async with serve(keep_alive_s=1.0, header_timeout_s=10) as client, connection(client) as (reader, writer):
        for pause_s in (0.3, 0.0):
            start = time.perf_counter()
            writer.write(head("/v1/models", method="GET"))
            assert status(await reader.readuntil(b"}]}")) == 200
            await asyncio.sleep(pause_s)
        assert await all_of(reader) == b""
        assert 0.9 < time.perf_counter() - start < 10


async def test_connections_that_ask_nothing_make_way_and_busy_ones_are_counted(
    serve: Connect, backend: FakeBackend
) -> None:
    backend.gate = asyncio.Event()
    async with serve(max_connections=4, header_timeout_s=30) as client, contextlib.AsyncExitStack() as stack:
        silent = [await stack.enter_async_context(connection(client)) for _ in range(4)]
        silent[3][1].write(b"GET / HT")
        await asyncio.sleep(0.1)
        assert status(await reply_to(client, GET)) == 200
        assert await all_of(silent[0][0]) == b"", "the longest silent went"
        busy = [await stack.enter_async_context(connection(client)) for _ in range(4)]
        for _, writer in busy:
            writer.write(head("/v1/generate", length=15) + b'{"prompt":"Hi"}')
        await until(lambda: backend.num_running == 4)
        reply = await reply_to(client, GET)
        assert not reply or status(reply) == 503
        backend.gate.set()
        for reader, _ in busy:
            assert status(await reader.readuntil(b"}}")) == 200


async def test_half_open_connections_do_not_hold_up_innocent_requests(serve: Connect) -> None:
    body = {"prompt": "Hi"}
    async with serve(max_connections=600) as client, contextlib.AsyncExitStack() as stack:
        for index in range(500):
            _, writer = await stack.enter_async_context(connection(client))
            writer.write((b"", b"POST /v1/generate HTTP/1.1\r\nx: ", head(length=100))[index % 3])
        start = time.process_time()
        for _ in range(20):
            assert (await client.post("/v1/generate", json=body)).status_code == 200
        assert time.process_time() - start < 5


async def test_chunks_of_a_byte_are_refused_and_chunks_of_a_kilobyte_are_not(serve: Connect) -> None:
    lines = ("transfer-encoding: chunked", "connection: close")
    content = b'{"prompt": "Hi"}'
    async with serve() as client, measured_stall() as stall:
        small = b"".join(b"1\r\n%c\r\n" % byte for byte in content) + b"0\r\n\r\n"
        assert status(await reply_to(client, head("/v1/generate", *lines), small)) == 200
        assert status(await reply_to(client, head("/v1/generate", *lines), b"1\r\n \r\n" * 20_000)) == 400
        padded = b"400\r\n" + b" " * 1024 + b"\r\n"
        reply = await reply_to(client, head("/v1/generate", *lines), padded * 500 + small)
        assert status(reply) == 200
        for rest in (b"1;" + b"x" * 4 * MIB, b"0\r\n" + b"a:b\r\n" * 100_000, b"0\r\nx: " + b"x" * 4 * MIB):
            reply = await reply_to(client, head("/v1/generate", *lines), rest)
            assert not reply or status(reply) == 400
        start = time.process_time()
        await reply_to(client, head("/v1/generate", *lines), b"1\r\n \r\n" * (4 * MIB))
        assert time.process_time() - start < 5
    assert stall.worst_s < 0.5


async def test_trailers_do_not_become_headers(serve: Connect) -> None:
    lines = ("transfer-encoding: chunked", "connection: close")
    body = b'f\r\n{"prompt":"Hi"}\r\n0\r\n'
    async with serve() as client:
        reply = await reply_to(client, head("/v1/generate", *lines), body + b"x-request-id: mine\r\n\r\n")
        assert status(reply) == 200 and b"mine" not in reply


async def test_only_few_requests_wait_in_one_connection(serve: Connect, backend: FakeBackend) -> None:
    backend.gate = asyncio.Event()
    async with serve() as client:
        request = head("/v1/generate", length=15) + b'{"prompt":"Hi"}'
        assert await reply_to(client, request * 1000) == b""
        await asyncio.sleep(0.1)
        assert backend.num_running == 0 and client.app.state.admission.num_running == 0
        async with connection(client) as (reader, writer):
            writer.write(request * 3)
            await until(lambda: backend.num_running == 1)
            backend.gate.set()
            for _ in range(3):
                assert status(await reader.readuntil(b"}}")) == 200


async def test_who_does_not_take_his_replies_loses_his_connection_before_they_pile_up(serve: Connect) -> None:
    """Whole replies, too: here many times the documentation, asked for and never read."""
    async with serve(client_timeout_s=0.5, keep_alive_s=60) as client:
        host, port = client.base_url.host, client.base_url.port
        with socket.socket() as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.setblocking(False)
            await asyncio.get_running_loop().sock_connect(deaf, (host, port))
            connections = client.server.server_state.connections
            await until(lambda: len(connections) == 1)
            (protocol,) = connections
            request = head("/openapi.json", method="GET")
            deadline = time.monotonic() + 20
            num_sent = most_bytes = 0
            while connections and time.monotonic() < deadline:
                if client.server.server_state.total_requests == num_sent:
                    num_sent += 1
                    with contextlib.suppress(BlockingIOError, ConnectionError):
                        deaf.send(request)
                most_bytes = max(most_bytes, protocol.transport.get_write_buffer_size())
                await asyncio.sleep(0.001)
            assert not connections
            assert 64 << 10 < most_bytes < 200_000


async def test_upgrades_are_not_made(serve: Connect) -> None:
    lines = ("connection: upgrade", "upgrade: websocket", "sec-websocket-version: 13", "sec-websocket-key: eA==")
    async with serve(header_timeout_s=0.5, keep_alive_s=0.5) as client:
        reply = await reply_to(client, head("/v1/models", *lines, method="GET"))
        assert status(reply) == 200


UPGRADE = ("connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "http2-settings: AAMAAABkAAQCAAAAAAIAAAAA")


async def test_a_request_that_would_rather_speak_http2_keeps_its_body_and_its_connection(serve: Connect) -> None:
    body = b'{"prompt": "hi", "max_tokens": 1}'
    asking = head("/v1/generate", *UPGRADE, length=len(body))
    last = head("/v1/models", "connection: close", method="GET")
    async with serve() as client:
        for pieces in ((asking + body + last,), (asking, body + last)):
            reply = await reply_to(client, *pieces, pause_s=0.05)
            assert reply.count(b"HTTP/1.1 200 OK") == 2 and b"gen-" in reply and b'"list"' in reply


async def test_a_body_is_never_taken_for_another_request(serve: Connect) -> None:
    hidden = head("/v1/models", "connection: close", method="GET")
    asking = head("/v1/generate", *UPGRADE, length=len(hidden))
    async with serve() as client:
        for pieces in ((asking[:40], asking[40:] + hidden), (asking[:40], asking[40:], hidden)):
            reply = await reply_to(client, *pieces, pause_s=0.05)
            assert reply.count(b"HTTP/1.1") == 1 and status(reply) == 400 and "Upgrade" in error_of(reply)["message"]


async def test_while_draining_every_reply_ends_its_connection(serve: Connect, backend: FakeBackend) -> None:
    backend.gate = asyncio.Event()
    async with serve() as client:
        asked = await client.get("/v1/models")
        assert "connection" not in asked.headers
        async with client.stream("POST", "/v1/generate", json={"prompt": "Hi", "stream": True}):
            running = [
                asyncio.create_task(client.post("/v1/generate", json={"prompt": "Hi", "stream": stream}))
                for stream in (True, False)
            ]
            await until(lambda: backend.num_running == 3)
            client.server.handle_exit(signal.SIGTERM, None)
            for refused in (
                await client.get("/v1/models"),
                await client.post("/v1/generate", json={"prompt": "Hi"}),
                await client.post("/v1/generate", content=b"{"),
                await client.get("/nowhere"),
            ):
                assert refused.headers["connection"] == "close"
            backend.gate.set()
            replies = [await each for each in running]
            assert replies[1].headers["connection"] == "close"


async def test_open_files_are_allowed_for_every_connection_or_the_operator_is_told() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        allow_open_files(300)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 300
        with pytest.raises(InvalidRequest, match="CROSSGATE_MAX_CONNECTIONS needs"):
            allow_open_files(hard + 1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

"""What only a real server shows: streaming as it happens, clients that leave, draining."""

from __future__ import annotations

import asyncio
import signal

import httpx
import pytest

from tests.gateway.conftest import REPLY, Connect
from tests.gateway.fakes import FakeBackend
from tests.gateway.http.raw import PATIENCE_S, until
from tests.gateway.picture_files import RED

pytestmark = pytest.mark.asyncio


async def test_the_first_piece_comes_before_the_last_is_made(serve: Connect, backend: FakeBackend) -> None:
    backend.gate = asyncio.Event()
    async with (
        serve() as client,
        client.stream("POST", "/v1/generate", json={"prompt": "Hi", "stream": True}) as reply,
    ):
        lines = reply.aiter_lines()
        assert '"text":"' in await anext(lines)
        assert reply.headers["cache-control"] == "no-cache"
        backend.gate.set()
        assert [line async for line in lines if line][-1] == "data: [DONE]"


async def test_client_disconnect_cancels_decoder(serve: Connect, backend: FakeBackend) -> None:
    backend.gate = asyncio.Event()
    async with serve() as client:
        async with client.stream("POST", "/v1/generate", json={"prompt": "Hi", "stream": True}) as reply:
            await anext(reply.aiter_lines())
            assert backend.num_running == 1
        await until(lambda: backend.num_cancelled == 1)
        await until(lambda: client.app.state.admission.num_running == 0)
        metrics = (await client.get("/metrics")).text
    assert 'crossgate_requests_ended_total{outcome="cancelled"} 1.0' in metrics


async def test_disconnect_of_an_unstreamed_request_cancels_decoder(serve: Connect, backend: FakeBackend) -> None:
    backend.gate = asyncio.Event()
    async with serve() as client:
        asking = asyncio.create_task(client.post("/v1/generate", json={"prompt": "Hi"}))
        await until(lambda: backend.num_running == 1)
        asking.cancel()
        await until(lambda: backend.num_cancelled == 1)


async def test_disconnect_while_waiting_frees_the_place_in_the_queue(serve: Connect, backend: FakeBackend) -> None:
    backend.gate = asyncio.Event()
    async with serve(max_concurrent_requests=1) as client:
        body = {"prompt": "Hi", "stream": True}
        async with client.stream("POST", "/v1/generate", json=body):
            admission = client.app.state.admission
            waiting = asyncio.create_task(client.post("/v1/generate", json=body))
            await until(lambda: admission.num_waiting == 1)
            waiting.cancel()
            await until(lambda: admission.num_waiting == 0)
            assert admission.num_running == 1
        await until(lambda: admission.num_running == 0)
    assert len(backend.requests) == 1


async def test_disconnect_while_encoding_cancels_the_encoder(serve: Connect, backend: FakeBackend) -> None:
    backend.encode_gate = asyncio.Event()
    async with serve() as client:
        asking = asyncio.create_task(client.post("/v1/generate", json={"prompt": "Hi", "images": [RED]}))
        await until(lambda: backend.num_encoded == 1)
        asking.cancel()
        await until(lambda: client.app.state.admission.num_running == 0)
    assert not backend.requests


async def test_a_signal_drains_running_streams_and_refuses_new_ones(serve: Connect, backend: FakeBackend) -> None:
    backend.gate = asyncio.Event()
    async with serve() as client:
        async with client.stream("POST", "/v1/generate", json={"prompt": "Hi", "stream": True}) as reply:
            lines = reply.aiter_lines()
            await anext(lines)
            client.server.handle_exit(signal.SIGTERM, None)
            assert (await client.get("/readyz")).status_code == 503
            assert (await client.get("/livez")).status_code == 200
            refused = await client.post("/v1/generate", json={"prompt": "Hi"})
            assert refused.status_code == 503 and refused.headers["retry-after"]
            backend.gate.set()
            assert [line async for line in lines if line][-1] == "data: [DONE]"
        await until(lambda: client.server.should_exit or not client.server.servers[0].is_serving())
        with pytest.raises(httpx.TransportError):
            async with asyncio.timeout(PATIENCE_S):
                while True:
                    await client.get("/livez", headers={"connection": "close"})
    assert backend.num_cancelled == 0


async def test_who_is_cut_off_at_the_end_of_the_drain_timeout_is_told_so(serve: Connect, backend: FakeBackend) -> None:
    backend.gate = asyncio.Event()
    async with serve(drain_timeout_s=0.2, max_concurrent_requests=2) as client:

        async def ask(stream: bool) -> httpx.Response:
            return await client.post("/v1/generate", json={"prompt": "Hi", "stream": stream})

        asked = [asyncio.create_task(ask(stream)) for stream in (True, False, True, False)]  # the last two wait
        await until(lambda: client.app.state.admission.num_waiting == 2 and backend.num_running == 2)
        client.server.handle_exit(signal.SIGTERM, None)
        streamed, *others = await asyncio.gather(*asked)
        *_, event, data = filter(None, streamed.text.splitlines())
        assert event == "event: error" and "shutting down" in data
        for reply in others:
            assert reply.status_code == 503 and "retry-after" in reply.headers
            assert reply.json()["error"]["code"] == "unavailable"
        await until(lambda: backend.num_cancelled == 2)


async def test_many_streams_at_once_each_get_their_own_answer(serve: Connect, backend: FakeBackend) -> None:
    async with serve(max_concurrent_requests=8) as client:
        body = {"prompt": "Hi", "images": [RED], "stream": True}
        replies = await asyncio.gather(*(client.post("/v1/generate", json=body) for _ in range(24)))
        assert all(reply.text.endswith("data: [DONE]\n\n") for reply in replies)
        whole = await client.post("/v1/generate", json={"prompt": "Hi", "images": [RED]})
    assert whole.json()["text"] == REPLY
    assert backend.num_encoded == 1
    assert len({reply.headers["x-request-id"] for reply in replies}) == 24

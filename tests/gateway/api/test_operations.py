"""Keys, probes, metrics, request ids, documentation."""

from __future__ import annotations

import asyncio
import json
import logging

import pytest

from service.gateway.telemetry.logs import JsonFormatter, request_id
from tests.gateway.conftest import Connect
from tests.gateway.fakes import FakeBackend
from tests.gateway.picture_files import RED, TRUNCATED_JPEG

pytestmark = pytest.mark.asyncio


async def test_a_key_is_needed_where_keys_are_set(connect: Connect) -> None:
    async with connect(api_keys="one,two") as client:
        for headers in ({}, {"authorization": "Bearer three"}, {"authorization": "Basic one"}):
            reply = await client.post("/v1/generate", json={"prompt": "Hi"}, headers=headers)
            assert reply.status_code == 401
            assert reply.json()["error"]["type"] == "authentication_error"
            assert reply.headers["www-authenticate"] == "Bearer"
        reply = await client.post("/v1/generate", json={"prompt": "Hi"}, headers={"authorization": "Bearer two"})
        assert reply.status_code == 200
        assert (await client.get("/v1/models")).status_code == 401
        assert (await client.get("/livez")).status_code == 200
        assert (await client.get("/metrics")).status_code == 200


async def test_ready_follows_the_backend(connect: Connect, backend: FakeBackend) -> None:
    async with connect(heartbeat_period_s=0.01) as client:
        assert (await client.get("/readyz")).status_code == 200
        backend.is_ready = False
        async with asyncio.timeout(20):
            while (reply := await client.get("/readyz")).status_code == 200:
                await asyncio.sleep(0.01)
        assert reply.status_code == 503 and reply.json()["error"]["code"] == "unavailable"
        assert reply.headers["connection"] == "close"
        assert (await client.get("/livez")).status_code == 200
    assert backend.closed


async def test_probes_cost_the_models_nothing(connect: Connect, backend: FakeBackend) -> None:
    async with connect(heartbeat_period_s=60) as client:
        replies = await asyncio.gather(*(client.get("/readyz") for _ in range(500)))
        assert {reply.status_code for reply in replies} == {200}
    assert backend.num_beats == 1


async def test_a_full_queue_is_429_with_retry_after(connect: Connect, backend: FakeBackend) -> None:
    backend.gate = asyncio.Event()
    async with connect(max_concurrent_requests=1, max_queue=1) as client:
        asked = [asyncio.create_task(client.post("/v1/generate", json={"prompt": "Hi"})) for _ in range(2)]
        admission = client.app.state.admission
        while not (admission.num_running and admission.num_waiting):
            await asyncio.sleep(0)
        for stream in (False, True):
            reply = await client.post("/v1/generate", json={"prompt": "Hi", "stream": stream})
            assert reply.status_code == 429 and reply.headers["retry-after"]
            assert reply.json()["error"]["type"] == "rate_limit_error"
        backend.gate.set()
        assert [reply.status_code for reply in await asyncio.gather(*asked)] == [200, 200]


async def test_metrics_count_what_happened(connect: Connect, backend: FakeBackend) -> None:
    body = {"prompt": "Hi", "images": [RED]}
    async with connect() as client:
        await client.post("/v1/generate", json=body)
        await client.post("/v1/generate", json={**body, "stream": True})
        await client.post("/v1/generate", json={**body, "max_tokens": 2})
        await client.post("/v1/generate", json={"prompt": "Hi", "images": [TRUNCATED_JPEG]})
        await client.post("/v1/generate", json={"prompt": 5})
        text = (await client.get("/metrics")).text
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    num_tokens = 2 * len(backend.script) + 2
    assert lines['crossgate_request_success_total{finished_reason="stop"}'] == "2.0"
    assert lines['crossgate_request_success_total{finished_reason="length"}'] == "1.0"
    assert lines['crossgate_requests_ended_total{outcome="finished"}'] == "3.0"
    assert lines['crossgate_requests_ended_total{outcome="refused"}'] == "1.0"
    assert lines['crossgate_requests_ended_total{outcome="failed"}'] == "0.0"
    assert lines['crossgate_requests_ended_total{outcome="cancelled"}'] == "0.0"
    assert lines['crossgate_request_failure_total{code="invalid_request"}'] == "2.0"
    assert lines["crossgate_generation_tokens_total"] == f"{num_tokens}.0"
    assert lines["crossgate_image_cache_queries_total"] == "3.0"
    assert lines["crossgate_image_cache_hits_total"] == "2.0"
    assert lines["crossgate_time_to_first_token_seconds_count"] == "3.0"
    assert lines["crossgate_e2e_request_latency_seconds_count"] == "3.0"
    assert lines["crossgate_encode_seconds_count"] == "1.0"
    assert lines["crossgate_num_requests_running"] == "0.0"
    assert lines['crossgate_http_requests_total{route="/v1/generate",status="200"}'] == "3.0"
    assert lines['crossgate_http_requests_total{route="/v1/generate",status="400"}'] == "2.0"


async def test_a_request_id_is_kept_if_it_is_harmless(connect: Connect) -> None:
    async with connect() as client:
        reply = await client.get("/livez", headers={"x-request-id": "abc-1"})
        assert reply.headers["x-request-id"] == "abc-1"
        reply = await client.get("/livez", headers={"x-request-id": 'a"\\b' * 99})
        assert len(reply.headers["x-request-id"]) == 32


async def test_logs_are_json_with_the_request_id() -> None:
    record = logging.LogRecord("a", logging.INFO, "f", 1, "said %s", ("hi",), None)
    record.fields = {"ms": 5}
    token = request_id.set("abc")
    entry = json.loads(JsonFormatter().format(record))
    request_id.reset(token)
    assert (entry["message"], entry["request_id"], entry["ms"]) == ("said hi", "abc", 5)


async def test_the_documentation_describes_both_bodies(connect: Connect) -> None:
    async with connect() as client:
        assert (await client.get("/docs")).status_code == 200
        document = (await client.get("/openapi.json")).json()
    schemas = document["components"]["schemas"]
    assert "prompt" in schemas["GenerateBody"]["properties"]
    assert "messages" in schemas["ChatBody"]["properties"]
    content = document["paths"]["/v1/generate"]["post"]["requestBody"]["content"]
    assert set(content) == {"application/json", "multipart/form-data"}

"""One trace from the HTTP request to both stages' calls, over real gRPC."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import httpx
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from tritonclient.grpc import service_pb2_grpc

from service.errors import InvalidRequest, Unavailable
from service.gateway.app import create_app
from service.gateway.settings import Settings
from service.gateway.stages.triton import TritonBackend
from service.gateway.telemetry.logs import JsonFormatter, request_id
from service.gateway.telemetry.tracing import Tracing, configure_tracing
from tests.gateway.picture_files import data_url, encoded
from tests.gateway.triton_server import FakeTriton

pytestmark = pytest.mark.asyncio
CALLER = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@asynccontextmanager
async def traced(family, tokenizer, backend, exporter) -> AsyncIterator[tuple[httpx.AsyncClient, FakeTriton]]:
    """The app over a real channel to a Triton that is not real."""
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    fake = FakeTriton(backend, family.config_identity)
    server = grpc.aio.server()
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(fake, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    tracing = Tracing(provider)
    client = TritonBackend(
        f"127.0.0.1:{port}",
        config=family.config_identity,
        vision=family.vision,
        probe_token=5,
        heartbeat_timeout_s=20.0,
        tracing=tracing,
    )
    settings = Settings(model_path=family.folder, model_name="tiny", restart_wait_s=1.0)
    app = create_app(settings, family, tokenizer, client, tracing)
    transport = httpx.ASGITransport(app)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://it") as http:
        yield http, fake
    await server.stop(None)


def question(stream: bool) -> dict:
    return {"prompt": "<image>What?", "images": [data_url(encoded())], "stream": stream, "max_tokens": 64}


@pytest.mark.parametrize("stream", [False, True])
async def test_request_admission_and_both_stages_are_one_trace(family, tokenizer, backend, exporter, stream) -> None:
    async with traced(family, tokenizer, backend, exporter) as (http, fake):
        headers = {"traceparent": CALLER, "x-request-id": "abc-1"}
        reply = await http.post("/v1/generate", json=question(stream), headers=headers)
        assert reply.status_code == 200
        assert [each for each in fake.ids if each] == [
            "abc-1",
            "abc-1",
        ]  # both stages know the request; heartbeats have no id
    spans = {span.name: span for span in exporter.get_finished_spans()}
    assert spans.keys() == {"POST /v1/generate", "admission", "encode", "generate"}
    root = spans["POST /v1/generate"]
    assert format(root.context.trace_id, "032x") == CALLER.split("-")[1]
    assert format(root.parent.span_id, "016x") == CALLER.split("-")[2]
    assert root.attributes["http.response.status_code"] == 200
    for name in ("admission", "encode", "generate"):
        assert spans[name].context.trace_id == root.context.trace_id
        assert spans[name].parent.span_id == root.context.span_id
        assert root.start_time <= spans[name].start_time
    assert spans["generate"].attributes == {"pictures": 1, "latents": 1}
    assert spans["encode"].end_time <= spans["generate"].start_time
    _, trace_id, span_id, _ = fake.metadata[-1]["traceparent"].split("-")
    assert (int(trace_id, 16), int(span_id, 16)) == (root.context.trace_id, spans["generate"].context.span_id)


async def test_failure_of_a_stage_is_named_by_its_code(family, tokenizer, backend, exporter) -> None:
    async with traced(family, tokenizer, backend, exporter) as (http, fake):
        fake.ends_with = grpc.StatusCode.UNAVAILABLE
        reply = await http.post("/v1/generate", json={"prompt": "no picture"})
        assert reply.status_code == 503
    spans = exporter.get_finished_spans()
    assert {span.status.description for span in spans if span.name == "generate"} == {Unavailable.code}
    assert not any(span.events for span in spans)  # no library's exception text


async def test_probes_and_metrics_leave_no_trace(family, tokenizer, backend, exporter) -> None:
    async with traced(family, tokenizer, backend, exporter) as (http, fake):
        for path in ("/livez", "/readyz", "/metrics"):
            assert (await http.get(path)).status_code == 200
        assert fake.num_infer == 1  # the heartbeat
    assert exporter.get_finished_spans() == ()


async def test_log_lines_name_their_trace(exporter) -> None:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    record = logging.LogRecord("test", logging.INFO, __file__, 1, "hello", (), None)
    token = request_id.set("abc")
    try:
        with Tracing(provider).request("GET", {"traceparent": CALLER}):
            line = json.loads(JsonFormatter().format(record))
        assert (line["request_id"], line["trace_id"]) == ("abc", CALLER.split("-")[1])
        assert "trace_id" not in json.loads(JsonFormatter().format(record))
    finally:
        request_id.reset(token)


async def test_nothing_is_traced_unless_an_endpoint_is_set() -> None:
    tracing, end = configure_tracing({})
    with tracing.request("GET", {}) as span, tracing.call("encode") as metadata:
        assert not span.is_recording()
        assert metadata == ()
    end()


async def test_endpoint_turns_tracing_on() -> None:
    tracing, end = configure_tracing({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"})
    with tracing.request("GET", {"traceparent": CALLER.replace("-01", "-00")}), tracing.call("encode") as metadata:
        assert re.fullmatch(r"00-4bf92f3577b34da6a3ce929d0e0e4736-[0-9a-f]{16}-00", dict(metadata)["traceparent"])
    end()


async def test_missing_sdk_is_one_clear_line(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(InvalidRequest, match="the extra `otel` is not installed"):
        configure_tracing({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"})

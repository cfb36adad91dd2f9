"""One trace from the gateway through the real Triton, as a collector receives it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from service.launch.settings import ROOT, free_ports
from service.launch.triton import TritonPorts, link_backends, triton_command, triton_environment
from tests.checkpoints import make_idefics
from tests.e2e.running import picture, question


@dataclass(frozen=True)
class Received:
    name: str
    trace_id: str
    span_id: str
    parent_id: str


@pytest.mark.e2e
def test_triton_s_spans_hang_below_the_gateway_s(tmp_path):
    checkpoint = make_idefics(tmp_path / "tiny", max_position_embeddings=4096)
    with collector() as (endpoint, received), service(checkpoint, endpoint, tmp_path) as url:
        reply = httpx.post(f"{url}/v1/generate", json=question(picture(1), stream=True), timeout=60)
        assert reply.text.endswith("data: [DONE]\n\n")
        deadline = time.monotonic() + 30  # Triton sends its spans every 5 s
        while len(received) < 10 and time.monotonic() < deadline:
            time.sleep(0.2)
    spans = {span.span_id: span for span in received}
    assert len({span.trace_id for span in received}) == 1

    def line(span: Received | None) -> list[str]:
        """Names from the root down to a span."""
        return [] if span is None else [*line(spans.get(span.parent_id)), span.name]

    lines = sorted(line(span) for span in received if span.name in ("admission", "compute"))
    assert lines == [
        ["POST /v1/generate", "admission"],
        ["POST /v1/generate", "encode", "InferRequest", "vision_encoder", "compute"],
        ["POST /v1/generate", "generate", "InferRequest", "fused_decoder", "compute"],
    ]


@contextmanager
def collector() -> Iterator[tuple[str, list[Received]]]:
    """OTLP over HTTP: protobuf, as the gateway sends it, and JSON, as Triton does."""
    received: list[Received] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            received.extend(read_json(body) if "json" in self.headers["content-type"] else read_protobuf(body))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", received
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def read_json(body: bytes) -> list[Received]:
    scopes = [scope for resource in json.loads(body)["resourceSpans"] for scope in resource["scopeSpans"]]
    spans = [span for scope in scopes for span in scope["spans"]]
    return [Received(span["name"], span["traceId"], span["spanId"], span.get("parentSpanId", "")) for span in spans]


def read_protobuf(body: bytes) -> list[Received]:
    message = ExportTraceServiceRequest.FromString(body)
    scopes = [scope for resource in message.resource_spans for scope in resource.scope_spans]
    spans = [span for scope in scopes for span in scope.spans]
    return [Received(span.name, span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex()) for span in spans]


@contextmanager
def service(checkpoint: Path, endpoint: str, folder: Path) -> Iterator[str]:
    """Triton with the trace settings of docs/observe.md, and a gateway. Its base URL once both models answer."""
    grpc, http, metrics, port = free_ports(4)
    environment = triton_environment(checkpoint, "cpu", 1)
    settings = [
        "mode=opentelemetry",
        "rate=0",
        "count=-1",
        "level=TIMESTAMPS",
        f"opentelemetry,url={endpoint}/v1/traces",
    ]
    triton = [
        *triton_command(TritonPorts(grpc, http, metrics), link_backends(environment)),
        *(f"--trace-config={setting}" for setting in settings),
    ]
    gateway_environment = {
        **os.environ,
        "MODEL_PATH": str(checkpoint),
        "PORT": str(port),
        "TRITON_URL": f"127.0.0.1:{grpc}",
        "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
        "OTEL_BSP_SCHEDULE_DELAY": "200",
    }
    with (folder / "log").open("w") as log:
        processes = [
            subprocess.Popen(triton, env=environment, cwd=ROOT, stdout=log, stderr=log),
            subprocess.Popen([sys.executable, "-m", "service.gateway"], env=gateway_environment, cwd=ROOT, stderr=log),
        ]
        url = f"http://127.0.0.1:{port}"
        try:
            wait_until_ready(url, processes)
            yield url
        finally:
            for process in reversed(processes):
                process.terminate()
                process.wait(30)


def wait_until_ready(url: str, processes: list[subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert all(process.poll() is None for process in processes), "a process ended"
        try:
            if httpx.get(f"{url}/readyz", timeout=10).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    raise AssertionError("the service was not ready in time")

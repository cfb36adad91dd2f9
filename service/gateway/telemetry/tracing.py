"""OpenTelemetry, opt-in: a span for each HTTP request, and below it `admission`, `encode` and `generate`.

Off, and then next to nothing, unless OTEL_EXPORTER_OTLP_ENDPOINT is set (extra `otel`). The SDK's other variables
hold too. Triton continues the trace from the `traceparent` that the calls of both stages carry.

Only the request's span is made current. A generator may be resumed in another task, and a context can only be left
where it was entered; so spans inside generators are children of the request's that nothing else hangs below.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, TracerProvider
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from service.errors import CrossgateError, InvalidRequest

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
_W3C = TraceContextTextMapPropagator()


class Tracing:
    """`provider` None: nothing is traced."""

    def __init__(self, provider: TracerProvider | None = None) -> None:
        self._tracer = (provider or trace.NoOpTracerProvider()).get_tracer("crossgate.gateway")

    @contextmanager
    def request(self, method: str, headers: Mapping[str, str]) -> Iterator[Span]:
        """The span of an HTTP request, a child of the caller's if it sent one; current inside the block."""
        caller = _W3C.extract(dict(headers))
        with self._tracer.start_as_current_span(method, caller, SpanKind.SERVER, record_exception=False) as span:
            yield span

    @contextmanager
    def call(self, name: str, **attributes: str | int) -> Iterator[tuple[tuple[str, str], ...]]:
        """The span of a call to a stage; yields the metadata from which the stage continues the trace.

        Outside a traced request there is none: probes are nobody's request.
        """
        if not trace.get_current_span().get_span_context().is_valid:
            yield ()
            return
        span = self._tracer.start_span(name, kind=SpanKind.CLIENT, attributes=attributes)
        carrier: dict[str, str] = {}
        _W3C.inject(carrier, trace.set_span_in_context(span))
        try:
            yield tuple(carrier.items())
        except CrossgateError as error:
            span.set_status(Status(StatusCode.ERROR, error.code))
            raise
        finally:
            span.end()

    def passed(self, name: str, seconds: float) -> None:
        """A span that ends now and has taken so long."""
        end_ns = time.time_ns()
        self._tracer.start_span(name, start_time=end_ns - int(seconds * 1e9)).end(end_ns)


def current_trace_id() -> str | None:
    """Of the request in whose course this is called, 32 hex digits."""
    context = trace.get_current_span().get_span_context()
    return format(context.trace_id, "032x") if context.is_valid else None


def configure_tracing(environment: Mapping[str, str]) -> tuple[Tracing, Callable[[], None]]:
    """As the environment says, and what to call at the end, so that the last spans are sent.

    Raises InvalidRequest, in one line for an operator, if traces are asked for and the SDK is not installed.
    """
    if not environment.get(ENDPOINT):
        return Tracing(), lambda: None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider as SDKTracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise InvalidRequest(f"{ENDPOINT} is set, but the extra `otel` is not installed.", param=ENDPOINT) from error
    name = environment.get("OTEL_SERVICE_NAME") or "crossgate-gateway"
    provider = SDKTracerProvider(resource=Resource.create({"service.name": name}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Tracing(provider), provider.shutdown

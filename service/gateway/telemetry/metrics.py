"""The gateway's Prometheus metrics, in a registry of their own. Names follow vLLM's where one exists.

The decoder's and the encoder's own gauges come from Triton's /metrics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from service.contract import Usage
from service.gateway.admission import Admission, Outcome

_LATENCY = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)
_BETWEEN_TOKENS = (0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """`with_keys`: how requests end, run and wait is also told by the caller's name, in a label `key`."""

    def __init__(self, registry: CollectorRegistry, *, with_keys: bool = False) -> None:
        self.registry = registry
        self._with_keys = with_keys

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"crossgate_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"crossgate_{name}", text, buckets=buckets, registry=registry)

        self.time_to_first_token = histogram("time_to_first_token_seconds", "Arrival to first token.", _LATENCY)
        self.inter_token_latency = histogram("inter_token_latency_seconds", "Between tokens.", _BETWEEN_TOKENS)
        self.e2e_latency = histogram("e2e_request_latency_seconds", "Arrival to last token.", _LATENCY)
        self.encode = histogram("encode_seconds", "One picture through the vision encoder, as we see it.", _LATENCY)
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of finished requests.")
        self.generation_tokens = counter("generation_tokens", "Tokens received from the decoder.")
        self.image_queries = counter("image_cache_queries", "Distinct pictures of finished requests.")
        self.image_hits = counter("image_cache_hits", "Those whose K/V the decoder had already.")
        by_key = ("key",) if with_keys else ()
        self._ended = counter("requests_ended", "Admitted requests by how they ended.", "outcome", *by_key)
        self.success = counter("request_success", "Finished requests by reason.", "finished_reason")
        self.failure = counter("request_failure", "Requests answered with an error, by its code.", "code")
        self.http_requests = counter("http_requests", "HTTP replies.", "route", "status")
        self._keys: dict[str | None, None] = {}
        if not with_keys:
            self.know((None,))

    def know(self, keys: Iterable[str | None]) -> None:
        """Show these from now on, each count from 0. Only names that an operator gave: there are few."""
        self._keys |= dict.fromkeys(keys)
        for key in self._keys:
            for outcome in Outcome:
                self._ended.labels(outcome, *self._label(key))

    def watch(self, admission: Admission) -> None:
        """Show how many run and wait, read when somebody looks."""
        self.registry.register(_Places(admission, self._keys, self._label))

    def count_end(self, key: str | None, outcome: Outcome) -> None:
        self._ended.labels(outcome, *self._label(key)).inc()

    def _label(self, key: str | None) -> tuple[str, ...]:
        return (str(key),) if self._with_keys else ()

    def finished(self, reason: str, usage: Usage, num_images: int, latency_s: float) -> None:
        self.success.labels(reason).inc()
        self.e2e_latency.observe(latency_s)
        self.prompt_tokens.inc(usage.prompt_tokens)
        self.image_queries.inc(num_images)
        self.image_hits.inc(usage.cached_images)


class _Places(Collector):
    def __init__(
        self, admission: Admission, keys: Mapping[str | None, None], label: Callable[[str | None], tuple[str, ...]]
    ) -> None:
        self._admission = admission
        self._keys = keys
        self._label = label

    def collect(self) -> Iterator[GaugeMetricFamily]:
        for name, text, count in (
            ("running", "Admitted requests.", self._admission.running_of),
            ("waiting", "Requests that wait.", self._admission.waiting_of),
        ):
            gauge = GaugeMetricFamily(f"crossgate_num_requests_{name}", text, labels=self._label("key"))
            for key in self._keys:
                gauge.add_metric(self._label(key), count(key))
            yield gauge

"""The engine's counts in Triton's /metrics."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import triton_python_backend_utils as pb_utils

PUBLISH_PERIOD_S = 0.05  # a value costs a call into Triton; the last step of a busy time is published always
GAUGES: dict[str, tuple[str, Callable[[Any], float]]] = {
    "decoder_num_requests_running": ("Sequences in the batch", lambda stats: stats.num_running),
    "decoder_num_requests_waiting": ("Sequences not yet scheduled", lambda stats: stats.num_waiting),
    "kv_cache_usage_ratio": ("Self-K/V blocks in use", lambda stats: stats.kv_blocks_used / stats.kv_blocks_total),
    "image_kv_cache_bytes": ("Cross-K/V of resident pictures", lambda stats: stats.image_kv_bytes),
}
COUNTERS: dict[str, tuple[str, Callable[[Any], float]]] = {
    "image_kv_cache_queries_total": ("Pictures looked up", lambda stats: stats.image_queries),
    "image_kv_cache_hits_total": ("Pictures found resident", lambda stats: stats.image_hits),
    "prefix_cache_queries_total": ("Prompt tokens looked up", lambda stats: stats.prefix_queries),
    "prefix_cache_hits_total": ("Prompt tokens found cached", lambda stats: stats.prefix_hits),
    "num_preemptions_total": ("Sequences put back to be recomputed", lambda stats: stats.num_preemptions),
    "decoder_steps_total": ("Steps of the engine", lambda stats: stats.steps),
}


class DecoderMetrics:
    def __init__(self) -> None:
        kinds = [(pb_utils.MetricFamily.GAUGE, GAUGES), (pb_utils.MetricFamily.COUNTER, COUNTERS)]
        self._families = {  # kept: a family that nobody holds takes its metrics along
            name: pb_utils.MetricFamily(name=f"crossgate_{name}", description=description, kind=kind)
            for kind, described in kinds
            for name, (description, _) in described.items()
        }
        self._metrics = {name: family.Metric(labels={}) for name, family in self._families.items()}
        self._published = dict.fromkeys(self._metrics, 0.0)
        self._published_at_s = 0.0

    def publish(self, stats: Any) -> None:
        """The engine's loop has this called after steps and when it falls idle; `stats` is its EngineStats."""
        now_s = time.monotonic()
        if stats.num_running + stats.num_waiting > 0 and now_s - self._published_at_s < PUBLISH_PERIOD_S:
            return
        self._published_at_s = now_s
        try:
            self._publish(stats)
        except Exception as error:  # the engine's thread calls: a metric is not worth its life
            pb_utils.Logger.log_error(f"fused_decoder: metrics were not published: {error!r}")

    def _publish(self, stats: Any) -> None:
        for name, (_, value_of) in (GAUGES | COUNTERS).items():
            value, before = float(value_of(stats)), self._published[name]
            if value != before:
                if name in GAUGES:
                    self._metrics[name].set(value)
                else:
                    self._metrics[name].increment(value - before)
                self._published[name] = value

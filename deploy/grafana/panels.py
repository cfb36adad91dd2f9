"""What stands on the dashboard: rows of panels, as plain data. `dashboard` makes Grafana's JSON of it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

RATE = "[$__rate_interval]"
FAILED = '{outcome="failed"}'
NOT_REFUSED = '{outcome!="refused"}'
ENCODER = '{model="vision_encoder"}'


class Kind(StrEnum):
    STAT = "stat"
    LINES = "lines"
    STACKED = "stacked"


@dataclass(frozen=True)
class Query:
    """`legend`: Grafana's, with {{label}}; of a stat none."""

    expr: str
    legend: str = ""


@dataclass(frozen=True)
class Panel:
    """`width` of 24 columns. `limits`: (from, colour) steps of a stat on green ground. `top`: the axis ends there."""

    title: str
    queries: tuple[Query, ...]
    unit: str = "short"
    description: str = ""
    kind: Kind = Kind.LINES
    width: int = 8
    limits: tuple[tuple[float, str], ...] = ()
    top: float | None = None


@dataclass(frozen=True)
class Row:
    """`gpu`: its metrics come from dcgm-exporter, which runs only where there is a GPU."""

    title: str
    panels: tuple[Panel, ...]
    gpu: bool = False


def quantiles(metric: str) -> tuple[Query, ...]:
    return tuple(
        Query(f"histogram_quantile({q}, sum by (le) (rate({metric}_bucket{RATE})))", f"p{round(q * 100)}")
        for q in (0.5, 0.95, 0.99)
    )


def rate(metric: str, by: str = "", labels: str = "") -> str:
    grouped = f"sum by ({by}) " if by else "sum "
    return f"{grouped}(rate({metric}{labels}{RATE}))"


def stat(title: str, expr: str, unit: str, *limits: tuple[float, str]) -> Panel:
    return Panel(title, (Query(expr),), unit, kind=Kind.STAT, width=4, limits=limits)


ROWS = (
    Row(
        "At a glance",
        (
            stat("Requests finished", rate("crossgate_request_success_total"), "reqps"),
            stat(
                "Failed, of those admitted",
                f"{rate('crossgate_requests_ended_total', labels=FAILED)}"
                f" / ({rate('crossgate_requests_ended_total', labels=NOT_REFUSED)} > 0) or vector(0)",
                "percentunit",
                (0.001, "orange"),
                (0.01, "red"),
            ),
            stat(
                "First token, p95",
                f"histogram_quantile(0.95, {rate('crossgate_time_to_first_token_seconds_bucket', 'le')})",
                "s",
                (2, "orange"),
                (5, "red"),
            ),
            stat("Tokens generated", rate("crossgate_generation_tokens_total"), "short"),
            stat(
                "Pictures already there",
                f"{rate('crossgate_image_kv_cache_hits_total')}"
                f" / ({rate('crossgate_image_kv_cache_queries_total')} > 0) or vector(0)",
                "percentunit",
            ),
            stat("Triton replicas that answer", 'sum(up{job="triton"})', "short"),
        ),
    ),
    Row(
        "What clients feel",
        (
            Panel(
                "Time to first token",
                quantiles("crossgate_time_to_first_token_seconds"),
                "s",
                "From the last byte of the request to the first token, queueing and encoding included.",
            ),
            Panel(
                "Between tokens",
                quantiles("crossgate_inter_token_latency_seconds"),
                "s",
                "Of streamed answers. One step of the decoder, as the gateway sees it.",
            ),
            Panel("End to end", quantiles("crossgate_e2e_request_latency_seconds"), "s", "To the last token."),
        ),
    ),
    Row(
        "Load",
        (
            Panel(
                "Running",
                (
                    Query("sum(crossgate_num_requests_running)", "at the gateways"),
                    Query("crossgate_decoder_num_requests_running", "decoder {{instance}}"),
                ),
            ),
            Panel(
                "Waiting",
                (
                    Query("sum(crossgate_num_requests_waiting)", "at the gateways"),
                    Query("crossgate_decoder_num_requests_waiting", "decoder {{instance}}"),
                ),
                description="At a gateway for a place; in a decoder for the next step that has room.",
            ),
            Panel(
                "Tokens per second",
                (
                    Query(rate("crossgate_prompt_tokens_total"), "prompt"),
                    Query(rate("crossgate_generation_tokens_total"), "generated"),
                ),
            ),
            Panel(
                "Admitted requests by how they ended",
                (Query(rate("crossgate_requests_ended_total", "outcome"), "{{outcome}}"),),
                "reqps",
                kind=Kind.STACKED,
            ),
            Panel(
                "Finished requests by reason",
                (Query(rate("crossgate_request_success_total", "finished_reason"), "{{finished_reason}}"),),
                "reqps",
                kind=Kind.STACKED,
            ),
            Panel(
                "Steps of the decoders",
                (Query(rate("crossgate_decoder_steps_total", "instance"), "{{instance}}"),),
                "ops",
            ),
        ),
    ),
    Row(
        "Caches",
        (
            Panel(
                "Self-K/V blocks in use",
                (Query("crossgate_kv_cache_usage_ratio", "{{instance}}"),),
                "percentunit",
                "Full means that sequences are put back and recomputed.",
                top=1,
            ),
            Panel(
                "Pictures found resident",
                (
                    Query(
                        f"{rate('crossgate_image_kv_cache_hits_total', 'instance')}"
                        f" / ({rate('crossgate_image_kv_cache_queries_total', 'instance')} > 0)",
                        "{{instance}}",
                    ),
                ),
                "percentunit",
                "Each of these was neither encoded nor projected again.",
                top=1,
            ),
            Panel("K/V of resident pictures", (Query("crossgate_image_kv_cache_bytes", "{{instance}}"),), "bytes"),
            Panel(
                "Prompt tokens found in the prefix cache",
                (
                    Query(
                        f"{rate('crossgate_prefix_cache_hits_total', 'instance')}"
                        f" / ({rate('crossgate_prefix_cache_queries_total', 'instance')} > 0)",
                        "{{instance}}",
                    ),
                ),
                "percentunit",
                top=1,
            ),
            Panel(
                "Sequences put back to be recomputed",
                (Query(rate("crossgate_num_preemptions_total", "instance"), "{{instance}}"),),
                "ops",
            ),
        ),
    ),
    Row(
        "Vision encoder",
        (
            Panel(
                "Pictures in one forward",
                (
                    Query(
                        f"{rate('nv_inference_count', 'instance', ENCODER)}"
                        f" / ({rate('nv_inference_exec_count', 'instance', ENCODER)} > 0)",
                        "{{instance}}",
                    ),
                ),
                description="How well Triton's batcher merges the pictures of different requests.",
            ),
            Panel(
                "A picture's time in the encoder",
                (
                    Query(
                        f"{rate('nv_inference_queue_duration_us', labels=ENCODER)}"
                        f" / ({rate('nv_inference_request_success', labels=ENCODER)} > 0)",
                        "queue",
                    ),
                    Query(
                        f"{rate('nv_inference_compute_infer_duration_us', labels=ENCODER)}"
                        f" / ({rate('nv_inference_request_success', labels=ENCODER)} > 0)",
                        "compute",
                    ),
                ),
                "µs",
                kind=Kind.STACKED,
            ),
            Panel(
                "Pictures that wait for the encoder",
                (Query(f"nv_inference_pending_request_count{ENCODER}", "{{instance}}"),),
            ),
            Panel(
                "Encoding, as the gateways see it",
                quantiles("crossgate_encode_seconds"),
                "s",
                "The same with the way there and back.",
            ),
            Panel(
                "Pictures encoded",
                (Query(rate("nv_inference_count", "instance", ENCODER), "{{instance}}"),),
                "ops",
            ),
        ),
    ),
    Row(
        "Errors",
        (
            Panel(
                "Errors by code",
                (Query(f"{rate('crossgate_request_failure_total', 'code')} or vector(0)", "{{code}}"),),
                "reqps",
                "As in the error body. No line with a name: none.",
                Kind.STACKED,
                12,
            ),
            Panel(
                "HTTP replies by status",
                (Query(rate("crossgate_http_requests_total", "status"), "{{status}}"),),
                "reqps",
                "499: the client left before the first byte.",
                Kind.STACKED,
                12,
            ),
        ),
    ),
    Row(
        "GPU",
        (
            Panel("GPU busy", (Query("DCGM_FI_DEV_GPU_UTIL", "GPU {{gpu}}"),), "percent", width=6, top=100),
            Panel(
                "Memory bandwidth in use",
                (Query("DCGM_FI_PROF_DRAM_ACTIVE", "GPU {{gpu}}"),),
                "percentunit",
                "Decoding is bound by this; service.capacity gives the ceiling.",
                width=6,
                top=1,
            ),
            Panel("GPU memory in use", (Query("DCGM_FI_DEV_FB_USED * 1048576", "GPU {{gpu}}"),), "bytes", width=6),
            Panel("Power", (Query("DCGM_FI_DEV_POWER_USAGE", "GPU {{gpu}}"),), "watt", width=6),
        ),
        gpu=True,
    ),
)

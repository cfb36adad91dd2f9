"""What a run comes to in numbers. Pure: samples in, figures out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from loadtest.record import Run, Sample

STAGES = ("queue", "encode", "prefill", "decode")


@dataclass(frozen=True)
class Figures:
    """Of some requests. Latencies are of those that succeeded; who left counts in none of them but TTFT and gaps."""

    num_requests: int
    num_failed: int
    num_left: int
    requests_per_s: float
    tokens_per_s: float
    picture_hits: float | None  # share of the pictures whose K/V was there already
    ttft_ms: Sequence[float]
    gaps_ms: Sequence[float]
    e2e_ms: Sequence[float]
    stage_ms: tuple[float, ...]  # mean of each of STAGES, as the service tells


def figures(samples: Sequence[Sample], duration_s: float) -> Figures:
    good = [sample for sample in samples if not sample.error]
    ended = [sample for sample in good if not sample.left]
    pictures = sum(sample.usage.get("images", 0) for sample in ended)
    hits = sum(sample.usage.get("cached_images", 0) for sample in ended)
    timed = [sample.timings for sample in ended if sample.timings]
    return Figures(
        num_requests=len(samples),
        num_failed=len(samples) - len(good),
        num_left=len(good) - len(ended),
        requests_per_s=len(ended) / duration_s,
        tokens_per_s=sum(sample.usage.get("completion_tokens", 0) for sample in ended) / duration_s,
        picture_hits=hits / pictures if pictures else None,
        ttft_ms=sorted(sample.ttft_ms for sample in good if sample.ttft_ms is not None),
        gaps_ms=sorted(gap for sample in good for gap in sample.gaps_ms),
        e2e_ms=sorted(sample.e2e_ms for sample in ended),
        stage_ms=tuple(
            sum(timings.get(f"{stage}_ms", 0.0) for timings in timed) / len(timed) if timed else 0.0 for stage in STAGES
        ),
    )


def duration_s(run: Run) -> float:
    """First question to last answer."""
    return max(sample.at_s + sample.e2e_ms / 1e3 for sample in run.samples) - run.samples[0].at_s


def percentile(ordered: Sequence[float], percent: float) -> float | None:
    """The smallest value that `percent` % of them do not exceed (nearest rank); None of nothing."""
    if not ordered:
        return None
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]


def by_scenario(run: Run) -> dict[str, Figures]:
    """Figures of each scenario, streamed and not together, in the order of their names."""
    duration = duration_s(run)
    names = sorted({sample.scenario for sample in run.samples})
    return {name: figures([sample for sample in run.samples if sample.scenario == name], duration) for name in names}


def failures(run: Run) -> dict[tuple[str, str], int]:
    """(scenario, error) -> how often."""
    counts: dict[tuple[str, str], int] = {}
    for sample in run.samples:
        if sample.error:
            counts[sample.scenario, sample.error] = counts.get((sample.scenario, sample.error), 0) + 1
    return counts


def over_time(run: Run, num_bins: int = 30) -> list[tuple[float, float]]:
    """(seconds since the start, answers that ended per second)."""
    start, width = run.samples[0].at_s, duration_s(run) / num_bins
    counts = [0] * num_bins
    for sample in run.samples:
        if not sample.error and not sample.left:
            end_s = sample.at_s + sample.e2e_ms / 1e3 - start
            counts[min(num_bins - 1, int(end_s / width))] += 1
    return [((index + 0.5) * width, count / width) for index, count in enumerate(counts)]

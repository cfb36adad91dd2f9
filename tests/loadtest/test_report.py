"""The report's numbers, and that it renders whatever a run holds."""

from __future__ import annotations

import json
import xml.dom.minidom
from dataclasses import asdict

import numpy as np
import pytest

from loadtest.charts import cumulative, log_ticks, ticks
from loadtest.figures import by_scenario, duration_s, figures, percentile
from loadtest.record import Recorder, Sample, load_run
from loadtest.report import main


def sample(at_s: float, e2e_ms: float, **fields) -> Sample:
    return Sample("zipf_mix", "/v1/generate", True, at_s, e2e_ms, **fields)


GOOD = sample(
    10.0,
    500.0,
    ttft_ms=100.0,
    gaps_ms=[20.0, 30.0],
    usage={"completion_tokens": 3, "images": 2, "cached_images": 1},
    timings={"queue_ms": 1.0, "encode_ms": 40.0, "prefill_ms": 50.0, "decode_ms": 60.0},
)
LEFT = sample(11.0, 50.0, ttft_ms=40.0, left=True)
BROKEN = sample(12.0, 2000.0, ttft_ms=30.0, error="in the stream: <unavailable>")


def write_run(folder, samples):
    recorder = Recorder(folder, {"users": 2, "scenarios": ["ZipfMix"]})
    for one in samples:
        recorder.add(one)
    recorder.close()
    return folder


def test_percentile_is_the_nearest_rank():
    values = sorted(np.random.default_rng(0).exponential(size=999))
    for percent in (1, 50, 95, 99, 100):
        assert percentile(values, percent) == np.percentile(values, percent, method="inverted_cdf")
    assert percentile([], 50) is None


def test_failures_and_leavers_are_in_no_latency():
    found = figures([GOOD, LEFT, BROKEN], duration_s=4.0)
    assert (found.num_requests, found.num_failed, found.num_left) == (3, 1, 1)
    assert list(found.e2e_ms) == [500.0]
    assert list(found.ttft_ms) == [40.0, 100.0]
    assert found.requests_per_s == 0.25
    assert found.tokens_per_s == 0.75
    assert found.picture_hits == 0.5
    assert found.stage_ms == (1.0, 40.0, 50.0, 60.0)


def test_run_is_read_as_it_was_written(tmp_path):
    run = load_run(write_run(tmp_path / "a", [BROKEN, GOOD]))
    assert run.samples == (GOOD, BROKEN)
    assert duration_s(run) == 4.0
    assert by_scenario(run)["zipf_mix"].num_requests == 2
    assert json.loads(json.dumps(asdict(GOOD))) == asdict(run.samples[0])


@pytest.mark.parametrize("others", [[], [[BROKEN]], [[LEFT]], [[GOOD, BROKEN, LEFT]]])
def test_report_renders_one_run_or_two(tmp_path, others, capsys):
    folders = [write_run(tmp_path / "one", [GOOD, LEFT])]
    folders += [write_run(tmp_path / f"other{index}", samples) for index, samples in enumerate(others)]
    assert main([*map(str, folders), "-o", str(tmp_path / "report.html")]) == 0
    page = (tmp_path / "report.html").read_text()
    assert page.count("<figure>") == 6
    assert "http" not in page.replace("http://127.0.0.1", "")  # nothing to load
    assert "<unavailable>" not in page
    for svg in page.split("<svg")[1:]:
        xml.dom.minidom.parseString("<svg" + svg.split("</svg>")[0] + "</svg>")
    assert ("<th>change</th>" in page) == bool(others)


def test_folder_without_a_run_is_one_clear_line(tmp_path, capsys):
    assert main([str(tmp_path / "nothing")]) == 2
    write_run(tmp_path / "empty", [])
    assert main([str(tmp_path / "empty")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert "holds no request" in errors[1]


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.7), (0.0, 1.0), (0.0, 37.0), (0.0, 12345.0), (0.0, 0.0)])
def test_ticks_cover_the_range(low, high):
    found = ticks(low, high)
    assert found[0] == low
    assert found[-1] >= high
    assert 3 <= len(found) <= 7


@pytest.mark.parametrize(("low", "high"), [(0.1, 1000.0), (12.0, 13.0), (1.0, 1.0), (3.0, 90000.0), (5.0, 10.0)])
def test_log_ticks_cover_the_range(low, high):
    found = log_ticks(low, high)
    assert found[0] <= low
    assert found[-1] >= high
    assert 2 <= len(found) <= 12
    assert found == sorted(set(found))


def test_cumulative_ends_at_all_of_them():
    points = cumulative(range(1, 1001))
    assert points[-1] == (1000, 100.0)
    assert len(points) <= 202
    assert cumulative([]) == []

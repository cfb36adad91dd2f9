"""The locustfile as an operator runs it: a process of its own, against a small server."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from loadtest.record import load_run
from tests.loadtest.fake_server import Behaviour, fake_server

ROOT = Path(__file__).resolve().parents[2]


def run_locust(url: str, folder: Path, *options: str, seconds: int = 4) -> tuple[int, list[dict[str, str]]]:
    """(exit status, rows of locust's own table)"""
    command = [sys.executable, "-W", "ignore", "-m", "locust", "-f", str(ROOT / "loadtest/locustfile.py"), "--headless"]
    command += ["--host", url, "-t", f"{seconds}s", "--csv", str(folder / "table"), "--record", str(folder), *options]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    assert "Traceback" not in result.stderr, result.stderr
    return result.returncode, list(csv.DictReader((folder / "table_stats.csv").read_text().splitlines()))


def entries(rows: list[dict[str, str]]) -> dict[tuple[str, str], dict[str, str]]:
    return {(row["Type"], row["Name"]): row for row in rows if row["Name"] != "Aggregated"}


def test_every_scenario_runs_and_has_its_entries(tmp_path):
    behaviour = Behaviour(first_token_s=0.02, between_tokens_s=0.002)
    with fake_server(behaviour) as url:
        status, rows = run_locust(url, tmp_path, "-u", "16", "-r", "16", "--seed", "1", seconds=6)
    found = entries(rows)
    assert {sample.error for sample in load_run(tmp_path).samples} == {None}
    assert status == 0
    assert sum(int(row["Failure Count"]) for row in found.values()) == 0
    assert {name.split()[0] for _, name in found} == {
        "unique_pictures",
        "hot_picture",
        "zipf_mix",
        "multi_turn_chat",
        "text_only",
        "many_pictures",
        "short_answers",
        "long_answers",
        "leaving_clients",
    }
    for kind in ("TTFT", "ITL", "E2E"):
        assert int(found[kind, "zipf_mix chat/completions stream"]["Request Count"]) > 0
    assert ("TTFT", "zipf_mix generate") not in found  # without streaming there is no first token to see
    assert ("LEFT", "leaving_clients generate stream") in found
    run = load_run(tmp_path)
    assert len(run.samples) >= len(behaviour.bodies) - 16  # those cut off by the end of the run are nobody's
    assert run.about["users"] == 16


@pytest.mark.parametrize("fault", ["error_chunk", "no_done"])
def test_broken_streams_fail_the_run(tmp_path, fault):
    with fake_server(Behaviour(fault=fault)) as url:
        status, rows = run_locust(url, tmp_path, "-u", "2", "--stream", "yes", "ZipfMix", seconds=3)
    found = entries(rows)
    assert status == 1
    for (kind, _), row in found.items():
        assert int(row["Failure Count"]) == (int(row["Request Count"]) if kind == "E2E" else 0)


def test_open_loop_keeps_its_rate_whatever_the_latency(tmp_path):
    arrived = {}
    for latency_s in (0.05, 0.4):
        folder = tmp_path / str(latency_s)
        folder.mkdir()
        behaviour = Behaviour(first_token_s=latency_s)
        with fake_server(behaviour) as url:
            run_locust(url, folder, "-u", "20", "-r", "20", "--rate", "10", "--stream", "no", "TextOnly", seconds=7)
        arrived[latency_s] = len(behaviour.bodies)
    assert all(40 <= count <= 75 for count in arrived.values()), arrived  # 10/s, the first two seconds ramp up


def test_routes_and_streaming_follow_the_options(tmp_path):
    behaviour = Behaviour()
    with fake_server(behaviour) as url:
        run_locust(url, tmp_path, "-u", "2", "--route", "generate", "--stream", "no", "HotPicture", seconds=2)
    assert behaviour.bodies
    assert Counter(body["stream"] for body in behaviour.bodies).keys() == {False}
    assert all("prompt" in body for body in behaviour.bodies)
    assert json.loads((tmp_path / "run.json").read_text())["scenarios"] == ["HotPicture"]

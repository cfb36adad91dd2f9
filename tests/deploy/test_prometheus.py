"""The configuration on the real Prometheus, fed by the real service: every query of the dashboard returns data."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import yaml

from deploy.grafana.queries import ask, panel_queries
from service.launch.settings import free_ports
from tests.checkpoints import make_idefics
from tests.e2e.running import Running, picture, question

FOLDER = Path(__file__).resolve().parents[2] / "deploy" / "prometheus"
PROMTOOL, PROMETHEUS = shutil.which("promtool"), shutil.which("prometheus")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (Debian: prometheus)")
needs_prometheus = pytest.mark.skipif(PROMETHEUS is None, reason="prometheus is not installed")


@needs_promtool
@pytest.mark.parametrize(
    "arguments",
    [
        ["check", "config", "prometheus.yml"],
        ["check", "rules", "rules.yml", "alerts.yml"],
        ["test", "rules", "tests.yml"],
    ],
    ids=" ".join,
)
def test_promtool_accepts(arguments):
    result = subprocess.run([PROMTOOL, *arguments], cwd=FOLDER, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_alert_says_who_is_woken_and_what_to_do():
    groups = yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"]
    for rule in (rule for group in groups for rule in group["rules"]):
        assert rule["labels"]["severity"] in ("page", "ticket"), rule["alert"]
        assert rule["annotations"].keys() == {"summary", "action"}, rule["alert"]
        assert "for" in rule, rule["alert"]


@needs_prometheus
@pytest.mark.e2e
@pytest.mark.timeout(300)
def test_every_query_of_the_dashboard_returns_data(tmp_path):
    checkpoint = make_idefics(tmp_path / "tiny", max_position_embeddings=4096)
    service = Running("--no-question", MODEL_PATH=str(checkpoint))
    try:
        service.wait_until_ready()
        with prometheus(tmp_path, service) as url:
            deadline = time.monotonic() + 90
            empty = ["not asked yet"]
            while empty and time.monotonic() < deadline:
                use_everything(service)
                time.sleep(1)
                empty = [query for query in panel_queries() if not query.needs_gpu and not ask(url, query, "10s")]
                empty += [name for name in recorded(url) if not value(url, name)]  # rules run a moment after scrapes
            assert not empty
            check_rules(url)
    finally:
        service.stop()


def use_everything(service: Running) -> None:
    """Answers and errors of every kind, streamed and not, with pictures new and known."""
    seed = time.monotonic_ns() % 2**32
    bodies = [question(picture(seed), picture(0)), question(picture(0), stream=True), question(prompt="no picture")]
    for body in [*bodies, question(prompt="wrong", temperature=9)]:
        httpx.post(f"{service.url}/v1/generate", json=body, timeout=30)


def check_rules(url: str) -> None:
    """No rule fails, and nothing alerts on a service that is well."""
    assert [rule["name"] for rule in rules(url) if rule["health"] != "ok"] == []
    assert len(recorded(url)) == 9
    assert [rule["name"] for rule in rules(url) if rule.get("state") == "firing"] == []


def recorded(url: str) -> list[str]:
    return [rule["name"] for rule in rules(url) if rule["type"] == "recording"]


def rules(url: str) -> list[dict]:
    groups = httpx.get(f"{url}/api/v1/rules").json()["data"]["groups"]
    return [rule for group in groups for rule in group["rules"]]


def value(url: str, expression: str) -> list:
    return httpx.get(f"{url}/api/v1/query", params={"query": expression}).json()["data"]["result"]


@contextmanager
def prometheus(folder: Path, service: Running) -> Iterator[str]:
    """The real one with our configuration, only its targets on this machine and its pace quicker."""
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(FOLDER / name) for name in config["rule_files"]]
    ports = {"gateway": service.port, "triton": service.metrics_port}
    config["scrape_configs"] = [
        {"job_name": job["job_name"], "static_configs": [{"targets": [f"127.0.0.1:{ports[job['job_name']]}"]}]}
        for job in config["scrape_configs"]
        if job["job_name"] in ports
    ]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    flags = {"config.file": folder / "prometheus.yml", "storage.tsdb.path": folder / "tsdb"}
    command = [str(PROMETHEUS), *(f"--{name}={value}" for name, value in flags.items())]
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen(
            [*command, f"--web.listen-address=127.0.0.1:{port}"], env={**os.environ, "GOMAXPROCS": "1"}, stderr=log
        )
        try:
            wait_until_ready(url, process)
            yield url
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(20)


def wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    for _ in range(200):
        assert process.poll() is None, "prometheus ended"
        try:
            with urllib.request.urlopen(f"{url}/-/ready", timeout=1):
                return
        except OSError:
            time.sleep(0.1)
    raise AssertionError("prometheus was not ready in time")


def test_scrape_jobs_are_services_of_the_compose_file():
    """The names are DNS names there; a service that were renamed would silently not be watched."""
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    names = {
        name for job in config["scrape_configs"] for found in job.get("dns_sd_configs", ()) for name in found["names"]
    }
    compose = (FOLDER.parents[1] / "docker-compose.yml").read_text()
    assert {name for name in names if not re.search(rf"^  {name}:$", compose, re.MULTILINE)} == set()

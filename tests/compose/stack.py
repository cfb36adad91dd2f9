"""The deployment under test: Compose with some profiles, and what one asks of it."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx

from service.launch.settings import free_ports
from tests.compose.engine import CACHE, Docker
from tests.compose.images import Images

SERVICES = {  # by profile, with what they depend on: not Grafana, which no package brings
    "cpu": ("gateway",),
    "observe": ("prometheus",),
    "scale": ("haproxy",),
}
NUM_REPLICAS = 2
MAX_RUNNING = 2  # of one decoder: so few that under load some requests wait, without a token, beside streams that run
UP_TIMEOUT_S = 300.0
TRITON_METRICS = "http://127.0.0.1:8002/metrics"
HAPROXY_METRICS = "http://127.0.0.1:8404/metrics"
HAPROXY_BACKENDS = ("pictures", "others")
# Kills inside the container and not through the engine, which would take that for a wish and not restart it.
KILL = """
import os, pathlib, signal, sys
for cmdline in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
    words = cmdline.read_bytes().decode().split(chr(0))
    if os.path.basename(words[0]) == sys.argv[1] and sys.argv[2] in " ".join(words):
        os.kill(int(cmdline.parent.name), signal.SIGKILL)
        sys.exit()
sys.exit("no such process")
"""
READ = "import sys, urllib.request; sys.stdout.write(urllib.request.urlopen(sys.argv[1], timeout=5).read().decode())"


class Stack:
    """`checkpoint` None: the demo. `settings`: a file of CROSSGATE_* variables."""

    def __init__(
        self,
        docker: Docker,
        images: Images,
        settings: Path,
        *,
        profiles: tuple[str, ...],
        num_replicas: int = 1,
        checkpoint: Path | None = None,
    ) -> None:
        self._docker = docker
        self._profiles = profiles
        self._num_replicas = num_replicas
        self._port, self._prometheus_port = free_ports(2)
        self.gateway = f"http://127.0.0.1:{self._port}"
        self.prometheus = f"http://127.0.0.1:{self._prometheus_port}"
        self.variables = {
            "COMPOSE_PROJECT_NAME": f"crossgate-test-{self._port}",
            "COMPOSE_PROFILES": ",".join(profiles),
            "GATEWAY_IMAGE": images.gateway,
            "TRITON_IMAGE": images.triton,
            "DEMO_IMAGE": images.gateway if checkpoint else images.demo,
            "HAPROXY_IMAGE": images.haproxy,
            "PROMETHEUS_IMAGE": images.prometheus,
            "MODEL_PATH": str(checkpoint or ""),
            "ENV_FILE": str(settings),
            "HOST": "127.0.0.1",
            "PORT": str(self._port),
            "PROMETHEUS_PORT": str(self._prometheus_port),
        }

    def compose(self, *arguments: str, timeout_s: float = 120.0) -> str:
        return self._docker("compose", *arguments, timeout_s=timeout_s, **self.variables)

    def up(self) -> None:
        services = (service for profile in self._profiles for service in SERVICES[profile])
        command = ("up", "--detach", "--no-build", "--wait", "--scale", f"triton={self._num_replicas}", *services)
        self.compose(*command, timeout_s=UP_TIMEOUT_S)

    def down(self, *arguments: str) -> None:
        self.compose("down", "--remove-orphans", *arguments, timeout_s=UP_TIMEOUT_S)

    def keep_logs(self) -> None:
        """In .cache/compose/stack.log, unless there is nothing any more to keep."""
        logs = self.compose("logs", "--no-color", "--tail", "1000")
        if logs:
            (CACHE / "stack.log").write_text(logs, encoding="utf-8")

    def containers(self) -> list[dict[str, Any]]:
        """`docker inspect` of each, also of those that ended."""
        ids = self.compose("ps", "--all", "--quiet").split()
        return json.loads(self._docker("inspect", *ids)) if ids else []

    def of_service(self, service: str) -> list[dict[str, Any]]:
        return [one for one in self.containers() if one["Config"]["Labels"]["com.docker.compose.service"] == service]

    def replicas(self) -> list[dict[str, Any]]:
        return self.of_service("triton")

    def kill_inside(self, container: Mapping[str, Any], program: str, argument: str) -> None:
        """SIGKILL to the process of that program which has `argument` among its own."""
        self._docker("exec", container["Id"], "python3", "-c", KILL, program, argument)

    def gauge(self, replica: Mapping[str, Any], name: str) -> float:
        """From the replica's own metrics; 0 if it is not there yet."""
        text = self._docker("exec", replica["Id"], "python3", "-c", READ, TRITON_METRICS)
        lines = (line for line in text.splitlines() if line.partition("{")[0].partition(" ")[0] == name)
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    def picture_queries(self) -> dict[str, float]:
        """Pictures that each replica was asked for since it started, by container name."""
        return {one["Name"]: self.gauge(one, "crossgate_image_kv_cache_queries_total") for one in self.replicas()}

    def num_healthy_replicas(self) -> int:
        """As the balancer sees it, which has them twice: for requests about pictures, and for the others."""
        (balancer,) = self.of_service("haproxy")
        lines = self._docker("exec", balancer["Id"], "wget", "-q", "-O", "-", HAPROXY_METRICS).splitlines()
        up = [line for line in lines if line.startswith("haproxy_server_status{") and 'state="UP"' in line]
        return min(
            sum(f'proxy="{backend}"' in line and line.endswith(" 1") for line in up) for backend in HAPROXY_BACKENDS
        )

    def is_whole(self) -> bool:
        """Every replica answers the balancer, and the gateway says that both models answer."""
        with contextlib.suppress(httpx.HTTPError):
            ready = httpx.get(f"{self.gateway}/readyz", timeout=10).status_code == 200
            return ready and self.num_healthy_replicas() == self._num_replicas
        return False

    def query(self, expression: str) -> list[dict[str, Any]]:
        reply = httpx.get(f"{self.prometheus}/api/v1/query", params={"query": expression}, timeout=10)
        return reply.raise_for_status().json()["data"]["result"]


def wait_until(condition: Callable[[], bool], timeout_s: float, what: str) -> float:
    """How long it took, in seconds."""
    begin_s = time.monotonic()
    while not condition():
        assert time.monotonic() - begin_s < timeout_s, f"{what}: not within {timeout_s:.0f} s"
        time.sleep(0.5)
    return time.monotonic() - begin_s

"""The deployment under test: Compose with profiles cpu, observe and scale, two replicas, and what one asks of it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx

from tests.compose.engine import Docker
from tests.compose.images import Images

PROFILES = "cpu,observe,scale"
SERVICES = ("gateway", "haproxy", "prometheus")  # and what they depend on: not Grafana, which no package brings
NUM_REPLICAS = 2
UP_TIMEOUT_S = 300.0
TRITON_METRICS = "http://127.0.0.1:8002/metrics"
HAPROXY_METRICS = "http://127.0.0.1:8404/metrics"
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
    def __init__(self, docker: Docker, images: Images, checkpoint: Path) -> None:
        self._docker = docker
        self._port, self._prometheus_port = free_ports(2)
        self.gateway = f"http://127.0.0.1:{self._port}"
        self.prometheus = f"http://127.0.0.1:{self._prometheus_port}"
        self.variables = {
            "COMPOSE_PROJECT_NAME": f"crossgate-test-{os.getpid()}",
            "COMPOSE_PROFILES": PROFILES,
            "GATEWAY_IMAGE": images.gateway,
            "TRITON_IMAGE": images.triton,
            "DEMO_IMAGE": images.gateway,  # with a checkpoint of one's own nothing is put together
            "HAPROXY_IMAGE": images.haproxy,
            "PROMETHEUS_IMAGE": images.prometheus,
            "MODEL_PATH": str(checkpoint),
            "MODEL_NAME": "tiny",
            "CROSSGATE_NUM_THREADS": "1",
            "HOST": "127.0.0.1",
            "PORT": str(self._port),
            "PROMETHEUS_PORT": str(self._prometheus_port),
        }

    def compose(self, *arguments: str, timeout_s: float = 120.0) -> str:
        return self._docker("compose", *arguments, timeout_s=timeout_s, **self.variables)

    def up(self) -> None:
        command = ("up", "--detach", "--no-build", "--wait", "--scale", f"triton={NUM_REPLICAS}", *SERVICES)
        self.compose(*command, timeout_s=UP_TIMEOUT_S)

    def down(self, *arguments: str) -> None:
        self.compose("down", "--remove-orphans", *arguments, timeout_s=UP_TIMEOUT_S)

    def logs(self) -> str:
        return self.compose("logs", "--no-color", "--tail", "200")

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

    def picture_queries(self) -> dict[str, float]:
        """Pictures that each replica was asked for since it started, by container name, as its own metrics say."""
        return {
            one["Name"]: metric(
                self._docker("exec", one["Id"], "python3", "-c", READ, TRITON_METRICS),
                "crossgate_image_kv_cache_queries_total",
            )
            for one in self.replicas()
        }

    def num_healthy_replicas(self) -> int:
        """As the balancer sees it."""
        (balancer,) = self.of_service("haproxy")
        lines = self._docker("exec", balancer["Id"], "wget", "-q", "-O", "-", HAPROXY_METRICS).splitlines()
        up = (line for line in lines if line.startswith("haproxy_server_status{") and 'state="UP"' in line)
        return sum(line.endswith(" 1") for line in up)

    def is_whole(self) -> bool:
        """Every replica answers the balancer, and the gateway says that both models answer."""
        with contextlib.suppress(httpx.HTTPError):
            ready = httpx.get(f"{self.gateway}/readyz", timeout=10).status_code == 200
            return ready and self.num_healthy_replicas() == NUM_REPLICAS
        return False

    def query(self, expression: str) -> list[dict[str, Any]]:
        reply = httpx.get(f"{self.prometheus}/api/v1/query", params={"query": expression}, timeout=10)
        return reply.raise_for_status().json()["data"]["result"]


def metric(text: str, name: str) -> float:
    """The sum over its labels; 0 if it is not there yet."""
    lines = (line for line in text.splitlines() if line.partition("{")[0].partition(" ")[0] == name)
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def wait_until(condition: Callable[[], bool], timeout_s: float, what: str) -> float:
    """How long it took, in seconds."""
    begin_s = time.monotonic()
    while not condition():
        assert time.monotonic() - begin_s < timeout_s, f"{what}: not within {timeout_s:.0f} s"
        time.sleep(0.5)
    return time.monotonic() - begin_s


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as listeners:
        sockets = [listeners.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [listener.getsockname()[1] for listener in sockets]

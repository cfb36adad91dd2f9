"""The two services that the launcher runs: the gateway and Triton, and how each is known to be ready or broken."""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path

from service.families import Family
from service.launch.child import Child
from service.launch.client import answers
from service.launch.settings import CACHE, LaunchSettings
from service.launch.supervisor import Service
from service.launch.triton import (
    EXIT_TIMEOUT_S,
    TritonPorts,
    link_backends,
    remove_stale_shared_memory,
    stub_pids,
    triton_command,
    triton_environment,
)

LOOPBACK = "127.0.0.1"
DRAIN_TIMEOUT_S = 35.0  # the gateway's own is 30
OUR_ERROR = re.compile(r"(?:InvalidRequest|TooLarge|Unavailable): (.+?)(?:\\n|$)", re.MULTILINE)


def make_services(settings: LaunchSettings, family: Family, port: int, ports: TritonPorts) -> list[Service]:
    """In the order in which they are to be stopped. Raises Unavailable if Triton cannot be run here."""
    logs = log_folder(port)
    logs.mkdir(parents=True, exist_ok=True)
    return [_gateway(settings, family, port, ports, logs), _triton(settings, family, ports, logs)]


def log_folder(port: int) -> Path:
    """Of the service at this port: several may run."""
    return CACHE / "log" / str(port)


def _gateway(settings: LaunchSettings, family: Family, port: int, ports: TritonPorts, logs: Path) -> Service:
    log = logs / "gateway.log"
    environment = {
        **os.environ,
        "MODEL_PATH": str(family.folder),
        "HOST": settings.host,
        "PORT": str(port),
        "DEVICE": settings.device,
        "DTYPE": settings.dtype,
        "TRITON_URL": f"{LOOPBACK}:{ports.grpc}",
    }
    command = [sys.executable, "-m", "service.gateway"]
    return Service(
        name="gateway",
        start=lambda: Child(command, environment, death_signal=signal.SIGTERM, log=log),
        is_ready=lambda: answers(settings.client_host, settings.ops_port or port, "/livez"),
        explain=lambda: _reason(log),
        stop_timeout_s=DRAIN_TIMEOUT_S,
    )


def _triton(settings: LaunchSettings, family: Family, ports: TritonPorts, logs: Path) -> Service:
    log = logs / "triton.log"
    environment = triton_environment(family.folder, settings.device, settings.num_threads)
    command = triton_command(ports, link_backends(environment))

    def start() -> Child:
        remove_stale_shared_memory()  # of the one before, if it was killed
        return Child(command, environment, death_signal=signal.SIGKILL, log=log)

    return Service(
        name="Triton",
        start=start,
        is_ready=lambda: answers(LOOPBACK, ports.http, "/v2/health/ready"),
        explain=lambda: _reason(log),
        stop_timeout_s=EXIT_TIMEOUT_S + 3.0,
        members=lambda child: stub_pids(child.pid),
    )


def _reason(log: Path) -> str:
    """Why a process ended: the message of an error of ours in its log, or else the last line."""
    text = log.read_text(encoding="utf-8", errors="replace")
    ours = OUR_ERROR.findall(text)
    last = text.strip().splitlines()[-1:] or ["it said nothing"]
    return f"{ours[-1] if ours else last[0].removeprefix('crossgate: ')} (all of it: {log})"

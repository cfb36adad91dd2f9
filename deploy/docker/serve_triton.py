"""The triton image's entrypoint: runs tritonserver, and ends with it as soon as one of its model processes has died.

Triton runs a Python model in a process of its own, `triton_python_backend_stub`. It neither restarts one that died nor
says so: requests to it hang for ever, and health stays good. So this ends the container with status 1, and a restart
policy or an orchestrator starts it anew. Arguments are passed on to tritonserver.
"""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import sys
import time
from pathlib import Path

from probe import answers

ROOT = Path(__file__).resolve().parent.parent  # has service/, which the models import, as the working directory
READY = "http://127.0.0.1:8000/v2/health/ready"
LOAD_TIMEOUT_S = 600  # of a model: gigabytes of weights from a slow disk
EXIT_TIMEOUT_S = 60  # for running requests, once asked to stop; Compose's stop_grace_period is longer
POLL_S = 0.2


def command(arguments: list[str]) -> list[str]:
    flags = {
        "model-repository": ROOT / "model_repo",
        "exit-timeout-secs": EXIT_TIMEOUT_S,
        "http-thread-count": 2,
        "grpc-http2-max-ping-strikes": 0,  # gateways ask every few seconds whether the connection still stands
        "log-info": "false",
        "allow-cpu-metrics": "false",
        "backend-config=python,stub-timeout-seconds": LOAD_TIMEOUT_S,
    }
    return ["tritonserver", *(f"--{name}={value}" for name, value in flags.items()), *tracing(), *arguments]


def tracing() -> list[str]:
    """Spans of the requests that arrive with a trace, to the collector that OTEL_EXPORTER_OTLP_ENDPOINT names."""
    collector = os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT", "").rstrip("/")
    settings = (
        "mode=opentelemetry",
        "rate=0",
        "count=-1",
        "level=TIMESTAMPS",
        f"opentelemetry,url={collector}/v1/traces",
    )
    return [f"--trace-config={setting}" for setting in settings] if collector else []


def environment() -> dict[str, str]:
    """The stubs inherit it. Two stages share the cores, so a thread that waits must not spin for long."""
    threads = os.environ.get("CROSSGATE_NUM_THREADS") or str(num_cores())
    spinning = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "20000"}
    return {"OMP_NUM_THREADS": threads, **spinning, **os.environ}


def num_cores() -> int:
    """Those that this container may use: its affinity, and its quota (cgroup v2)."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="utf-8").split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # no cgroup v2, or no quota: "max"
        return cores


def children(parent: int) -> list[int]:
    """Pids of its child processes that are alive. Once Triton is ready these are its model processes."""
    pids = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            after_name = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        if int(after_name[1]) == parent and after_name[0] != "Z":
            pids.append(int(stat.parent.name))
    return pids


def wait_for_an_end(server: subprocess.Popen[bytes]) -> None:
    """Returns once tritonserver, or after it was ready one of its model processes, has ended."""
    while not answers(READY):
        if server.poll() is not None:
            return
        time.sleep(POLL_S)
    models = children(server.pid)
    print(f"crossgate: Triton is ready, its model processes are {models}", flush=True)
    with selectors.DefaultSelector() as selector:
        for pid in (server.pid, *models):
            try:
                selector.register(os.pidfd_open(pid), selectors.EVENT_READ)
            except ProcessLookupError:
                return
        selector.select()


def main() -> int:
    server = subprocess.Popen(command(sys.argv[1:]), env=environment(), cwd=ROOT)
    stopping = False

    def stop(number: int, frame: object) -> None:
        nonlocal stopping
        stopping = True
        server.send_signal(signal.SIGTERM)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    wait_for_an_end(server)
    if server.poll() is None and not stopping:
        print("crossgate: a model process has died; ending Triton", file=sys.stderr, flush=True)
        server.kill()
        server.wait()
        return 1
    return server.wait()


if __name__ == "__main__":
    sys.exit(main())

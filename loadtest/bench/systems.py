"""The systems under test: how each is started, asked a round of questions, and ended. One at a time is asked."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from loadtest.bench.scenario import Request
from loadtest.bench.worker import Worker, environment
from service.launch.settings import ROOT, free_ports
from tests.e2e.running import Running

PEERS = "loadtest.bench.peers"
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 20.0


@dataclass(frozen=True)
class Round:
    """What a round took. `client_cpu_s` None: nobody asked over HTTP."""

    seconds: float
    tokens: list[list[int]]
    client_cpu_s: float | None = None

    @property
    def tokens_per_s(self) -> float:
        return sum(map(len, self.tokens)) / self.seconds


class System(Protocol):
    name: str

    def run(self, requests: Sequence[Request]) -> Round: ...

    def stop(self) -> None: ...


class InOneProcess:
    """A peer that is asked through a pipe: nothing but the model's own time."""

    def __init__(self, name: str, module: str, folder: Path, dtype: str) -> None:
        self.name = name
        self._worker = Worker(f"{PEERS}.{module}", str(folder), dtype)

    def run(self, requests: Sequence[Request]) -> Round:
        answer = self._worker.ask(requests=[request.to_json() for request in requests])
        return Round(answer["seconds"], answer["tokens"])

    def stop(self) -> None:
        self._worker.stop()


class Service:
    """Crossgate as `make serve` runs it, with real Triton."""

    def __init__(self, folder: Path, dtype: str, users: Worker, name: str = "service") -> None:
        self.name, self._users = name, users
        self.running = Running("--no-question", MODEL_PATH=str(folder), DTYPE=dtype, CROSSGATE_NUM_THREADS="")
        try:
            self.running.wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def run(self, requests: Sequence[Request], *, stream: bool = False) -> Round:
        return _ask(self._users, self.running.url, requests, stream=stream)

    def stop(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()):  # it would say again what it has logged
            self.running.stop()


class Server:
    """A peer's HTTP server, started when it is first asked: one for each number of users if it has to know that."""

    def __init__(self, name: str, folder: Path, dtype: str, users: Worker, *, knows_users: bool) -> None:
        self.name = name
        self._module = {"fastapi": "fastapi_lock", "litserve": "litserve_batch"}[name]
        self._arguments = (str(folder), dtype)
        self._users, self._knows_users = users, knows_users
        self._started: dict[int, tuple[subprocess.Popen[bytes], str]] = {}

    def run(self, requests: Sequence[Request]) -> Round:
        num_users = len(requests) if self._knows_users else 0
        if num_users not in self._started:
            self._start(num_users)
        return _ask(self._users, self._started[num_users][1], requests)

    def stop(self) -> None:
        for process, _ in self._started.values():
            end_group(process)

    def _start(self, num_users: int) -> None:
        port = free_ports(1)[0]
        arguments = [*self._arguments, str(port), *([str(num_users)] if num_users else [])]
        process = subprocess.Popen(
            [sys.executable, "-m", f"{PEERS}.{self._module}", *arguments],
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # LitServe's workers outlive it otherwise
        )
        url = f"http://127.0.0.1:{port}"
        self._started[num_users] = process, url  # before it answers, so that `stop` ends it whatever happens
        _wait_for(f"{url}/health", process)


def start_systems(names: Sequence[str], folder: Path, dtype: str, users: Worker) -> list[System]:
    """Those of `names`, in the order in which a round asks them. If one does not start, none is left running."""
    started: list[System] = []
    try:
        for name in names:
            started.append(_start(name, folder, dtype, users))
    except BaseException:
        stop_systems(started)
        raise
    return started


def stop_systems(systems: Sequence[System]) -> None:
    with contextlib.ExitStack() as stopping:  # each, whatever happens to another
        for system in systems:
            stopping.callback(system.stop)


NAMES = ("engine", "service", "transformers", "fastapi", "litserve")


def _start(name: str, folder: Path, dtype: str, users: Worker) -> System:
    if name == "engine":
        return InOneProcess(name, "engine", folder, dtype)
    if name == "service":
        return Service(folder, dtype, users)
    if name == "transformers":
        return InOneProcess(name, "static_batches", folder, dtype)
    return Server(name, folder, dtype, users, knows_users=name == "litserve")


def _ask(users: Worker, url: str, requests: Sequence[Request], **options: Any) -> Round:
    asked = [request.to_json() for request in requests]
    answer = users.ask(url=f"{url}/v1/generate", requests=asked, **options)
    return Round(answer["seconds"], answer["tokens"], answer["client_cpu_s"])


def end_group(process: subprocess.Popen[bytes]) -> None:
    """The process and all it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_TIMEOUT_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline_s:
        if process.poll() is not None:
            raise RuntimeError(f"{process.args!r} ended with status {process.returncode}")
        try:
            with urllib.request.urlopen(url, timeout=5.0) as answer:
                if answer.status == 200:
                    return
        except OSError:  # not there yet, or 503 while it loads
            time.sleep(0.2)
    raise RuntimeError(f"{url} did not answer in {START_TIMEOUT_S:.0f} s")

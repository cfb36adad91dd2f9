"""The service under test and its processes, by what they are."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import httpx
import psutil

from tests.e2e.running import Running

INSIDE = Path(__file__).with_name("inside")
COMMANDS = {
    "gateway": "service.gateway",
    "Triton": "bin/tritonserver",
    "encoder": "vision_encoder/1/model.py",
    "decoder": "fused_decoder/1/model.py",
}


class Subject:
    """`url`, `gateway_pid`: of a gateway of its own, where the launcher's is not what is asked."""

    def __init__(
        self, running: Running, folder: Path, *, url: str | None = None, gateway_pid: int | None = None
    ) -> None:
        self.running = running
        self.url = url or running.url
        self._folder = folder
        self._gateway_pid = gateway_pid

    def find(self, role: str) -> psutil.Process | None:
        """The process that is the gateway, Triton, the encoder or the decoder, if it runs."""
        if role == "gateway" and self._gateway_pid is not None:
            return psutil.Process(self._gateway_pid)
        for process in psutil.Process(self.running.process.pid).children(recursive=True):
            with suppress(psutil.Error):
                if any(COMMANDS[role] in word for word in process.cmdline()) and process.status() not in (
                    psutil.STATUS_ZOMBIE,
                    psutil.STATUS_DEAD,
                ):
                    return process
        return None

    def process(self, role: str, timeout_s: float = 60.0) -> psutil.Process:
        """Waits for one that is being started anew."""
        deadline_s = time.monotonic() + timeout_s
        while (process := self.find(role)) is None:
            assert time.monotonic() < deadline_s, f"there is no {role}"
            time.sleep(0.1)
        return process

    def num_tasks(self) -> int | None:
        """asyncio tasks of the gateway; None if it does not say, as when it is just starting."""
        pid = self.process("gateway").pid
        path = self._folder / f"tasks-{pid}"
        path.unlink(missing_ok=True)
        os.kill(pid, signal.SIGUSR1)
        deadline_s = time.monotonic() + 3.0
        while not path.exists():
            if time.monotonic() > deadline_s:
                return None
            with suppress(httpx.TransportError):  # a loop that sleeps runs no Python
                httpx.get(f"{self.url}/livez", timeout=2.0)
            time.sleep(0.02)
        return int(path.read_text())

    def gateway_bytes(self) -> int:
        """Resident memory of the gateway and of the processes that it has."""
        total = 0
        with suppress(psutil.Error):
            gateway = self.process("gateway")
            for process in [gateway, *gateway.children(recursive=True)]:
                with suppress(psutil.Error):
                    total += process.memory_info().rss
        return total


def environment(folder: Path, checkpoint: Path, **settings: str) -> dict[str, str]:
    """Of a `Running` whose tasks can be counted."""
    return {"MODEL_PATH": str(checkpoint), "PYTHONPATH": str(INSIDE), "RELIABILITY_FOLDER": str(folder), **settings}

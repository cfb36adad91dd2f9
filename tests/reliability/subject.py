"""The service under test and its processes, by what they are."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

import psutil

from tests.e2e.running import Running
from tests.reliability.watched import LoopState, loop_state, watching

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
        self.folder = folder
        self._gateway_pid = gateway_pid

    def find(self, role: str) -> psutil.Process | None:
        """The process that is the gateway, Triton, the encoder or the decoder, if it runs."""
        if role == "gateway" and self._gateway_pid is not None:
            return psutil.Process(self._gateway_pid)
        for process in psutil.Process(self.running.process.pid).children(recursive=True):
            with suppress(psutil.Error):
                if any(word.endswith(COMMANDS[role]) for word in process.cmdline()) and process.status() not in (
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

    def loop_state(self) -> LoopState | None:
        return loop_state(self.folder, self.process("gateway").pid, self.url)


def environment(folder: Path, checkpoint: Path, **settings: str) -> dict[str, str]:
    """Of a `Running` whose gateway's loop can be seen."""
    return {"MODEL_PATH": str(checkpoint), **watching(folder), **settings}

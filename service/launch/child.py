"""A process of ours: in its own session, ended with everything it started, and never outliving the launcher."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path

from service.launch.settings import ROOT

PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None, use_errno=True)


class Child:
    """Started on construction. Its own session keeps a terminal's Ctrl-C away: the launcher decides the order."""

    def __init__(
        self,
        command: list[str],
        environment: Mapping[str, str],
        *,
        death_signal: signal.Signals,
        log: Path,
    ) -> None:
        """`death_signal`: what the kernel sends it when the launcher is killed. `log`: begins anew."""
        launcher = os.getpid()

        def follow_launcher() -> None:  # runs between fork and exec
            LIBC.prctl(PR_SET_PDEATHSIG, death_signal)
            if os.getppid() != launcher:
                os._exit(1)

        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                env=dict(environment),
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=follow_launcher,
            )
        self.pid = self._process.pid
        self.exit_fd: int | None = os.pidfd_open(self.pid)  # readable once it has ended

    def exit_status(self) -> int | None:
        return self._process.poll()

    def stop(self, timeout_s: float) -> None:
        """SIGTERM, then after `timeout_s` SIGKILL, to it; whatever is left of its session is killed. Reaps it."""
        if self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout_s)
        self.kill()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        if self.exit_fd is not None:
            os.close(self.exit_fd)
            self.exit_fd = None

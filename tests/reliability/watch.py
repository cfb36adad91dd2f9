"""Looks at the service once in a while, from a thread of its own: is it ready, and how much memory has each process."""

from __future__ import annotations

import threading
import time
from types import TracebackType

import httpx

from tests.reliability.subject import Subject
from tests.reliability.watched import resident_bytes

ROLES = ("gateway", "encoder", "decoder", "Triton")


class Watch:
    """`bytes_of`: samples of each process with all below it: Triton's holds the models'. `unready`: what was said."""

    def __init__(self, subject: Subject, period_s: float, *, probe: bool = True) -> None:
        self._url = subject.url
        self._pids = {role: subject.process(role).pid for role in ROLES}
        self._period_s = period_s
        self._probe = probe
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.bytes_of: dict[str, list[int]] = {role: [] for role in ROLES}
        self.unready: list[str] = []
        self.num_probes = 0

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        begin_s = time.monotonic()
        while not self._stopping.is_set():
            if self._probe:
                self._ask(time.monotonic() - begin_s)
            for role, pid in self._pids.items():
                if memory := resident_bytes(pid):  # 0: it has ended
                    self.bytes_of[role].append(memory)
            self._stopping.wait(self._period_s)

    def _ask(self, at_s: float) -> None:
        self.num_probes += 1
        try:
            status = str(httpx.get(f"{self._url}/readyz", timeout=5.0, verify=False).status_code)
        except httpx.TransportError as error:
            status = type(error).__name__
        if status != "200":
            self.unready.append(f"{status} after {at_s:.0f} s")

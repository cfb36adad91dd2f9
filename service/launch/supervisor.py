"""Keeps the services running: sleeps until a process ends or a signal comes, restarts, and stops all in order."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from service.errors import Unavailable
from service.launch.child import Child

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
POLL_S = 0.1  # while a service starts; otherwise nothing polls
FIRST_PAUSE_S, MAX_PAUSE_S = 0.5, 30.0
STEADY_S = 60.0  # who ran that long starts over with the first pause


@dataclass
class Service:
    """`members`: pids of processes that it started and cannot do without; asked once it is ready."""

    name: str
    start: Callable[[], Child]
    is_ready: Callable[[], bool]
    explain: Callable[[], str]  # why it ended, in one line
    stop_timeout_s: float
    members: Callable[[Child], list[int]] = lambda child: []
    child: Child | None = None
    ready_s: float | None = None  # how long it took; None: not ready
    started_at_s: float = 0.0
    restart_at_s: float = 0.0
    pause_s: float = FIRST_PAUSE_S
    member_fds: list[int] = field(default_factory=list)


class Supervisor:
    """`services` stop in their order and start all at once."""

    def __init__(self, services: list[Service], say: Callable[[str], None]) -> None:
        self._services = services
        self._say = say
        self._selector = selectors.DefaultSelector()
        self._stop_asked = 0
        self._wake_receiver, self._wake_sender = socket.socketpair()
        self._wake_receiver.setblocking(False)
        self._wake_sender.setblocking(False)
        self._selector.register(self._wake_receiver, selectors.EVENT_READ)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Starts the services on entry, stops them on exit, whatever happened; takes the stop signals. Once only."""

        def count(number: int, frame: object) -> None:
            self._stop_asked += 1
            if self._stop_asked > 1:  # asked again while we drain: no more patience
                for service in self._services:
                    service.stop_timeout_s = 0.0
                    if service.child is not None and service.child.exit_status() is None:
                        with contextlib.suppress(ProcessLookupError):
                            os.killpg(service.child.pid, signal.SIGKILL)

        before = {number: signal.signal(number, count) for number in STOP_SIGNALS}
        signal.set_wakeup_fd(self._wake_sender.fileno(), warn_on_full_buffer=False)
        try:
            for service in self._services:
                self._start(service)
            yield
        finally:
            for service in self._services:
                self._stop(service, service.stop_timeout_s)
            signal.set_wakeup_fd(-1)
            for number, handler in before.items():
                signal.signal(number, handler)
            self._selector.close()
            self._wake_receiver.close()
            self._wake_sender.close()

    def wake(self) -> None:
        """Have `wait` ask its `done` again. For other threads."""
        with contextlib.suppress(OSError):  # closed: nobody waits any more
            self._wake_sender.send(b"\0")

    def wait_until_ready(self) -> bool:
        """False: asked to stop. Raises Unavailable if a service ends before it was ready for the first time."""
        return self._wait(lambda: all(service.ready_s is not None for service in self._services), restart=False)

    def wait(self, done: Callable[[], bool]) -> bool:
        """Watch and restart until `done`, asked after each wake-up, or until asked to stop (False)."""
        return self._wait(done, restart=True)

    def _wait(self, done: Callable[[], bool], restart: bool) -> bool:
        while True:
            for service in self._services:
                self._look_after(service, restart)
            if self._stop_asked:
                return False
            if done():
                return True
            for key, _ in self._selector.select(self._pause_s()):
                if key.fileobj is self._wake_receiver:
                    with contextlib.suppress(BlockingIOError):
                        self._wake_receiver.recv(4096)

    def _pause_s(self) -> float | None:
        if any(service.child is not None and service.ready_s is None for service in self._services):
            return POLL_S
        dues = [service.restart_at_s for service in self._services if service.child is None]
        return max(0.0, min(dues) - time.monotonic()) if dues else None

    def _look_after(self, service: Service, restart: bool) -> None:
        now_s = time.monotonic()
        if service.child is None:
            if now_s >= service.restart_at_s:
                self._start(service)
            return
        status = service.child.exit_status()
        if status is None and not any(_has_ended(fd) for fd in service.member_fds):
            if service.ready_s is None and service.is_ready():
                service.ready_s = time.monotonic() - service.started_at_s
                self._watch_members(service)
                if restart:
                    self._say(f"{service.name} is back after {service.ready_s:.1f} s")
            return
        if not restart:
            raise Unavailable(f"{service.name} did not start: {service.explain()}")
        if now_s - service.started_at_s > STEADY_S:
            service.pause_s = FIRST_PAUSE_S
        end = "a process of its ended" if status is None else f"it ended with status {status}"
        reason = f": {service.explain()}" if status is not None and status > 0 else ""  # who is killed gives none
        self._say(f"{service.name}: {end}{reason}; restarting it in {service.pause_s:.1f} s")
        self._stop(service, 0.0)
        service.restart_at_s = now_s + service.pause_s
        service.pause_s = min(2 * service.pause_s, MAX_PAUSE_S)

    def _start(self, service: Service) -> None:
        service.started_at_s, service.ready_s = time.monotonic(), None
        service.child = service.start()
        self._selector.register(service.child.exit_fd or 0, selectors.EVENT_READ)

    def _watch_members(self, service: Service) -> None:
        assert service.child is not None
        for pid in service.members(service.child):
            with contextlib.suppress(ProcessLookupError):
                fd = os.pidfd_open(pid)
                service.member_fds.append(fd)
                self._selector.register(fd, selectors.EVENT_READ)

    def _stop(self, service: Service, timeout_s: float) -> None:
        for fd in service.member_fds:
            self._selector.unregister(fd)
            os.close(fd)
        service.member_fds = []
        if service.child is not None:
            self._selector.unregister(service.child.exit_fd or 0)
            service.child.stop(timeout_s)
            service.child = None


def _has_ended(pid_fd: int) -> bool:
    with selectors.DefaultSelector() as selector:
        selector.register(pid_fd, selectors.EVENT_READ)
        return bool(selector.select(0))

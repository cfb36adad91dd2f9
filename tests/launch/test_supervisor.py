"""The supervisor over small real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from service.errors import Unavailable
from service.launch.child import Child
from service.launch.supervisor import Service, Supervisor
from tests.e2e.running import wait_until_gone

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]
DEAF = [
    sys.executable,
    "-c",
    "import signal, time; signal.signal(15, signal.SIG_IGN); print(flush=True); time.sleep(60)",
]


def make_service(name: str, folder: Path, command: list[str] = SLEEP, **fields: object) -> Service:
    log = folder / f"{name}.log"
    service = Service(
        name=name,
        start=lambda: Child(command, os.environ, death_signal=signal.SIGKILL, log=log),
        is_ready=lambda: True,
        explain=lambda: "it had enough",
        stop_timeout_s=5.0,
        pause_s=0.01,
    )
    for field, value in fields.items():
        setattr(service, field, value)
    return service


def within(seconds: float, condition: Callable[[], bool]) -> Callable[[], bool]:
    deadline_s = time.monotonic() + seconds

    def done() -> bool:
        assert time.monotonic() < deadline_s
        return condition()

    return done


def replaced(service: Service, pid: int) -> Callable[[], bool]:
    """Another process runs, and is ready."""
    return lambda: service.child is not None and service.child.pid != pid and service.ready_s is not None


def pid_of(service: Service) -> int:
    assert service.child is not None
    return service.child.pid


def test_a_process_that_ends_is_started_again(tmp_path: Path) -> None:
    service, said = make_service("a", tmp_path), []
    supervisor = Supervisor([service], said.append)
    with supervisor.running():
        assert supervisor.wait_until_ready()
        first = pid_of(service)
        os.kill(first, signal.SIGKILL)
        back = within(10, replaced(service, first))
        assert supervisor.wait(back)
        second = pid_of(service)
    assert said[0] == "a: it ended with status -9; restarting it in 0.0 s"
    assert "back" in said[-1]
    assert not wait_until_gone({first, second}, 0)


def test_a_restart_says_why_the_process_ended(tmp_path: Path) -> None:
    service, said = make_service("a", tmp_path, ["false"], is_ready=lambda: False), []
    supervisor = Supervisor([service], said.append)
    with supervisor.running():
        assert supervisor.wait(within(10, lambda: bool(said)))
    assert said[0] == "a: it ended with status 1: it had enough; restarting it in 0.0 s"


def test_the_pause_before_a_restart_grows(tmp_path: Path) -> None:
    service = make_service("a", tmp_path)
    supervisor = Supervisor([service], lambda line: None)
    pauses = []
    with supervisor.running():
        supervisor.wait_until_ready()
        for _ in range(3):
            pauses.append(service.pause_s)
            before = pid_of(service)
            os.kill(before, signal.SIGKILL)
            assert supervisor.wait(within(10, replaced(service, before)))
    assert pauses == [0.01, 0.02, 0.04]


@pytest.mark.parametrize("by_itself", [False, True])
def test_the_end_of_a_member_restarts_its_service(tmp_path: Path, by_itself: bool) -> None:
    command = [sys.executable, "-c", "import os, sys; sys.stdin.read(); os._exit(1)"]
    member = subprocess.Popen(command, stdin=subprocess.PIPE)
    service = make_service("a", tmp_path, members=lambda child: [member.pid] if member.poll() is None else [])
    supervisor = Supervisor([service], lambda line: None)
    with supervisor.running():
        supervisor.wait_until_ready()
        first = pid_of(service)
        if by_itself:
            assert member.stdin is not None
            member.stdin.close()
        else:
            member.kill()
        assert supervisor.wait(within(10, lambda: service.child is not None and service.child.pid != first))
    assert member.wait() == (1 if by_itself else -signal.SIGKILL)
    if not by_itself:
        assert member.stdin is not None
        member.stdin.close()


def test_a_process_that_ends_before_it_was_ready_is_explained(tmp_path: Path) -> None:
    services = [make_service("good", tmp_path), make_service("bad", tmp_path, ["false"], is_ready=lambda: False)]
    supervisor = Supervisor(services, lambda line: None)
    with pytest.raises(Unavailable, match="bad did not start: it had enough"), supervisor.running():
        good = pid_of(services[0])
        supervisor.wait_until_ready()
    assert not wait_until_gone({good}, 0)


def test_services_stop_in_their_order(tmp_path: Path) -> None:
    note = tmp_path / "order"
    code = (
        "import signal, sys, time, pathlib\n"
        "def end(*_):\n"
        "    time.sleep(0.2); open(sys.argv[1], 'a').write(sys.argv[2]); sys.exit(0)\n"
        "signal.signal(15, end); print(flush=True); time.sleep(60)\n"
    )
    services = [
        make_service(
            name,
            tmp_path,
            [sys.executable, "-c", code, str(note), name],
            is_ready=lambda log=tmp_path / f"{name}.log": log.stat().st_size > 0,
        )
        for name in ("x", "y")
    ]
    supervisor = Supervisor(services, lambda line: None)
    with supervisor.running():
        assert supervisor.wait_until_ready()
    assert note.read_text() == "xy"


def test_a_process_that_ignores_the_request_to_stop_is_killed(tmp_path: Path) -> None:
    service = make_service("deaf", tmp_path, DEAF, stop_timeout_s=0.2)
    service.is_ready = lambda: (tmp_path / "deaf.log").stat().st_size > 0
    supervisor = Supervisor([service], lambda line: None)
    with supervisor.running():
        supervisor.wait_until_ready()
        pid = pid_of(service)
    assert not wait_until_gone({pid}, 0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_signal_ends_the_wait(tmp_path: Path, number: signal.Signals) -> None:
    supervisor = Supervisor([make_service("a", tmp_path)], lambda line: None)
    before = signal.getsignal(number)
    with supervisor.running():
        supervisor.wait_until_ready()
        threading.Timer(0.1, os.kill, (os.getpid(), number)).start()
        assert not supervisor.wait(lambda: False)
    assert signal.getsignal(number) == before

"""What is done to the service while others ask: each fault alone, over when its function returns."""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass

from tests.reliability import checkout
from tests.reliability.client import CLEAN, CODES, Client
from tests.reliability.load import Load
from tests.reliability.questions import GENERATE, Question, generate
from tests.reliability.subject import Subject

Inflict = Callable[[Subject, Load], Awaitable[None]]
ALL = frozenset(CODES)
NONE: frozenset[str] = frozenset()
FULL = frozenset({"overloaded"})
HEAD = f"POST {GENERATE} HTTP/1.1\r\nHost: x\r\n".encode()


@dataclass(frozen=True)
class Fault:
    """`may_tell`: codes with which innocent requests may fail. `cuts`: it ends the process that holds connections."""

    name: str
    inflict: Inflict
    may_tell: frozenset[str] = NONE
    cuts: bool = False


def kill(role: str) -> Fault:
    async def inflict(subject: Subject, load: Load) -> None:
        subject.process(role).send_signal(signal.SIGKILL)

    return Fault(f"kill -9 of {_the(role)}", inflict, ALL, cuts=role == "gateway")


def stop(role: str, seconds: float) -> Fault:
    async def inflict(subject: Subject, load: Load) -> None:
        process = subject.process(role)
        process.send_signal(signal.SIGSTOP)
        try:
            await asyncio.sleep(seconds)
        finally:
            if process.is_running():
                process.send_signal(signal.SIGCONT)

    return Fault(f"SIGSTOP of {_the(role)} for {seconds:.0f} s", inflict, ALL)


def full_pools(hogs: list[Question]) -> Fault:
    """Several requests at once of which each takes a good part of all blocks and every page."""

    async def inflict(subject: Subject, load: Load) -> None:
        before = subject.running.metric("crossgate_num_preemptions_total")
        await asyncio.gather(*(load.ask(hog) for hog in hogs))
        assert subject.running.metric("crossgate_num_preemptions_total") > before, "the pools were never full"

    return Fault("full pools of K/V blocks and pages", inflict)


def full_queue(questions: list[Question], num_requests: int) -> Fault:
    async def inflict(subject: Subject, load: Load) -> None:
        await asyncio.gather(*(load.ask(questions[number % len(questions)]) for number in range(num_requests)))

    return Fault(f"a full queue: {num_requests} requests at once", inflict, FULL)


def slow_readers(num_readers: int, limit_s: float) -> Fault:
    """Clients that ask for a long answer and read nothing of it, with small buffers."""
    body = generate("Tell me all of it.", (), stream=True, max_tokens=3500).body
    length = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"

    async def inflict(subject: Subject, load: Load) -> None:
        await _stay(subject, [HEAD + length.encode() + body] * num_readers, limit_s)

    return Fault(f"{num_readers} readers that do not read", inflict)


def half_open(num_connections: int, limit_s: float) -> Fault:
    """A third says nothing, a third sends half a head, a third half a body."""
    half_body = HEAD + b'Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n{"prompt": "H'
    sayings = [b"", HEAD, half_body] * (num_connections // 3)

    async def inflict(subject: Subject, load: Load) -> None:
        await _stay(subject, sayings, limit_s)

    return Fault(f"{len(sayings)} half-open connections", inflict)


def failing_steps(num_each: int) -> Fault:
    """Marked requests break the decoder's steps in four ways, the last in mid-answer. They alone may be told so."""
    kinds = (checkout.RAISE, checkout.OUT_OF_MEMORY, checkout.NOT_A_NUMBER)
    prompts = [[1, 50, *[checkout.MARK, checkout.MARK, kind] * 3] for kind in kinds]
    broken = [generate(prompt, (), stream=True, max_tokens=8) for prompt in prompts]
    late = generate([1, *range(40, 100)] * 12, (), stream=True, max_tokens=200)  # 732 tokens: fails after some 45

    async def inflict(subject: Subject, load: Load) -> None:
        async with Client(subject.url) as client:
            for _ in range(num_each):
                replies = await asyncio.gather(*(client.ask(each.path, each.body) for each in [*broken, late]))
                untold = [f"{reply.outcome} {reply.detail}" for reply in replies if reply.outcome not in CLEAN]
                assert not untold, f"requests that broke their step were not told so: {untold}"

    return Fault(f"{4 * num_each} requests that break their step", inflict)


async def _stay(subject: Subject, sayings: list[bytes], limit_s: float) -> None:
    """Connections of which each says something and then neither speaks nor listens; all are to be closed."""
    host, port = subject.url.removeprefix("http://").split(":")
    with ExitStack() as stack:
        ours = set()
        for said in sayings:
            connection = stack.enter_context(closing(socket.socket()))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect((host, int(port)))
            connection.sendall(said)
            ours.add(connection.getsockname()[1])
            await asyncio.sleep(0.005)
        deadline_s = time.monotonic() + limit_s
        while held := ours & _peers(subject):
            assert time.monotonic() < deadline_s, (
                f"{len(held)} of {len(ours)} connections are open after {limit_s:.0f} s"
            )
            await asyncio.sleep(1.0)


def _peers(subject: Subject) -> set[int]:
    """Ports at the other ends of the gateway's connections. Asking our own sockets would mean to read from them."""
    return {each.raddr.port for each in subject.process("gateway").net_connections("tcp") if each.raddr}


def _the(role: str) -> str:
    return role if role == "Triton" else f"the {role}"

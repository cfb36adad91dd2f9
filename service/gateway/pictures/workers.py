"""The picture workers as the gateway sees them: asked one picture at a time each, killed and replaced when need be.

Processes, not threads: a decoder in a thread can be neither stopped nor limited, and a fault in one ends the gateway.
Started with `exec`, not forked: a fork of a process with gRPC's threads is not safe, and would copy its memory.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from service.errors import InvalidRequest, Overloaded, TooLarge, Unavailable
from service.gateway.pictures.fair_queue import FairQueue
from service.gateway.pictures.worker import HEAD, Setup, head_bytes

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[3]  # has service/
RETRY_AFTER_S = 1
GRACE_S = 0.5  # for a picture that nobody waits for any more, before it costs a worker's start
# memory of a large picture goes back to the system, not to a pool; numpy starts no threads
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "8388608", "MALLOC_TRIM_THRESHOLD_": "8388608", "OPENBLAS_NUM_THREADS": "1"}


class Workers:
    """`timeout_s`: for one picture, from its first byte sent to its last pixel."""

    def __init__(self, setup: Setup, *, num_workers: int, timeout_s: float) -> None:
        self._setup = pickle.dumps(setup)
        self._num_workers = num_workers
        self._timeout_s = timeout_s
        self._queue = FairQueue(num_workers, setup.limits.memory_bytes)
        self._idle: list[_Worker | None] = []  # None: a place whose worker could not be started
        self._tasks: set[asyncio.Task[Any]] = set()
        self._ending: set[asyncio.Task[int]] = set()

    @property
    def pids(self) -> list[int]:
        """Of those that have nothing to do."""
        return [worker.pid for worker in self._idle if worker is not None]

    def start(self) -> None:
        """In the thread of the event loop that will ask: workers end with it."""
        self._idle = [self._start() for _ in range(self._num_workers)]

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        while self._idle:
            if (worker := self._idle.pop()) is not None:
                self._end(worker)
        await asyncio.gather(*self._ending)

    async def ask(
        self,
        asker: object,
        head: dict[str, Any],
        content: Iterable[bytes],
        *,
        heavy_bytes: int,
        max_wait_s: float,
    ) -> tuple[dict[str, Any], bytes]:
        """A worker's answer, once one is free for us. Who leaves frees the worker after GRACE_S at the latest.

        Raises InvalidRequest or TooLarge for head["field"], Overloaded, or Unavailable.
        """
        try:
            async with asyncio.timeout(max_wait_s):
                await self._queue.take(asker, heavy_bytes)
        except TimeoutError as error:
            raise Overloaded("Too many pictures wait to be decoded.", retry_after_s=RETRY_AFTER_S) from error
        head = {**head, "heavy_bytes": heavy_bytes}
        task = asyncio.create_task(self._converse(head, content, heavy_bytes))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda task: task.cancelled() or task.exception())  # somebody may have left
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            asyncio.get_running_loop().call_later(GRACE_S, task.cancel)
            raise

    async def _converse(
        self, head: dict[str, Any], content: Iterable[bytes], heavy_bytes: int
    ) -> tuple[dict[str, Any], bytes]:
        worker = self._idle.pop()
        if worker is None or worker.has_ended:
            worker = self._replace(worker)
        can_go_on = False
        try:
            if worker is None:
                raise Unavailable("No picture can be decoded now.", retry_after_s=RETRY_AFTER_S)
            async with asyncio.timeout(self._timeout_s):
                answer, body = await worker.ask(head, content)
            can_go_on = not answer.get("retires")
            return answer, body
        except TimeoutError as error:
            log.warning("a picture took longer than %g s to decode; its worker is replaced", self._timeout_s)
            limit = f"A picture takes at most {self._timeout_s:g} seconds to decode."
            raise TooLarge(limit, param=head["field"]) from error
        except (OSError, EOFError) as error:
            log.warning("a worker ended while it decoded a picture; it is replaced")
            raise InvalidRequest("The picture cannot be decoded.", param=head["field"]) from error
        finally:
            self._idle.append(worker if can_go_on else self._replace(worker))
            self._queue.give_back(heavy_bytes)

    def _replace(self, worker: _Worker | None) -> _Worker | None:
        self._end(worker)
        return self._start()

    def _start(self) -> _Worker | None:
        """None if the system has no process, memory or open file left for it: the next picture tries again."""
        try:
            return _Worker(self._setup)
        except OSError as error:
            log.error("a picture worker could not be started: %s", error.strerror)
            return None

    def _end(self, worker: _Worker | None) -> None:
        """Killed now, reaped off the loop: the kernel may have much memory to take back."""
        if worker is None:
            return
        worker.kill()
        task = asyncio.create_task(asyncio.to_thread(worker.wait))
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)


class _Worker:
    """One process and the socket to it."""

    def __init__(self, setup: bytes) -> None:
        self._socket, theirs = socket.socketpair()
        environment = {name: value for name, value in os.environ.items() if not name.startswith("CROSSGATE_")}
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        with theirs, ExitStack() as failing:
            failing.callback(self._socket.close)
            self._process = subprocess.Popen(
                [sys.executable, "-m", "service.gateway.pictures.worker", str(os.getpid())],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                env={**environment, **ENVIRONMENT, "PYTHONPATH": path},
                start_new_session=True,  # a terminal's Ctrl-C is the gateway's alone
            )
            failing.pop_all()
        self.pid = self._process.pid
        self._socket.sendall(head_bytes({"length": len(setup)}) + setup)
        self._socket.setblocking(False)
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    async def ask(self, head: dict[str, Any], content: Iterable[bytes]) -> tuple[dict[str, Any], bytes]:
        """Raises OSError or EOFError if it ends."""
        if self._streams is None:
            self._streams = await asyncio.open_unix_connection(sock=self._socket)
        reader, writer = self._streams
        writer.write(head_bytes(head))
        for piece in content:
            writer.write(piece)
            await writer.drain()
        (length,) = HEAD.unpack(await reader.readexactly(HEAD.size))
        answer: dict[str, Any] = json.loads(await reader.readexactly(length))
        return answer, await reader.readexactly(answer["length"])

    def kill(self) -> None:
        self._process.kill()
        if self._streams is None:
            self._socket.close()
        else:
            self._streams[1].transport.abort()

    def wait(self) -> int:
        return self._process.wait()

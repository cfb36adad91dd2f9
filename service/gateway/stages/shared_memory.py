"""Memory that this process and a Triton on the same host both see, for latents that are too large to be sent.

A region is made, registered with Triton, and its name unlinked at once. It goes when nothing here refers to it any
more; Triton itself refuses to let go what a call still uses, and is asked again then. What a process that died has left
with Triton, the next one lets go: who lives, holds the lock of a file of his own in the same folder.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import mmap
import os
import secrets
import weakref
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2

log = logging.getLogger(__name__)

FOLDER = Path("/dev/shm")  # where POSIX shared memory lies on Linux
PREFIX = "crossgate"
RETRY_S = 60.0  # after a failure nothing is shared for so long
CALL_TIMEOUT_S = 2.0  # of what is asked of Triton about regions
RELEASE_PAUSES_S = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)  # between attempts to have one let go that is in use


class NotShared(Exception):
    """Triton does not know a region that was registered with it."""


@dataclass(eq=False)
class Region:
    """`memory`: all of it, uint8 [num_bytes]. Views of it keep the memory, but only a Region keeps it with Triton."""

    name: str
    memory: NDArray[np.uint8]


class SharedMemory:
    """`stub`: gives that of the Triton that regions are registered with. `max_bytes`: of all regions together.

    Belongs to one event loop.
    """

    def __init__(self, stub: Callable[[], Any], max_bytes: int, folder: Path = FOLDER) -> None:
        self._stub = stub
        self._max_bytes = max_bytes
        self._folder = folder
        self._owner = f"{PREFIX}.{secrets.token_hex(8)}"
        self._lock: int | None = None
        self._count = 0
        self._registered: dict[str, int] = {}  # bytes of each that Triton has or is about to have
        self._off_until_s = 0.0
        self._sweep: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def is_on(self) -> bool:
        return asyncio.get_running_loop().time() >= self._off_until_s

    async def take(self, num_bytes: int) -> Region | None:
        """A region of that size. None if there can be none just now."""
        if not self.is_on or sum(self._registered.values()) + num_bytes > self._max_bytes:
            return None
        task = self._start(self._take(num_bytes))
        try:
            return await asyncio.shield(task)  # who leaves must not leave it half made
        except asyncio.CancelledError:
            if task.cancelled():  # the channel was closed
                return None
            raise

    def turn_off(self, why: object) -> None:
        """Share nothing for a while."""
        log.warning("latents go over gRPC for %g s: %s", RETRY_S, why)
        self._off_until_s = asyncio.get_running_loop().time() + RETRY_S

    async def close(self) -> None:
        """Before the channel is closed: let go what there is."""
        self._off_until_s = float("inf")
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(self._ask_to_unregister(name) for name in self._registered), return_exceptions=True)
        if self._lock is not None:
            (self._folder / self._owner).unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None

    async def _take(self, num_bytes: int) -> Region | None:
        self._count += 1
        name = f"{self._owner}.{self._count}"
        self._registered[name] = num_bytes
        try:
            if self._sweep is None:
                self._sweep = self._start(self._let_go_of_the_dead())
            try:
                await self._sweep
            except (OSError, grpc.RpcError, grpc.aio.UsageError):
                self._sweep = None  # the next one tries again
                raise
            memory = await asyncio.to_thread(self._map, name, num_bytes)
            try:
                request = service_pb2.SystemSharedMemoryRegisterRequest(name=name, key=f"/{name}", byte_size=num_bytes)
                await self._stub().SystemSharedMemoryRegister(request, timeout=CALL_TIMEOUT_S)
            finally:
                (self._folder / name).unlink()
        except (OSError, grpc.RpcError, grpc.aio.UsageError) as error:
            self._start(self._unregister(name))  # its answer may have been lost
            self.turn_off(error.details() if isinstance(error, grpc.aio.AioRpcError) else error)
            return None
        region = Region(name, memory)
        weakref.finalize(region, _soon, asyncio.get_running_loop(), self._release, name).atexit = False
        return region

    def _map(self, name: str, num_bytes: int) -> NDArray[np.uint8]:
        """Raises OSError if there is no room: what is only promised would end the process that writes there."""
        descriptor = os.open(self._folder / name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, num_bytes)
            return np.frombuffer(mmap.mmap(descriptor, num_bytes), np.uint8)
        except OSError:
            (self._folder / name).unlink()
            raise
        finally:
            os.close(descriptor)

    async def _let_go_of_the_dead(self) -> None:
        """Once, before the first region."""
        if self._lock is None:
            self._lock = os.open(self._folder / self._owner, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        request = service_pb2.SystemSharedMemoryStatusRequest()
        status = await self._stub().SystemSharedMemoryStatus(request, timeout=CALL_TIMEOUT_S)
        ours = [name for name in status.regions if name.startswith(f"{PREFIX}.")]
        for owner in {name.rpartition(".")[0] for name in ours} - {self._owner}:
            if not _is_locked(self._folder / owner):
                for name in ours:
                    if name.startswith(f"{owner}."):
                        self._start(self._unregister(name))
                (self._folder / owner).unlink(missing_ok=True)

    def _release(self, name: str) -> None:
        self._start(self._unregister(name))

    async def _unregister(self, name: str) -> None:
        for pause_s in RELEASE_PAUSES_S:
            await asyncio.sleep(pause_s)
            if await self._ask_to_unregister(name):
                break
        self._registered.pop(name, None)

    async def _ask_to_unregister(self, name: str) -> bool:
        """Whether Triton has it no more."""
        try:
            request = service_pb2.SystemSharedMemoryUnregisterRequest(name=name)
            await self._stub().SystemSharedMemoryUnregister(request, timeout=CALL_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            return "in use" not in (error.details() or "")  # else it is gone with its Triton
        except grpc.aio.UsageError:  # the channel is closed
            return True
        return True

    def _start(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _soon(loop: asyncio.AbstractEventLoop, call: Callable[[str], None], name: str) -> None:
    """From whatever thread the last reference went in."""
    with suppress(RuntimeError):  # the loop is closed: the next process lets it go
        loop.call_soon_threadsafe(call, name)


def _is_locked(file: Path) -> bool:
    """Whether somebody lives who holds this lock."""
    try:
        descriptor = os.open(file, os.O_RDWR)
    except OSError:  # it is gone, or another user's, who may live
        return file.exists()
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False

"""A connection between gateway and Triton that can fall silent: neither side hears of it, as behind a lost route."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from types import TracebackType


class Proxy:
    """Forwards to a port of the loopback; `fall_silent` ends that for the connections that are there.

    `num_bytes`: forwarded so far, in both directions.
    """

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self.num_bytes = 0
        self._silent: set[asyncio.StreamWriter] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Proxy:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = int(self._server.sockets[0].getsockname()[1])
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def fall_silent(self) -> int:
        """How many directions of connections are silent from now on; connections that come later work."""
        self._silent |= self._writers
        return len(self._silent)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        with suppress(OSError, asyncio.CancelledError):
            back_reader, back_writer = await asyncio.open_connection("127.0.0.1", self._target_port)
            await asyncio.gather(self._forward(reader, back_writer), self._forward(back_reader, writer))
        self._tasks.discard(task)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            while data := await reader.read(1 << 16):
                if writer not in self._silent:
                    self.num_bytes += len(data)
                    writer.write(data)
                    await writer.drain()
        except OSError:
            pass
        finally:
            self._writers.discard(writer)
            if writer not in self._silent:
                writer.close()

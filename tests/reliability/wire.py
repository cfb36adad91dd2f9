"""HTTP as bytes on a socket: sends what no client library would, and reads what comes back."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

import h11

PATIENCE_S = 20.0  # for a whole request
HALF_CLOSE_S = 3.0  # then we say that no more comes: what we sent may have been the beginning of a request


@dataclass(frozen=True)
class Response:
    """`status` None: the server closed the connection, or let the time pass, without one."""

    status: int | None
    body: bytes
    seconds: float


async def exchange(port: int, raw: bytes) -> Response:
    """Send the bytes and read one response. Raises OSError if there is no connection to be had."""
    begin_s = time.monotonic()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    status, body = None, b""
    sending = asyncio.create_task(_send(writer, raw))
    try:
        async with asyncio.timeout(PATIENCE_S):
            status, body = await _read(reader, writer)
    except (TimeoutError, OSError, h11.RemoteProtocolError):
        pass
    finally:
        sending.cancel()
        writer.close()
    return Response(status, body, time.monotonic() - begin_s)


async def _send(writer: asyncio.StreamWriter, raw: bytes) -> None:
    try:
        writer.write(raw)
        await writer.drain()
        await asyncio.sleep(HALF_CLOSE_S)
        writer.write_eof()
    except OSError:
        return  # the server may answer and close before it has read everything


async def _read(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> tuple[int | None, bytes]:
    connection = h11.Connection(h11.CLIENT)
    connection.send(h11.Request(method=b"GET", target=b"/", headers=[(b"host", b"x")]))
    connection.send(h11.EndOfMessage())
    status, body = None, b""
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await reader.read(1 << 16))
        elif isinstance(event, h11.Response):
            status = event.status_code
        elif isinstance(event, h11.Data):
            body += bytes(event.data)
        elif isinstance(event, h11.EndOfMessage | h11.ConnectionClosed) or event is h11.PAUSED:
            return status, body

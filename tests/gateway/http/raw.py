"""Bytes to a real server, as no HTTP client would send them; and how long its loop stood still meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx

PATIENCE_S = 20


@asynccontextmanager
async def connection(client: httpx.AsyncClient) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    url = client.base_url
    reader, writer = await asyncio.open_connection(url.host, url.port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.01)


async def reply_to(client: httpx.AsyncClient, *pieces: bytes, pause_s: float = 0.0) -> bytes:
    """Everything that comes until the server closes."""
    async with connection(client) as (reader, writer):
        for piece in pieces:
            with contextlib.suppress(ConnectionError):
                writer.write(piece)
                await writer.drain()
            await asyncio.sleep(pause_s)
        return await all_of(reader)


def post_blocking(url: httpx.URL, path: str, body: bytes) -> bytes:
    """For another thread: what a client does with a large body is not the server's doing."""
    with socket.create_connection((url.host, url.port), timeout=PATIENCE_S) as client:
        client.sendall(head(path, "connection: close", length=len(body)) + body)
        received = b""
        while piece := client.recv(1 << 16):
            received += piece
        return received


async def all_of(reader: asyncio.StreamReader) -> bytes:
    received = b""
    async with asyncio.timeout(PATIENCE_S):
        try:
            while piece := await reader.read(1 << 16):
                received += piece
        except ConnectionError:
            pass
    return received


def head(path: str = "/v1/generate", *lines: str, length: int | None = None, method: str = "POST") -> bytes:
    named = [f"{method} {path} HTTP/1.1", "host: a", *lines]
    if length is not None:
        named.append(f"content-length: {length}")
    return ("\r\n".join(named) + "\r\n\r\n").encode()


def status(reply: bytes) -> int:
    return int(reply.split(b" ", 2)[1])


def error_of(reply: bytes) -> dict[str, Any]:
    error: dict[str, Any] = json.loads(reply.partition(b"\r\n\r\n")[2])["error"]
    return error


class Stall:
    """The longest stretch of computing between two iterations of the loop, in seconds; waiting adds nothing."""

    worst_s = 0.0


@asynccontextmanager
async def measured_stall() -> AsyncIterator[Stall]:
    stall = Stall()

    async def tick() -> None:
        while True:
            before_s, before_cpu_s = time.perf_counter(), time.process_time()
            await asyncio.sleep(0.001)
            stall_s = min(time.perf_counter() - before_s, time.process_time() - before_cpu_s)
            stall.worst_s = max(stall.worst_s, stall_s)

    ticking = asyncio.create_task(tick())
    try:
        await asyncio.sleep(0.005)
        yield stall
    finally:
        ticking.cancel()

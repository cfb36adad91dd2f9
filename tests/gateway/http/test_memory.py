"""The gateway as a process stays below 512 MiB, whatever its clients send, all at once."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from service.launch.client import answers_within
from tests.gateway.http.raw import head
from tests.gateway.test_main import checkpoint, environment_of, free_port

__all__ = ["checkpoint"]  # a fixture
MIB = 1 << 20
PATIENCE_S = 60
PICTURES = json.dumps({"prompt": "Hi", "images": ["data:image/png;base64," + "A" * (7 * MIB)] * 8}).encode()
FORM = (
    b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n' + b"x" * (60 * MIB) + b"\r\n--x--\r\n"
)


def send(port: int, content: bytes) -> None:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as client:
        client.sendall(content)
        while client.recv(1 << 16):
            pass


def post(path: str, body: bytes, *lines: str) -> bytes:
    return head(path, "connection: close", *lines, length=len(body)) + body


def hostile() -> Iterator[bytes]:
    for _ in range(6):
        yield post("/v1/generate", PICTURES)
        yield post("/v1/generate", FORM, "content-type: multipart/form-data; boundary=x")
        yield post("/v1/chat/completions", b'{"messages":[' + b"1," * (MIB // 2 - 20) + b"1]}")
        yield post("/v1/generate", b'{"prompt":"a","images":[' + b"1," * (MIB // 2 - 20) + b"1]}")
        yield b"GET / HTTP/1.1\r\n" + b"a:b\r\n" * (6 * MIB)
        yield b"GET / HTTP/1.1\r\nx: " + b"x" * (30 * MIB)
        yield head("/v1/models", method="GET") * 100_000
        yield head("/v1/generate", length=60 * MIB) + b"x" * (50 * MIB)
        yield head("/v1/generate", "transfer-encoding: chunked") + b"1\r\n \r\n" * (4 * MIB)


def peak_bytes(pid: int) -> int:
    text = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", text)[1]) << 10  # type: ignore[index]


@pytest.mark.asyncio
async def test_the_process_stays_below_512_mib(checkpoint: Path) -> None:
    port = free_port()
    environment = environment_of(checkpoint, port, CROSSGATE_BODY_TIMEOUT_S="10")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "service.gateway", env=environment, stderr=asyncio.subprocess.DEVNULL
    )
    try:
        assert await asyncio.to_thread(answers_within, "127.0.0.1", port, "/livez", PATIENCE_S)
        with ThreadPoolExecutor(16) as clients:
            sending = [asyncio.get_running_loop().run_in_executor(clients, send, port, each) for each in hostile()]
            await asyncio.gather(*sending)
        assert await asyncio.to_thread(answers_within, "127.0.0.1", port, "/livez", PATIENCE_S)
        assert peak_bytes(process.pid) < 512 * MIB
    finally:
        process.kill()
        await process.wait()

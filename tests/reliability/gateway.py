"""A gateway by itself, before any Triton: the process that `make serve` starts, on a free port, ended by its id."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from service.launch.settings import ROOT, free_ports
from tests.reliability.client import Client


@asynccontextmanager
async def gateway(
    triton_port: int, settings: dict[str, str], log: Path, root: Path = ROOT
) -> AsyncIterator[tuple[str, int]]:
    """(its URL, its pid), once it is ready."""
    (port,) = free_ports(1)
    addresses = {"HOST": "127.0.0.1", "PORT": str(port), "TRITON_URL": f"127.0.0.1:{triton_port}"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "service.gateway"],
            cwd=root,
            env={**os.environ, **settings, **addresses},
            stdout=output,
            stderr=output,
        )
    try:
        async with Client(f"http://127.0.0.1:{port}") as client:
            deadline_s = time.monotonic() + 60
            while await client.status("/readyz") != 200:
                assert time.monotonic() < deadline_s, f"the gateway is not ready:\n{log.read_text()[-2000:]}"
                assert process.poll() is None, f"the gateway has ended:\n{log.read_text()[-2000:]}"
                await asyncio.sleep(0.2)
        yield f"http://127.0.0.1:{port}", process.pid
    finally:
        process.terminate()
        try:
            await asyncio.to_thread(process.wait, 40)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

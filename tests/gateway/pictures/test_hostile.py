"""Pictures that ask for much, sixteen at a time, beside an innocent one."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from tests.gateway.conftest import Connect
from tests.gateway.hostile_pictures import HOSTILE
from tests.gateway.picture_files import encoded, file_of

pytestmark = pytest.mark.asyncio

MAX_INNOCENT_S = 2.5  # some milliseconds on an idle machine
PATIENCE_S = 6.0
MAX_GROWTH_BYTES = 330 << 20  # of the gateway and its workers, who have 192 MiB for pictures; uploads are in it
MAX_UPLOAD = 48 << 20


@pytest.mark.parametrize("name", HOSTILE)
async def test_hostile_pictures_cost_neither_memory_nor_an_innocent_one_s_time(connect: Connect, name: str) -> None:
    content = HOSTILE[name]()
    assert len(content) <= 10 << 20
    files = [("image", ("a", content))] * min(16, MAX_UPLOAD // len(content))
    async with connect(picture_workers=3) as client:

        async def innocent() -> float:
            begin = time.perf_counter()
            files = {"image": ("a.png", encoded("red", size=(40, 40)))}
            reply = await client.post("/v1/generate", data={"prompt": "<image>Hi"}, files=files)
            assert reply.status_code == 200, reply.text
            return time.perf_counter() - begin

        await innocent()
        with peak_memory() as growth:
            hostile = asyncio.create_task(client.post("/v1/generate", data={"prompt": "Hi"}, files=files, timeout=60))
            waited_s = []
            begin = time.perf_counter()
            while not hostile.done() and time.perf_counter() - begin < PATIENCE_S:
                await asyncio.sleep(0.05)
                waited_s.append(await innocent())
            if not hostile.done():
                hostile.cancel()  # it has all decoded in the end; the client has left by then
            (reply,) = await asyncio.gather(hostile, return_exceptions=True)
        assert max(waited_s, default=0.0) < MAX_INNOCENT_S
        assert max(growth) < MAX_GROWTH_BYTES
        if not isinstance(reply, asyncio.CancelledError):
            assert reply.status_code in (200, 400, 413), reply.text


async def test_a_refused_picture_frees_the_workers_from_its_siblings(connect: Connect) -> None:
    slow, broken = HOSTILE["huge_png"](), b"no picture"
    files = [("image", ("a", content)) for content in [slow] * 15 + [broken]]
    async with connect(picture_workers=2) as client:
        begin = time.perf_counter()
        reply = await client.post("/v1/generate", data={"prompt": "Hi"}, files=files)
        assert reply.status_code == 400 and reply.json()["error"]["param"] == "image[15]"
        one = {"image": ("a.png", file_of_noise())}
        assert (await client.post("/v1/generate", data={"prompt": "Hi"}, files=one)).status_code == 200
        assert time.perf_counter() - begin < 5.0  # fifteen would take a second or more each


def file_of_noise() -> bytes:
    """Heavy: it waits in the same line as the siblings did."""
    return file_of(Image.effect_noise((2500, 2500), 50).convert("RGB"), "JPEG")


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Bytes by which this process and its children grew, sampled."""
    done = threading.Event()
    before = tree_bytes()
    growth = [0]

    def watch() -> None:
        while not done.wait(0.01):
            growth.append(tree_bytes() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield growth
    finally:
        done.set()
        watcher.join()


def tree_bytes() -> int:
    total = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if os.getpid() in (int(stat.parent.name), int(fields[1])):
            total += int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
    return total

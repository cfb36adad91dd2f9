"""Picture workers are real processes: what happens when they hang, die, are left, or lose their gateway."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import sys
import textwrap
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from service.errors import InvalidRequest, Overloaded, TooLarge, Unavailable
from service.families import Family
from service.families.pixels import resize_square
from service.gateway.pictures.decode import PictureLimits, decode_picture
from service.gateway.pictures.key import picture_key
from service.gateway.pictures.read import PictureReader
from service.gateway.question import PictureSource
from tests.gateway.checkpoints import IMAGE_SIZE
from tests.gateway.hostile_pictures import huge_interlaced_png, huge_webp
from tests.gateway.http.raw import until
from tests.gateway.picture_files import data_url, encoded, file_of

pytestmark = pytest.mark.asyncio

ROOT = Path(__file__).resolve().parents[3]
GOOD = PictureSource(encoded(), "good")
SLOW = PictureSource(huge_interlaced_png(), "slow")  # seconds
LIMITS = PictureLimits(max_images=16, max_image_bytes=10 << 20, max_image_pixels=32_000_000, memory_bytes=192 << 20)


@asynccontextmanager
async def reader(
    family: Family, *, num_workers: int = 1, timeout_s: float = 30.0, max_wait_s: float = 60.0
) -> AsyncIterator[PictureReader]:
    reader = PictureReader(family, LIMITS, num_workers=num_workers, timeout_s=timeout_s, max_wait_s=max_wait_s)
    reader.workers.start()
    try:
        yield reader
    finally:
        await reader.workers.close()


async def gone(pid: int) -> bool:
    """Within five seconds. A zombie is not gone."""
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists():
            return True
        await asyncio.sleep(0.05)
    return False


async def until_at_work(pictures: PictureReader) -> None:
    """On a heavy picture: before that, a worker looks at its headers."""
    await until(lambda: pictures.workers._queue._free_bytes < LIMITS.memory_bytes)


async def test_a_worker_says_what_this_process_would(family: Family) -> None:
    pixels = resize_square(decode_picture(GOOD.content, "good", 10**6), IMAGE_SIZE)
    async with reader(family) as pictures:
        for source in (GOOD, PictureSource(data_url(GOOD.content), "good")):
            (picture,) = await pictures.read((source,))
            assert (picture.pixels == pixels).all() and picture.key == picture_key(pixels, family.config_identity)


async def test_workers_are_small_and_hold_no_secret(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CROSSGATE_API_KEYS", "hush-hush")
    async with reader(family) as pictures:
        await pictures.read((GOOD,))
        (pid,) = pictures.workers.pids
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        assert pages * os.sysconf("SC_PAGE_SIZE") < 60 << 20
        assert b"hush-hush" not in Path(f"/proc/{pid}/environ").read_bytes()


async def test_the_deadline_ends_the_work_itself(family: Family) -> None:
    async with reader(family) as pictures:
        await pictures.read((GOOD,))
        (pid,) = pictures.workers.pids
        pictures.workers._timeout_s = 0.3
        with pytest.raises(TooLarge, match=r"at most 0\.3 seconds") as caught:
            await pictures.read((SLOW,))
        assert caught.value.param == "slow"
        assert await gone(pid)
        pictures.workers._timeout_s = 30.0
        await pictures.read((GOOD,))


async def test_a_worker_that_dies_costs_one_picture(family: Family) -> None:
    async with reader(family) as pictures:
        await pictures.read((GOOD,))
        (pid,) = pictures.workers.pids
        asked = asyncio.create_task(pictures.read((SLOW,)))
        await until_at_work(pictures)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(InvalidRequest) as caught:
            await asked
        assert caught.value.param == "slow"
        await pictures.read((GOOD,))


async def test_a_worker_that_died_in_its_sleep_costs_none(family: Family) -> None:
    async with reader(family) as pictures:
        await pictures.read((GOOD,))
        (pid,) = pictures.workers.pids
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        await pictures.read((GOOD,))


async def test_a_system_that_starts_no_process_costs_pictures_but_no_turn(family: Family) -> None:
    async with reader(family) as pictures:
        await pictures.read((GOOD,))
        (pid,) = pictures.workers.pids
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            for _ in range(2):
                with pytest.raises(Unavailable) as caught:
                    await pictures.read((GOOD,))
                assert caught.value.retry_after_s
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        await pictures.read((GOOD,))


async def test_a_worker_that_cannot_be_replaced_now_is_replaced_later(family: Family) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with reader(family) as pictures:
        for _ in range(2):
            (pid,) = pictures.workers.pids
            os.kill(pid, signal.SIGKILL)
            await asyncio.sleep(0.2)
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))  # as if no file could be opened any more
            try:
                for _ in range(2):
                    with pytest.raises(Unavailable):
                        await asyncio.wait_for(pictures.read((GOOD,)), 5)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            assert len(await asyncio.wait_for(pictures.read((GOOD, GOOD)), 20)) == 2


async def test_who_leaves_frees_the_worker_and_a_short_picture_costs_none(family: Family) -> None:
    async with reader(family) as pictures:
        await pictures.read((GOOD,))
        (pid,) = pictures.workers.pids
        for source, killed in ((GOOD, False), (SLOW, True)):
            asked = asyncio.create_task(pictures.read((source,)))
            await asyncio.sleep(0)
            if killed:
                await until_at_work(pictures)
            asked.cancel()
            begin = time.perf_counter()
            await pictures.read((GOOD,))
            assert time.perf_counter() - begin < 3.0
            assert (pictures.workers.pids != [pid]) is killed


async def test_waiting_for_a_worker_is_bounded(family: Family) -> None:
    async with reader(family, max_wait_s=0.2) as pictures:
        await pictures.read((GOOD,))
        asked = asyncio.create_task(pictures.read((SLOW,)))
        await until_at_work(pictures)
        with pytest.raises(Overloaded) as caught:
            await pictures.read((GOOD,))
        assert caught.value.retry_after_s
        asked.cancel()


def exhausting(picture: Image.Image) -> NDArray[np.uint8]:
    return np.zeros((3, 1 << 30, 1), np.uint8) + np.uint8(1)


def hanging(picture: Image.Image) -> NDArray[np.uint8]:
    time.sleep(120)
    return np.zeros((3, 1, 1), np.uint8)


async def test_siblings_of_a_refused_picture_are_given_up(family: Family) -> None:
    async with reader(replace(family, preprocess=hanging), num_workers=2, timeout_s=120) as pictures:
        with pytest.raises(InvalidRequest) as caught:
            await pictures.read((GOOD, PictureSource(b"no picture", "broken"), GOOD, GOOD))
        assert caught.value.param == "broken"
        await until(lambda: len(pictures.workers.pids) == 2)


async def test_memory_that_no_header_announced_is_refused(family: Family) -> None:
    async with reader(replace(family, preprocess=exhausting)) as pictures:
        with pytest.raises(InvalidRequest):
            await pictures.read((GOOD,))


async def test_a_file_as_long_as_the_limit_allows_is_decoded_whatever_the_limit(family: Family) -> None:
    long = data_url(file_of(Image.new("RGB", (3200, 3000)), compress_level=0))  # 29 MB, and 38 MB of base64
    limits = replace(LIMITS, max_image_bytes=30 << 20)
    pictures = PictureReader(family, limits, num_workers=1, timeout_s=30, max_wait_s=30)
    pictures.workers.start()
    try:
        assert len(await pictures.read((PictureSource(long, "long"), PictureSource(long, "again")))) == 2
    finally:
        await pictures.workers.close()


async def test_a_picture_above_the_memory_of_all_is_refused_by_its_limit(family: Family) -> None:
    async with reader(family) as pictures:
        with pytest.raises(TooLarge, match=str(LIMITS.memory_bytes)) as caught:
            await pictures.read((PictureSource(huge_webp(), "huge"),))
        assert caught.value.param == "huge"


async def test_closing_leaves_no_process(family: Family) -> None:
    async with reader(family, num_workers=3) as pictures:
        pids = pictures.workers.pids
        asked = asyncio.create_task(pictures.read((SLOW,)))
        await until_at_work(pictures)
    with pytest.raises((InvalidRequest, asyncio.CancelledError)):
        await asked
    assert all([await gone(pid) for pid in pids])


GATEWAY = """
    import asyncio, sys
    from pathlib import Path
    from dataclasses import replace
    from tests.gateway.pictures.test_workers import GOOD, hanging, reader
    from tests.gateway.checkpoints import byte_level_tokenizer, make_family

    async def main():
        family = make_family(Path(sys.argv[1]), byte_level_tokenizer())
        async with reader(replace(family, preprocess=hanging), num_workers=3) as pictures:
            print(*pictures.workers.pids, flush=True)
            await pictures.read((GOOD,) * 2)

    asyncio.run(main())
"""


async def test_no_worker_outlives_a_killed_gateway_even_while_it_decodes(tmp_path: Path) -> None:
    gateway = await asyncio.create_subprocess_exec(
        sys.executable, "-c", textwrap.dedent(GATEWAY), str(tmp_path), cwd=ROOT, stdout=asyncio.subprocess.PIPE
    )
    line: Any = await gateway.stdout.readline()
    pids = [int(word) for word in line.split()]
    assert len(pids) == 3 and all(Path(f"/proc/{pid}").exists() for pid in pids)
    await asyncio.sleep(1.5)  # two hang by now
    gateway.kill()
    await gateway.wait()
    assert all([await gone(pid) for pid in pids])

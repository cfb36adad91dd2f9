"""What the app as a whole does with its threads."""

from __future__ import annotations

from pathlib import Path

from service.gateway.app import NICENESS
from tests.gateway.conftest import Connect


def num_threads_that_give_way() -> int:
    """Of this process, by the nice value of each of its threads."""
    stats = [stat.read_text() for stat in Path("/proc/self/task").glob("*/stat")]
    return sum(int(stat.rpartition(")")[2].split()[16]) == NICENESS for stat in stats)


async def test_tokenizing_gives_way_to_whoever_else_wants_the_cores(connect: Connect) -> None:
    before = num_threads_that_give_way()
    async with connect() as client:
        reply = await client.post("/v1/generate", json={"prompt": "Hello.", "max_tokens": 1})
        assert reply.status_code == 200
        assert num_threads_that_give_way() == before + 1

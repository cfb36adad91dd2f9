from __future__ import annotations

import asyncio

import pytest

from service.gateway.pictures.fair_queue import FairQueue

pytestmark = pytest.mark.asyncio


class Room:
    """Askers that note when they were let in."""

    def __init__(self, queue: FairQueue) -> None:
        self.queue = queue
        self.let_in: list[str] = []

    def ask(self, asker: str, heavy_bytes: int = 0) -> asyncio.Task[None]:
        async def wait() -> None:
            await self.queue.take(asker, heavy_bytes)
            self.let_in.append(asker)

        return asyncio.create_task(wait())

    async def settle(self) -> list[str]:
        for _ in range(5):
            await asyncio.sleep(0)
        return self.let_in


async def test_requests_are_served_round_robin_picture_by_picture() -> None:
    room = Room(FairQueue(num_workers=1, memory_bytes=100))
    for asker in ["many"] * 4 + ["few"] * 2 + ["one"]:
        room.ask(asker)
        await asyncio.sleep(0)
    for _ in range(6):
        await room.settle()
        room.queue.give_back()
    assert await room.settle() == ["many", "many", "few", "one", "many", "few", "many"]


async def test_heavy_pictures_leave_a_worker_to_the_light() -> None:
    room = Room(FairQueue(num_workers=3, memory_bytes=100))
    for _ in range(5):
        room.ask("heavy", 1)
    assert await room.settle() == ["heavy"] * 2
    room.ask("light")
    assert await room.settle() == ["heavy"] * 2 + ["light"]


async def test_one_worker_serves_one_kind_after_the_other() -> None:
    room = Room(FairQueue(num_workers=1, memory_bytes=100))
    for asker in "abc":
        room.ask(asker, 10)
        room.ask(asker.upper())
    for _ in range(5):
        await room.settle()
        room.queue.give_back(10 if room.let_in[-1].islower() else 0)
    kinds = [asker.islower() for asker in await room.settle()]
    assert kinds in ([True, False] * 3, [False, True] * 3)


async def test_memory_is_never_promised_twice_and_the_first_in_line_is_not_overtaken() -> None:
    room = Room(FairQueue(num_workers=9, memory_bytes=100))
    room.ask("first", 60)
    room.ask("large", 90)
    room.ask("small", 10)
    room.ask("light")
    assert sorted(await room.settle()) == ["first", "light"]
    room.queue.give_back(60)
    assert sorted(await room.settle()) == ["first", "large", "light", "small"]


async def test_who_leaves_gives_up_place_and_grant() -> None:
    room = Room(FairQueue(num_workers=1, memory_bytes=100))
    room.ask("first")
    await room.settle()
    gone, stays = room.ask("gone", 80), room.ask("stays", 80)
    await room.settle()
    gone.cancel()
    room.queue.give_back()
    assert await room.settle() == ["first", "stays"] and gone.cancelled() and stays.done()
    late = room.ask("late", 80)
    await room.settle()
    room.queue.give_back(80)  # goes to "late", which is cancelled before it can take it up
    late.cancel()
    await room.settle()
    room.ask("last", 100)
    assert await room.settle() == ["first", "stays", "last"]

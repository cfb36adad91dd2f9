from __future__ import annotations

import asyncio

import pytest

from service.gateway.pictures.turns import Turns

pytestmark = pytest.mark.asyncio


class Room:
    """Askers that note when they had their turn."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns
        self.had: list[str] = []

    def ask(self, asker: str, heavy_bytes: int = 0) -> asyncio.Task[None]:
        async def wait() -> None:
            await self.turns.take(asker, heavy_bytes)
            self.had.append(asker)

        return asyncio.create_task(wait())

    async def settle(self) -> list[str]:
        for _ in range(5):
            await asyncio.sleep(0)
        return self.had


async def test_requests_take_turns_picture_by_picture() -> None:
    room = Room(Turns(num_workers=1, memory_bytes=100))
    for asker in ["many"] * 4 + ["few"] * 2 + ["one"]:
        room.ask(asker)
        await asyncio.sleep(0)
    for _ in range(6):
        await room.settle()
        room.turns.give_back()
    assert await room.settle() == ["many", "many", "few", "one", "many", "few", "many"]


async def test_heavy_pictures_leave_a_worker_to_the_light() -> None:
    room = Room(Turns(num_workers=3, memory_bytes=100))
    for _ in range(5):
        room.ask("heavy", 1)
    assert await room.settle() == ["heavy"] * 2
    room.ask("light")
    assert await room.settle() == ["heavy"] * 2 + ["light"]


async def test_one_worker_serves_both_kinds_in_turn() -> None:
    room = Room(Turns(num_workers=1, memory_bytes=100))
    for asker in "abc":
        room.ask(asker, 10)
        room.ask(asker.upper())
    for _ in range(5):
        await room.settle()
        room.turns.give_back(10 if room.had[-1].islower() else 0)
    kinds = [asker.islower() for asker in await room.settle()]
    assert kinds in ([True, False] * 3, [False, True] * 3)


async def test_memory_is_never_promised_twice_and_the_first_in_line_is_not_overtaken() -> None:
    room = Room(Turns(num_workers=9, memory_bytes=100))
    room.ask("first", 60)
    room.ask("large", 90)
    room.ask("small", 10)
    room.ask("light")
    assert sorted(await room.settle()) == ["first", "light"]
    room.turns.give_back(60)
    assert sorted(await room.settle()) == ["first", "large", "light", "small"]


async def test_who_leaves_gives_up_place_and_turn() -> None:
    room = Room(Turns(num_workers=1, memory_bytes=100))
    room.ask("first")
    await room.settle()
    gone, stays = room.ask("gone", 80), room.ask("stays", 80)
    await room.settle()
    gone.cancel()
    room.turns.give_back()
    assert await room.settle() == ["first", "stays"] and gone.cancelled() and stays.done()
    late = room.ask("late", 80)
    await room.settle()
    room.turns.give_back(80)  # grants "late" its turn, which is cancelled before it can take it up
    late.cancel()
    await room.settle()
    room.ask("last", 100)
    assert await room.settle() == ["first", "stays", "last"]

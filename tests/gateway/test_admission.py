from __future__ import annotations

import asyncio
import random

import pytest

from service.errors import Overloaded, Unavailable
from service.gateway.admission import Admission, Outcome

pytestmark = pytest.mark.asyncio


def make(ended: list[Outcome], *, running: int = 1, waiting: int = 1, wait_s: float = 10.0) -> Admission:
    return Admission(max_running=running, max_waiting=waiting, max_wait_s=wait_s, on_end=ended.append)


async def hold(admission: Admission, gate: asyncio.Event) -> None:
    async with admission.slot():
        await gate.wait()


async def test_one_runs_one_waits_the_third_is_turned_away() -> None:
    ended: list[Outcome] = []
    admission, gate = make(ended), asyncio.Event()
    tasks = [asyncio.create_task(hold(admission, gate)) for _ in range(2)]
    await asyncio.sleep(0)
    assert (admission.num_running, admission.num_waiting) == (1, 1)
    with pytest.raises(Overloaded) as caught:
        await hold(admission, gate)
    assert caught.value.retry_after_s
    gate.set()
    await asyncio.gather(*tasks)
    assert ended == [Outcome.FINISHED] * 2
    assert (admission.num_running, admission.num_waiting) == (0, 0)


async def test_who_waits_too_long_is_turned_away() -> None:
    ended: list[Outcome] = []
    admission, gate = make(ended, wait_s=0.01), asyncio.Event()
    task = asyncio.create_task(hold(admission, gate))
    await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        await hold(admission, gate)
    gate.set()
    await task
    assert admission.num_running == 0 and ended == [Outcome.FINISHED]


async def test_draining_admits_nobody_but_lets_the_waiting_run() -> None:
    ended: list[Outcome] = []
    admission, gate = make(ended), asyncio.Event()
    tasks = [asyncio.create_task(hold(admission, gate)) for _ in range(2)]
    await asyncio.sleep(0)
    admission.drain()
    with pytest.raises(Unavailable):
        await hold(admission, gate)
    gate.set()
    await asyncio.gather(*tasks)
    assert len(ended) == 2


@pytest.mark.parametrize("seed", range(5))
async def test_every_admitted_request_ends_once_and_no_place_is_lost(seed: int) -> None:
    chance = random.Random(seed)
    ended: list[Outcome] = []
    admission = make(ended, running=3, waiting=50)
    entered = most = 0

    async def one() -> None:
        nonlocal entered, most
        async with admission.slot():
            entered += 1
            most = max(most, admission.num_running)
            for _ in range(chance.randrange(4)):
                await asyncio.sleep(0)
            if chance.random() < 0.3:
                raise ValueError

    tasks = [asyncio.create_task(one()) for _ in range(40)]
    while not all(task.done() for task in tasks):
        await asyncio.sleep(0)
        if chance.random() < 0.5:
            chance.choice(tasks).cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert most <= 3
    assert len(ended) == entered
    assert (admission.num_running, admission.num_waiting) == (0, 0)

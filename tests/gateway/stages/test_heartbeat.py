"""Whether the models answer, asked in the background."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from service.gateway.stages.heartbeat import Heartbeat

pytestmark = pytest.mark.asyncio


class Models:
    """`answers`: what the next beats find, the last one for ever; an exception is raised. `gate`: beats wait for it."""

    def __init__(self, *answers: bool | Exception) -> None:
        self.answers = list(answers)
        self.num_asked = 0
        self.was_heard = False  # by others than the heartbeat
        self.gate = asyncio.Event()
        self.gate.set()

    async def ask(self) -> bool:
        self.num_asked += 1
        await self.gate.wait()
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


@asynccontextmanager
async def beating(models: Models, *, period_s: float, timeout_s: float = 20.0) -> AsyncIterator[Heartbeat]:
    heartbeat = Heartbeat(models.ask, lambda: models.was_heard, period_s=period_s, timeout_s=timeout_s)
    running = asyncio.create_task(heartbeat.run())
    try:
        yield heartbeat
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_asking_whether_all_is_well_asks_the_models_nothing() -> None:
    models = Models(True)
    async with beating(models, period_s=60) as heartbeat:
        assert all(await asyncio.gather(*(heartbeat.ready() for _ in range(500))))
    assert models.num_asked == 1


async def test_before_the_first_result_it_is_waited_for_and_not_for_ever() -> None:
    models = Models(True)
    models.gate.clear()
    async with beating(models, period_s=60, timeout_s=0.05) as heartbeat:
        assert not await heartbeat.ready()
        models.gate.set()
        assert await heartbeat.ready()


async def test_a_model_that_falls_silent_and_comes_back_is_noticed() -> None:
    models = Models(True, False, RuntimeError("a bug"), True)
    seen: list[bool] = []
    async with beating(models, period_s=0.02) as heartbeat, asyncio.timeout(20):
        while seen != [True, False, True]:
            ready = await heartbeat.ready()
            if seen[-1:] != [ready]:
                seen.append(ready)
            await asyncio.sleep(0.001)


async def test_a_result_that_is_old_is_none() -> None:
    models = Models(True)
    async with beating(models, period_s=0.05, timeout_s=0.25) as heartbeat:  # good for 0.4 s
        assert await heartbeat.ready()
        models.gate.clear()
        await asyncio.sleep(1.0)
        assert not await heartbeat.ready()


async def test_models_that_answer_others_are_ready_before_the_next_beat_and_not_after_they_fell_silent() -> None:
    models = Models(False)
    async with beating(models, period_s=60) as heartbeat:
        assert not await heartbeat.ready()
        models.was_heard = True
        assert await heartbeat.ready()
        models.was_heard = False
        assert not await heartbeat.ready()
    assert models.num_asked == 1


@pytest.mark.parametrize(("answer", "takes_s", "rests_s"), [(True, 0.05, 0.15), (True, 0.0, 0.05), (False, 0.05, 0.05)])
async def test_slow_models_that_answer_are_left_in_peace_for_up_to_three_periods(
    answer: bool, takes_s: float, rests_s: float
) -> None:
    rests: list[float] = []
    ended_s: float | None = None

    async def ask() -> bool:
        nonlocal ended_s
        if ended_s is not None:
            rests.append(time.monotonic() - ended_s)
        await asyncio.sleep(takes_s)
        ended_s = time.monotonic()
        return answer

    heartbeat = Heartbeat(ask, lambda: False, period_s=0.05, timeout_s=20)
    running = asyncio.create_task(heartbeat.run())
    async with asyncio.timeout(20):
        while len(rests) < 5:
            assert await heartbeat.ready() == answer
            await asyncio.sleep(0.01)
    running.cancel()
    assert min(rests) == pytest.approx(rests_s, abs=0.03)

"""For how long, how often, and for which failures a request tries again."""

from __future__ import annotations

import asyncio

import pytest

from service.errors import OtherCheckpoint, StageLost, StageTimeout, Unavailable
from service.gateway.stages.patience import FIRST_PAUSE_S, MAX_LOST, MAX_PAUSE_S, Patience, until
from tests.gateway.clock import JumpingLoop

pytestmark = pytest.mark.asyncio
loop_factory = JumpingLoop
AWAY = Unavailable("not ready")


def now_s() -> float:
    return asyncio.get_running_loop().time()


async def pauses(patience: Patience, error: Unavailable = AWAY, at_most: int = 100) -> list[float]:
    """Of one outage, in seconds, until patience ends."""
    taken = []
    for _ in range(at_most):
        before = now_s()
        try:
            await patience.wait_after(error)
        except Unavailable as raised:
            assert raised is error and now_s() == before, "the failure itself, at once"
            break
        taken.append(now_s() - before)
    return taken


async def test_pauses_grow_to_a_bound_and_are_not_the_same_for_all() -> None:
    seen = [await pauses(Patience(1000.0, now_s() + 2000.0), at_most=8) for _ in range(200)]
    for number in range(8):
        longest = min(FIRST_PAUSE_S * 2**number, MAX_PAUSE_S)
        nth = [of_one[number] for of_one in seen]
        assert 0.5 * longest <= min(nth) < 0.6 * longest
        assert 0.9 * longest < max(nth) <= longest + 1e-9


@pytest.mark.parametrize("wait_s", [0.5, 3.0, 20.0])
async def test_an_outage_is_borne_for_so_long_and_not_longer(wait_s: float) -> None:
    for _ in range(20):
        taken = await pauses(Patience(wait_s, now_s() + 1000.0))
        assert wait_s - MAX_PAUSE_S <= sum(taken) <= wait_s


async def test_no_pause_ends_behind_the_request_s_deadline() -> None:
    for _ in range(20):
        taken = await pauses(Patience(1000.0, now_s() + 4.0))
        assert 4.0 - MAX_PAUSE_S <= sum(taken) <= 4.0
    assert await pauses(Patience(1000.0, now_s() + 0.1)) == []


async def test_a_request_that_was_in_a_stage_when_it_died_tries_again_until_it_happened_twice() -> None:
    patience = Patience(20.0, now_s() + 1000.0)
    for _ in range(MAX_LOST - 1):
        await patience.wait_after(StageLost("died"))
        await patience.wait_after(AWAY)
    before, lost = now_s(), StageLost("died again")
    with pytest.raises(StageLost) as caught:
        await patience.wait_after(lost)
    assert caught.value is lost and now_s() == before


async def test_only_a_stage_that_died_counts_as_a_death() -> None:
    patience = Patience(1000.0, now_s() + 1000.0)
    for number in range(20):
        await patience.wait_after(OtherCheckpoint("other") if number % 2 else AWAY)
    await patience.wait_after(StageLost("died"))


async def test_a_death_begins_an_outage_of_its_own() -> None:
    patience = Patience(5.0, now_s() + 1000.0)
    await pauses(patience)  # it came back in the last moment
    began = now_s()
    await patience.wait_after(StageLost("died"))
    assert now_s() - began <= FIRST_PAUSE_S
    await pauses(patience)
    assert 5.0 - MAX_PAUSE_S <= now_s() - began <= 5.0


async def test_a_block_that_passes_the_deadline_is_a_stage_timeout() -> None:
    with pytest.raises(StageTimeout):
        async with until(now_s() + 3.0):
            await asyncio.sleep(60)
    assert now_s() == pytest.approx(3.0)


async def test_a_block_within_the_deadline_is_left_alone() -> None:
    async with until(now_s() + 3.0):
        await asyncio.sleep(2.9)
    with pytest.raises(Unavailable):
        async with until(now_s() + 3.0):
            raise AWAY

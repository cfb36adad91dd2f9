"""How latents are fetched: each picture once, so many at a time, round-robin among requests, and none kept too long."""

from __future__ import annotations

import asyncio
import gc
from contextlib import suppress

import numpy as np
import pytest

from service.errors import StageTimeout, Unavailable
from service.gateway.pictures.encode import Latents, PictureEncoder
from tests.gateway.fakes import FakeBackend

pytestmark = pytest.mark.asyncio
KEYS = tuple(f"{number:064x}" for number in range(100))


def pixels(key: str) -> np.ndarray:
    return np.full((3, 4, 4), int(key, 16), np.uint8)


class Rig:
    def __init__(self, *, max_calls: int = 4, timeout_s: float = 20.0, cache_bytes: int = 0) -> None:
        self.backend = FakeBackend(script=())
        self.order: list[int] = []
        self.seconds: list[float] = []  # of each encoding
        self.encoder = PictureEncoder(
            self._encode,
            max_calls=max_calls,
            timeout_s=timeout_s,
            cache_bytes=cache_bytes,
            on_encoded=self.seconds.append,
        )

    async def _encode(self, picture: np.ndarray) -> Latents:
        self.order.append(int(picture[0, 0, 0]))
        return await self.backend.encode(picture)

    def ask(self, *keys: str) -> asyncio.Task[dict[str, Latents]]:
        return asyncio.create_task(self.encoder.latents({key: pixels(key) for key in keys}))

    def hold(self) -> asyncio.Event:
        self.backend.encode_gate = asyncio.Event()
        return self.backend.encode_gate

    def assert_nothing_left(self) -> None:
        assert not self.encoder._flights and not self.encoder._requests and not self.encoder._num_calls


async def test_every_picture_of_a_request_comes_under_its_own_key() -> None:
    rig = Rig(max_calls=2)
    found = await rig.ask(*KEYS[:9])
    assert {key: latents.values[0, 0, 0] for key, latents in found.items()} == {key: int(key, 16) for key in KEYS[:9]}
    rig.assert_nothing_left()


async def test_a_picture_that_many_want_is_encoded_once() -> None:
    rig = Rig()
    gate = rig.hold()
    wanting = [rig.ask(KEYS[0]) for _ in range(5)]
    await asyncio.sleep(0)
    wanting[0].cancel()
    await asyncio.sleep(0)
    gate.set()
    results = await asyncio.gather(*wanting, return_exceptions=True)
    assert isinstance(results[0], asyncio.CancelledError)
    assert all(isinstance(result, dict) for result in results[1:])
    assert rig.backend.num_encoded == 1
    rig.assert_nothing_left()


async def test_an_encoding_that_nobody_wants_any_more_is_cancelled_and_can_be_asked_for_again() -> None:
    rig = Rig()
    gate = rig.hold()
    wanting = rig.ask(KEYS[0])
    await asyncio.sleep(0.01)
    assert rig.backend.num_encoding == 1
    wanting.cancel()
    await asyncio.gather(wanting, return_exceptions=True)
    await asyncio.sleep(0.01)
    assert rig.backend.num_encoding == 0
    rig.assert_nothing_left()
    gate.set()
    assert (await rig.ask(KEYS[0]))[KEYS[0]].values.shape == (1, 4, 8)


async def test_no_more_are_under_way_than_allowed_however_many_ask() -> None:
    rig = Rig(max_calls=8)
    rig.backend.encode_s = 0.001
    asked = [rig.ask(*KEYS[start : start + 16]) for start in range(0, 80, 3)]
    await asyncio.gather(*asked)
    assert rig.backend.max_encoding == 8
    assert rig.backend.num_encoded >= 80
    rig.assert_nothing_left()


async def test_a_request_with_many_pictures_does_not_shut_out_one_with_a_single_picture() -> None:
    rig = Rig(max_calls=1)
    gate = rig.hold()
    many = rig.ask(*KEYS[:16])
    await asyncio.sleep(0)
    one = rig.ask(KEYS[50])
    two = rig.ask(KEYS[15], KEYS[60])  # the first of which is the last of the many
    await asyncio.sleep(0)
    gate.set()
    await asyncio.gather(many, one, two)
    assert rig.order[:4] == [0, 1, 50, 15]
    assert sorted(rig.order) == [*range(16), 50, 60]
    rig.assert_nothing_left()


async def test_who_leaves_while_waiting_leaves_nothing_behind() -> None:
    rig = Rig(max_calls=1)
    gate = rig.hold()
    first = rig.ask(KEYS[0])
    await asyncio.sleep(0)
    for _ in range(20):  # among them one that leaves before its call began
        left = rig.ask(*KEYS[1:17])
        await asyncio.sleep(0)
        left.cancel()
        await asyncio.gather(left, return_exceptions=True)
    assert not rig.encoder._requests, "their pixels are not kept until they could be encoded"
    first.cancel()
    await asyncio.sleep(0)
    next_one = rig.ask(KEYS[20])
    await asyncio.sleep(0)
    next_one.cancel()
    await asyncio.gather(first, next_one, return_exceptions=True)
    await asyncio.sleep(0.01)
    rig.assert_nothing_left()
    gate.set()
    await rig.ask(KEYS[0])
    assert set(rig.order) <= {0, 20}


async def test_an_encoder_that_says_nothing_is_a_timeout_for_all_who_want_the_picture() -> None:
    rig = Rig(timeout_s=0.01)
    rig.hold()
    results = await asyncio.gather(rig.ask(KEYS[0]), rig.ask(*KEYS[:3]), return_exceptions=True)
    assert [type(result) for result in results] == [StageTimeout, StageTimeout]
    assert all(isinstance(result.__cause__, TimeoutError) for result in results)
    await asyncio.sleep(0.05)
    rig.assert_nothing_left()


async def test_a_picture_that_fails_ends_the_waiting_for_its_siblings() -> None:
    rig = Rig(max_calls=1)
    rig.backend.encode_failure = Unavailable("gone")
    with pytest.raises(Unavailable):
        await rig.ask(*KEYS[:16])
    await asyncio.sleep(0.01)
    assert rig.backend.num_encoded <= 3
    rig.assert_nothing_left()


async def test_kept_latents_are_bounded_in_bytes_and_the_oldest_goes_first() -> None:
    rig = Rig(cache_bytes=2 * 4 * 8 * 4)
    for key in (*KEYS[:2], KEYS[0], KEYS[2], KEYS[0]):
        await rig.ask(key)
    assert rig.backend.num_encoded == 3
    await rig.ask(KEYS[1])
    assert rig.backend.num_encoded == 4


async def test_what_is_forgotten_is_encoded_again() -> None:
    rig = Rig(cache_bytes=2 * 4 * 8 * 4)
    for _ in range(2):
        await rig.ask(*KEYS[:2])
    assert rig.backend.num_encoded == 2
    rig.encoder.forget()
    await rig.ask(*KEYS[:2])
    await rig.ask(*KEYS[:2])
    assert rig.backend.num_encoded == 4


async def test_a_cache_of_one_picture_keeps_one() -> None:
    rig = Rig(cache_bytes=4 * 8 * 4)
    for key in (KEYS[0], KEYS[0], KEYS[1], KEYS[1], KEYS[0]):
        await rig.ask(key)
    assert rig.order == [0, 1, 0]


async def test_a_picture_larger_than_the_cache_takes_nothing_out_of_it() -> None:
    rig = Rig(cache_bytes=4 * 8 * 4)
    await rig.ask(KEYS[0])
    small, rig.backend.encode = rig.backend.encode, large_latents  # type: ignore[method-assign]
    for _ in range(2):
        assert (await rig.ask(KEYS[1]))[KEYS[1]].values.shape == (1, 5, 8)
    rig.backend.encode = small  # type: ignore[method-assign]
    await rig.ask(KEYS[0])
    assert rig.order == [0, 1, 1]


async def large_latents(picture: np.ndarray) -> Latents:
    return Latents(np.zeros((1, 5, 8), np.float32), bytes(32))


async def test_the_seconds_of_each_encoding_are_told() -> None:
    rig = Rig(cache_bytes=1 << 20)
    rig.backend.encode_s = 0.02
    await rig.ask(*KEYS[:2])
    await rig.ask(*KEYS[:2])
    assert len(rig.seconds) == 2 and all(0.02 <= seconds < 10 for seconds in rig.seconds)
    rig.backend.encode_failure = Unavailable("gone")
    with pytest.raises(Unavailable):
        await rig.ask(KEYS[2])
    assert len(rig.seconds) == 2


async def test_a_failure_that_nobody_waits_for_is_no_news() -> None:
    """Several pictures of a request fail, and it ends with the first; asyncio would log the others."""
    complaints: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))
    rig = Rig(max_calls=4)
    rig.backend.encode_failure = Unavailable("gone")
    with pytest.raises(Unavailable):
        await rig.ask(*KEYS[:4])
    await asyncio.sleep(0.01)
    del rig
    gc.collect()
    assert complaints == []


@pytest.mark.parametrize("num_turns", range(5))
async def test_a_failure_in_the_moment_in_which_the_last_one_leaves_is_no_news(num_turns: int) -> None:
    complaints: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))
    rig = Rig()

    async def fail_while_leaving(picture: np.ndarray) -> Latents:
        leavers[0].cancel()
        for _ in range(num_turns):
            await asyncio.sleep(0)
        raise Unavailable("gone")

    rig.backend.encode = fail_while_leaving  # type: ignore[method-assign]
    leavers = [rig.ask(KEYS[0])]
    await asyncio.gather(*leavers, return_exceptions=True)
    await asyncio.sleep(0.01)
    rig.assert_nothing_left()
    leavers.clear()
    gc.collect()
    assert complaints == []


async def test_an_encoding_that_cannot_be_stopped_ends_quietly_and_is_kept() -> None:
    complaints: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))
    rig = Rig(cache_bytes=1 << 20)
    gate = asyncio.Event()

    async def stubborn(picture: np.ndarray) -> Latents:
        with suppress(asyncio.CancelledError):
            await gate.wait()
        return Latents(np.zeros((1, 4, 8), np.float32), bytes(32))

    rig.backend.encode = stubborn  # type: ignore[method-assign]
    leaver = rig.ask(KEYS[0])
    await asyncio.sleep(0.01)
    leaver.cancel()
    await asyncio.gather(leaver, return_exceptions=True)
    await asyncio.sleep(0.01)
    assert (await rig.ask(KEYS[0]))[KEYS[0]].values.shape == (1, 4, 8)
    assert rig.order == [0]
    rig.assert_nothing_left()
    del leaver
    gc.collect()
    assert complaints == []


async def test_an_encoding_that_lands_late_takes_nothing_from_the_one_that_came_after_it() -> None:
    rig = Rig()
    first, second = asyncio.Event(), asyncio.Event()

    async def stubborn(picture: np.ndarray) -> Latents:
        if len(rig.order) == 1:
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(60)
            await first.wait()
        else:
            await second.wait()
        return Latents(np.zeros((1, 4, 8), np.float32), bytes(32))

    rig.backend.encode = stubborn  # type: ignore[method-assign]
    leaver = rig.ask(KEYS[0])
    await asyncio.sleep(0.01)
    leaver.cancel()
    await asyncio.gather(leaver, return_exceptions=True)
    again = rig.ask(KEYS[0])
    await asyncio.sleep(0.01)
    first.set()
    await asyncio.sleep(0.01)
    another = rig.ask(KEYS[0])
    await asyncio.sleep(0.01)
    assert rig.order == [0, 0], "the other joins the second one"
    second.set()
    assert (await again).keys() == (await another).keys() == {KEYS[0]}
    rig.assert_nothing_left()

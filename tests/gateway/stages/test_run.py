from __future__ import annotations

import asyncio

import numpy as np
import pytest

from service.contract import SamplingParams, TokenEvent, ValidRequest
from service.errors import ImageNotResident, InvalidRequest, StageTimeout, Unavailable
from service.gateway.pictures.encode import PictureEncoder
from service.gateway.pictures.residency import ResidentKeys
from service.gateway.stages.run import Deadlines, Stages, Trace
from tests.gateway.fakes import FakeBackend

pytestmark = pytest.mark.asyncio
KEYS = tuple(f"{number:064x}" for number in range(3))
PIXELS = {key: np.full((3, 4, 4), number, np.uint8) for number, key in enumerate(KEYS)}


class Rig:
    """Stages over a fake backend, with what the tests look at."""

    def __init__(self, *, cache_bytes: int = 0, max_keys: int = 10, **deadlines: float) -> None:
        self.backend = FakeBackend(script=tuple(range(1, 6)))
        self.encoder = PictureEncoder(
            lambda pixels: self.backend.encode(pixels),
            timeout_s=deadlines.pop("encode_s", 20.0),
            cache_bytes=cache_bytes,
            on_encoded=lambda seconds: None,
        )
        self.resident = ResidentKeys(max_keys)
        limits = {"first_token_s": 20.0, "inter_token_s": 20.0, "request_s": 60.0, **deadlines}
        self.stages = Stages(self.backend, self.encoder, self.resident, Deadlines(**limits))

    async def run(self, *keys: str, stream: bool = True) -> list[TokenEvent]:
        request = ValidRequest((7,) * max(1, len(keys)), keys, tuple(range(len(keys))), SamplingParams(stream=stream))
        return [event async for event in self.stages.run(request, PIXELS, Trace())]


def tokens(events: list[TokenEvent]) -> list[int]:
    return [token for event in events for token in event.token_ids]


async def test_a_wrong_belief_costs_one_more_round_and_nothing_else() -> None:
    rig = Rig()
    rig.resident.add(KEYS)
    rig.backend.resident = {KEYS[1]}
    assert tokens(await rig.run(*KEYS)) == [1, 2, 3, 4, 5]
    assert rig.backend.sent == [set(), {KEYS[0], KEYS[2]}]
    await rig.run(*KEYS)
    assert rig.backend.sent[2:] == [set()]


async def test_pictures_evicted_between_rounds_are_sent_in_the_next() -> None:
    rig = Rig()
    rig.resident.add(KEYS)
    rig.backend.failures = [ImageNotResident("no", keys=KEYS[:1]), ImageNotResident("no", keys=KEYS[1:2])]
    rig.backend.resident = {KEYS[2]}
    assert tokens(await rig.run(*KEYS)) == [1, 2, 3, 4, 5]
    assert rig.backend.sent == [set(), set(KEYS[:1]), set(KEYS[:2])]


async def test_a_decoder_that_lacks_what_was_sent_is_an_error() -> None:
    rig = Rig()
    rig.backend.failures = [ImageNotResident("no", keys=KEYS[:1])] * 2
    with pytest.raises(Unavailable):
        await rig.run(KEYS[0])


async def test_a_decoder_that_cannot_be_reached_is_tried_again_before_the_first_token() -> None:
    rig = Rig()
    rig.backend.failures = [Unavailable("gone")]
    assert tokens(await rig.run()) == [1, 2, 3, 4, 5]
    rig.backend.failures = [Unavailable("gone"), Unavailable("gone")]
    with pytest.raises(Unavailable):
        await rig.run()


async def test_nothing_is_tried_again_after_the_first_token() -> None:
    rig = Rig()
    rig.backend.fail_after = (2, Unavailable("gone"))
    with pytest.raises(Unavailable):
        await rig.run()
    assert len(rig.backend.requests) == 1


async def test_other_errors_are_not_tried_again() -> None:
    rig = Rig()
    rig.backend.failures = [InvalidRequest("no", param="prompt")]
    with pytest.raises(InvalidRequest):
        await rig.run()
    assert len(rig.backend.requests) == 1


async def test_a_finished_stream_is_not_cancelled() -> None:
    rig = Rig()
    await rig.run()
    await rig.run(stream=False)
    assert rig.backend.num_cancelled == 0 and rig.backend.num_running == 0


async def test_a_decoder_that_says_nothing_is_a_timeout() -> None:
    rig = Rig(inter_token_s=0.01)
    rig.backend.gate = asyncio.Event()
    with pytest.raises(StageTimeout):
        await rig.run()
    assert rig.backend.num_cancelled == 1
    rig = Rig(first_token_s=0.01)
    rig.backend.step_s = 30
    with pytest.raises(StageTimeout):
        await rig.run()
    rig = Rig(request_s=0.01)
    rig.backend.step_s = 30
    with pytest.raises(StageTimeout):
        await rig.run(stream=False)


async def test_an_encoder_that_says_nothing_is_a_timeout() -> None:
    rig = Rig(encode_s=0.01)
    rig.backend.encode_s = 30
    with pytest.raises(StageTimeout):
        await rig.run(KEYS[0])


async def test_a_picture_that_many_want_is_encoded_once() -> None:
    rig = Rig()
    rig.backend.encode_gate = asyncio.Event()
    wanting = [asyncio.create_task(rig.encoder.latents(KEYS[0], PIXELS[KEYS[0]])) for _ in range(5)]
    await asyncio.sleep(0)
    wanting[0].cancel()
    await asyncio.sleep(0)
    rig.backend.encode_gate.set()
    results = await asyncio.gather(*wanting, return_exceptions=True)
    assert isinstance(results[0], asyncio.CancelledError)
    assert all(isinstance(result, np.ndarray) for result in results[1:])
    assert rig.backend.num_encoded == 1


async def test_an_encoding_that_nobody_wants_any_more_is_cancelled_and_can_be_asked_for_again() -> None:
    rig = Rig()
    rig.backend.encode_gate = asyncio.Event()
    wanting = asyncio.create_task(rig.encoder.latents(KEYS[0], PIXELS[KEYS[0]]))
    await asyncio.sleep(0)
    wanting.cancel()
    await asyncio.gather(wanting, return_exceptions=True)
    rig.backend.encode_gate.set()
    assert (await rig.encoder.latents(KEYS[0], PIXELS[KEYS[0]])).shape == (4, 8)


async def test_kept_latents_are_bounded_in_bytes_and_the_oldest_goes_first() -> None:
    rig = Rig(cache_bytes=2 * 4 * 8 * 4)
    for key in (*KEYS[:2], KEYS[0], KEYS[2], KEYS[0]):
        await rig.encoder.latents(key, PIXELS[key])
    assert rig.backend.num_encoded == 3
    await rig.encoder.latents(KEYS[1], PIXELS[KEYS[1]])
    assert rig.backend.num_encoded == 4


async def test_the_memory_of_resident_keys_is_bounded() -> None:
    resident = ResidentKeys(2)
    resident.add(KEYS)
    assert resident.missing(KEYS) == {KEYS[0]}

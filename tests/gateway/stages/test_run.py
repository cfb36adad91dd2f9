"""The two stages as one: what is sent, what is tried again, what is given up, and when."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping

import numpy as np
import pytest

from service.contract import FinishReason, SamplingParams, TokenEvent, ValidRequest
from service.errors import (
    CrossgateError,
    ImageNotResident,
    Internal,
    InvalidRequest,
    OtherCheckpoint,
    Overloaded,
    StageLost,
    StageTimeout,
    Unavailable,
)
from service.gateway.pictures.encode import Latents, PictureEncoder
from service.gateway.pictures.residency import ResidentKeys
from service.gateway.stages.run import LET_END_S, Deadlines, Stages, Trace
from tests.gateway.clock import JumpingLoop
from tests.gateway.fakes import FakeBackend

pytestmark = pytest.mark.asyncio
loop_factory = JumpingLoop
KEYS = tuple(f"{number:064x}" for number in range(3))
PIXELS = {key: np.full((3, 4, 4), number, np.uint8) for number, key in enumerate(KEYS)}


class Rig:
    """Stages over a fake backend, with what the tests look at."""

    def __init__(
        self,
        *,
        cache_bytes: int = 0,
        max_keys: int = 10,
        encode_s: float = 20.0,
        request_s: float = 60.0,
        **waits: float,
    ) -> None:
        self.backend = FakeBackend(script=tuple(range(1, 6)))
        self.encoder = PictureEncoder(
            lambda pixels: self.backend.encode(pixels),
            max_calls=4,
            timeout_s=encode_s,
            cache_bytes=cache_bytes,
            on_encoded=lambda seconds: None,
        )
        self.resident = ResidentKeys(max_keys)
        self.trace = Trace()  # of the last run
        self.request_s = request_s
        deadlines = Deadlines(**{"first_token_s": 20.0, "inter_token_s": 20.0, "restart_wait_s": 20.0, **waits})
        self.stages = Stages(self.backend, self.encoder, self.resident, deadlines)

    async def run(self, *keys: str, stream: bool = True) -> list[TokenEvent]:
        request = ValidRequest((7,) * max(1, len(keys)), keys, tuple(range(len(keys))), SamplingParams(stream=stream))
        self.trace = Trace()
        return [event async for event in self.stages.run(request, PIXELS, self.trace, now_s() + self.request_s)]


def now_s() -> float:
    return asyncio.get_running_loop().time()


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
    with pytest.raises(Unavailable) as caught:
        await rig.run(KEYS[0])
    assert caught.value.retry_after_s
    assert len(rig.backend.requests) == 1


async def test_a_wrong_belief_is_given_up_though_its_request_fails() -> None:
    rig = Rig()
    rig.resident.add(KEYS)
    rig.backend.resident = set(KEYS[1:])
    rig.backend.failures = [ImageNotResident("no", keys=KEYS[:1]), InvalidRequest("no", param="prompt")]
    with pytest.raises(InvalidRequest):
        await rig.run(*KEYS)
    await rig.run(*KEYS)
    assert rig.backend.sent == [set(), {KEYS[0]}, {KEYS[0]}], "the next request sends it at once"


async def test_a_decoder_that_lacks_a_picture_of_nobody_is_an_error() -> None:
    rig = Rig()
    rig.backend.failures = [ImageNotResident("no", keys=("f" * 64,))]
    with pytest.raises(Unavailable):
        await rig.run()


async def test_what_was_sent_and_how_long_the_encoder_took_is_in_the_trace() -> None:
    rig = Rig()
    await rig.run()
    assert rig.trace == Trace(0.0, frozenset())
    await rig.run(KEYS[1], KEYS[0], KEYS[1])
    assert rig.trace.sent == {KEYS[0], KEYS[1]}
    assert 0 < rig.trace.encode_s < 60
    await rig.run(*KEYS)
    assert rig.trace.sent == {KEYS[2]}


async def test_a_request_waits_for_a_decoder_that_restarts_before_the_first_token() -> None:
    rig = Rig()
    rig.backend.failures = [Unavailable("gone"), Unavailable("gone"), Unavailable("not ready"), Unavailable("draining")]
    assert tokens(await rig.run()) == [1, 2, 3, 4, 5]


async def test_a_request_waits_for_an_encoder_that_restarts() -> None:
    rig = Rig()
    rig.backend.encode_failure = Unavailable("gone")
    running = asyncio.create_task(rig.run(KEYS[0]))
    while rig.backend.num_encoded < 3:
        await asyncio.sleep(0.01)
    rig.backend.encode_failure = None
    assert tokens(await running) == [1, 2, 3, 4, 5]


async def test_a_stage_that_does_not_come_back_is_waited_for_no_longer_than_the_setting_says() -> None:
    rig = Rig(restart_wait_s=0.5)
    rig.backend.failures = [Unavailable("gone", retry_after_s=7)] * 50
    with pytest.raises(Unavailable) as caught:
        await rig.run()
    assert caught.value.retry_after_s == 7
    assert 1 < len(rig.backend.requests) < 10


async def test_waiting_for_a_stage_ends_when_the_client_leaves() -> None:
    rig = Rig()
    rig.backend.failures = [Unavailable("gone")] * 50
    running = asyncio.create_task(rig.run())
    while not rig.backend.requests:
        await asyncio.sleep(0.01)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


async def test_a_request_that_was_in_a_decoder_twice_when_it_died_is_not_given_to_a_third() -> None:
    rig = Rig()
    rig.backend.failures = [
        Unavailable("draining"),
        StageLost("died"),
        Unavailable("not ready"),
        StageLost("died"),
        StageLost("died"),
    ]
    with pytest.raises(Unavailable):
        await rig.run()
    assert len(rig.backend.requests) == 4


async def test_one_death_of_a_decoder_is_survived() -> None:
    rig = Rig()
    rig.backend.failures = [StageLost("died"), Unavailable("not ready")]
    assert tokens(await rig.run()) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("stream", [True, False])
async def test_nothing_is_tried_again_after_the_first_token(stream: bool) -> None:
    rig = Rig()
    rig.backend.fail_after = (1, Unavailable("gone"))
    with pytest.raises(Unavailable):
        await rig.run(stream=stream)
    assert len(rig.backend.requests) == 1
    rig.backend.fail_after = (1, ImageNotResident("no", keys=KEYS[:1]))
    with pytest.raises(Unavailable):
        await rig.run(KEYS[0], stream=stream)
    assert len(rig.backend.requests) == 2


async def test_a_message_without_a_token_is_no_first_token() -> None:
    class Hesitant(FakeBackend):
        async def generate(
            self, request: ValidRequest, latents: Mapping[str, Latents]
        ) -> AsyncGenerator[TokenEvent, None]:
            yield TokenEvent()
            async for event in super().generate(request, latents):
                yield event

    rig = Rig()
    backend = Hesitant(script=(1, 2), failures=[Unavailable("gone")], step_s=0.9)
    stages = Stages(backend, rig.encoder, rig.resident, Deadlines(1.0, 20.0, 20.0))
    request = ValidRequest((7,), sampling=SamplingParams())
    events = [event async for event in stages.run(request, {}, Trace(), 60.0)]
    assert tokens(events) == [1, 2] and len(backend.requests) == 2
    slow = Stages(Hesitant(script=(1,), step_s=1.1), rig.encoder, rig.resident, Deadlines(1.0, 20.0, 20.0))
    with pytest.raises(StageTimeout):
        _ = [event async for event in slow.run(request, {}, Trace(), 60.0)]


async def test_all_attempts_and_pauses_share_one_deadline() -> None:
    rig = Rig(request_s=3.0)
    rig.backend.encode_s = 1.8  # a second attempt would end in time, had it a deadline of its own
    rig.backend.encode_failure = Unavailable("gone")
    with pytest.raises(StageTimeout):
        await rig.run(KEYS[0])
    assert rig.backend.num_encoded == 2
    rig = Rig(request_s=1.0)
    rig.backend.failures = [Unavailable("gone")]
    rig.backend.step_s = 30
    with pytest.raises(StageTimeout):
        await rig.run(stream=False)
    assert len(rig.backend.requests) == 2
    rig = Rig(request_s=0.3)
    rig.backend.encode_s = 30
    with pytest.raises(StageTimeout):
        await rig.run(KEYS[0])
    await asyncio.sleep(0.01)
    assert rig.backend.num_encoding == 0


@pytest.mark.parametrize("error", [InvalidRequest("no", param="prompt"), Overloaded("full", retry_after_s=1)])
async def test_other_errors_are_not_tried_again(error: CrossgateError) -> None:
    rig = Rig()
    rig.backend.failures = [error]
    with pytest.raises(type(error)):
        await rig.run()
    assert len(rig.backend.requests) == 1
    rig.backend.encode_failure = error
    with pytest.raises(type(error)):
        await rig.run(KEYS[0])
    assert rig.backend.num_encoded == 1


async def test_kept_latents_do_not_outlive_the_encoder_that_made_them() -> None:
    rig = Rig(cache_bytes=1 << 20)
    await rig.run(*KEYS)
    new = b"n" * 32
    rig.backend.resident = set()  # Triton came back with other weights
    rig.backend.encoder_checkpoint = rig.backend.decoder_checkpoint = new
    assert tokens(await rig.run(*KEYS)) == [1, 2, 3, 4, 5]
    assert {latents.checkpoint for latents in rig.backend.latents.values()} == {new}
    assert rig.backend.num_encoded == 6


async def test_what_was_encoded_is_kept_through_failures_of_the_decoder() -> None:
    rig = Rig(cache_bytes=1 << 20)
    rig.backend.failures = [Unavailable("gone"), StageLost("died")]
    await rig.run(*KEYS)
    assert rig.backend.num_encoded == 3
    rig.resident.discard(KEYS)
    rig.backend.failures = [OtherCheckpoint("only the prompt was of another")]
    await rig.run()
    await rig.run(*KEYS)
    assert rig.backend.num_encoded == 3


async def test_stages_of_different_checkpoints_answer_nothing_about_a_picture() -> None:
    rig = Rig(cache_bytes=1 << 20, restart_wait_s=0.5)
    rig.backend.encoder_checkpoint = b"n" * 32
    with pytest.raises(OtherCheckpoint):
        await rig.run(KEYS[0])
    assert rig.backend.resident == set()
    assert tokens(await rig.run()) == [1, 2, 3, 4, 5]


async def test_a_finished_stream_is_not_cancelled() -> None:
    rig = Rig()
    await rig.run()
    await rig.run(stream=False)
    assert rig.backend.num_cancelled == 0 and rig.backend.num_running == 0


async def test_a_decoder_that_ends_in_the_middle_is_an_error() -> None:
    class Cut(FakeBackend):
        async def _events(self, request: ValidRequest, cached: int) -> AsyncGenerator[TokenEvent, None]:
            yield TokenEvent((1,))

    rig = Rig()
    stages = Stages(Cut(script=()), rig.encoder, rig.resident, Deadlines(1.0, 1.0, 1.0))
    with pytest.raises(Internal):
        _ = [event async for event in stages.run(ValidRequest((7,)), {}, Trace(), 60.0)]


async def test_a_decoder_that_does_not_end_its_stream_holds_nobody_up() -> None:
    class Endless(FakeBackend):
        async def _events(self, request: ValidRequest, cached: int) -> AsyncGenerator[TokenEvent, None]:
            yield TokenEvent((1,), FinishReason.STOP)
            await asyncio.sleep(3600)

    rig = Rig()
    stages = Stages(Endless(script=()), rig.encoder, rig.resident, Deadlines(20.0, 20.0, 20.0))
    events = [event async for event in stages.run(ValidRequest((7,)), {}, Trace(), 60.0)]
    assert tokens(events) == [1] and now_s() == pytest.approx(LET_END_S)


async def test_each_token_has_its_deadline_and_all_have_the_request_s() -> None:
    rig = Rig(first_token_s=1.0, inter_token_s=1.0)
    rig.backend.step_s = 0.9
    assert tokens(await rig.run()) == [1, 2, 3, 4, 5]
    for first_s, inter_s, request_s, expected in ((2.0, 0.5, 60.0, 1.4), (0.5, 2.0, 60.0, 0.5), (2.0, 2.0, 1.5, 1.5)):
        rig = Rig(first_token_s=first_s, inter_token_s=inter_s, request_s=request_s)
        rig.backend.step_s = 0.9
        began = now_s()
        with pytest.raises(StageTimeout):
            await rig.run()
        assert now_s() - began == pytest.approx(expected)


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
    rig = Rig(first_token_s=0.01)
    rig.backend.step_s = 30
    with pytest.raises(StageTimeout):
        await rig.run(stream=False)
    rig = Rig(inter_token_s=0.01)
    rig.backend.step_s = 0.02
    assert tokens(await rig.run(stream=False)) == [1, 2, 3, 4, 5], "an unstreamed answer may take its time"


async def test_an_encoder_that_says_nothing_is_a_timeout() -> None:
    rig = Rig(encode_s=0.01)
    rig.backend.encode_s = 30
    with pytest.raises(StageTimeout):
        await rig.run(KEYS[0])

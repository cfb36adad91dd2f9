"""The outbox: every answer arrives, in order and once, however slow those are who take them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from service.contract import FinishReason, TokenEvent
from service.decoder.outbox import Answer, Outbox
from service.errors import Internal, StageLost

STOP = FinishReason.STOP


class Reader:
    """Takes answers while its gate is open. `waiting`: it stands before the gate."""

    def __init__(self, *, error: Exception | None = None) -> None:
        self.answers: list[Answer] = []
        self.gate = threading.Event()
        self.gate.set()
        self.waiting = threading.Event()
        self.error = error
        self.leaves = False

    def deliver(self, answer: Answer) -> None:
        self.waiting.set()
        assert self.gate.wait(5)
        self.answers.append(answer)
        if self.error is not None:
            raise self.error

    def is_cancelled(self) -> bool:
        return self.leaves


class World:
    def __init__(self) -> None:
        self.told: list[int] = []
        self.outbox: Outbox[int] = Outbox(self.told.append)
        self.readers: list[Reader] = []

    def open(self, reader: Reader) -> int:
        self.readers.append(reader)
        self.outbox.open(len(self.readers) - 1, reader.deliver, reader.is_cancelled)
        return len(self.readers) - 1

    def given_up(self) -> dict[int, object]:
        deadline_s = time.monotonic() + 5
        while not (given_up := dict(self.outbox.take_given_up())):
            assert time.monotonic() < deadline_s, "nobody was given up"
            time.sleep(0.005)
        return given_up


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.outbox.close(5)


def test_what_waits_is_put_together_and_the_last_stays_the_last(world: World) -> None:
    reader = Reader()
    reader.gate.clear()
    request_id = world.open(reader)
    world.outbox.post([(request_id, TokenEvent((1,)))])
    assert reader.waiting.wait(5)  # the first is under way; from here on it lags
    for token in range(2, 1000):
        world.outbox.post([(request_id, TokenEvent((token,)))])
    assert world.outbox.post([(request_id, TokenEvent((1000,), STOP))]) == {request_id}
    reader.gate.set()
    world.outbox.close(5)
    assert reader.answers == [TokenEvent((1,)), TokenEvent(tuple(range(2, 1001)), STOP)]


def test_an_error_comes_after_the_tokens_before_it(world: World) -> None:
    slow, other = Reader(), Reader()
    slow.gate.clear()
    slow_id, other_id = world.open(slow), world.open(other)
    world.outbox.post([(slow_id, TokenEvent((1,)))])
    assert slow.waiting.wait(5)
    error = StageLost("gone")
    world.outbox.post([(other_id, TokenEvent((2,))), (slow_id, TokenEvent((3,)))])
    world.outbox.post([(other_id, error), (slow_id, None)])
    slow.gate.set()
    world.outbox.close(5)
    assert other.answers == [TokenEvent((2,)), error]
    assert slow.answers == [TokenEvent((1,)), TokenEvent((3,)), None]


def test_an_answer_that_cannot_be_delivered_gives_up_its_request_alone(world: World) -> None:
    deaf, other = Reader(error=RuntimeError("the stream is gone")), Reader()
    deaf_id, other_id = world.open(deaf), world.open(other)
    world.outbox.post([(deaf_id, TokenEvent((1,))), (other_id, TokenEvent((1,)))])
    ((given_up, reason),) = world.given_up().items()
    assert given_up == deaf_id
    assert isinstance(reason, Internal)
    assert world.outbox.post([(other_id, TokenEvent((2,), STOP))]) == {other_id}
    world.outbox.close(5)
    assert [token for event in other.answers for token in event.token_ids] == [1, 2]  # type: ignore[union-attr]


def test_a_cancel_is_noticed_while_nothing_is_posted_and_only_that(world: World) -> None:
    leaver, other = Reader(), Reader()
    leaver_id, _ = world.open(leaver), world.open(other)
    time.sleep(0.1)
    assert not world.outbox.take_given_up()
    leaver.leaves = True
    assert world.given_up() == {leaver_id: None}


def test_one_whose_last_answer_was_posted_is_not_given_up_any_more(world: World) -> None:
    leaver = Reader()
    request_id = world.open(leaver)
    world.outbox.post([(request_id, TokenEvent((1,), STOP))])
    leaver.leaves = True
    time.sleep(0.15)
    assert not world.outbox.take_given_up()


def test_a_last_answer_that_cannot_be_delivered_concerns_the_engine_no_more(world: World) -> None:
    deaf = Reader(error=RuntimeError("the stream is gone"))
    world.outbox.post([(world.open(deaf), TokenEvent((1,), STOP))])
    world.outbox.close(5)
    assert deaf.answers
    assert not world.outbox.take_given_up()


def test_the_latest_counts_are_told_also_when_nothing_else_happens(world: World) -> None:
    for count in range(100):
        world.outbox.post([], count)
    deadline_s = time.monotonic() + 5
    while world.told[-1:] != [99]:
        assert time.monotonic() < deadline_s
        time.sleep(0.005)
    assert world.told == sorted(set(world.told))


def test_the_engine_is_told_to_wait_when_many_have_ended_and_were_not_told() -> None:
    outbox: Outbox[int] = Outbox(lambda stats: None, max_unsent=8)
    readers = [Reader() for _ in range(17)]
    for request_id, reader in enumerate(readers):
        reader.gate.clear()
        outbox.open(request_id, reader.deliver, reader.is_cancelled)
    outbox.post([(0, TokenEvent((1,), STOP))])
    assert readers[0].waiting.wait(5)
    for request_id in range(1, 9):
        assert outbox.has_room(0.0)
        outbox.post([(request_id, TokenEvent((1,), STOP))])
    assert not outbox.has_room(0.0)
    for reader in readers:
        reader.gate.set()
    assert outbox.has_room(5.0)
    outbox.close(5)
    assert [len(reader.answers) for reader in readers] == [1] * 9 + [0] * 8


def test_one_that_never_takes_anything_does_not_hold_up_the_end_which_says_so(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    stuck = Reader()
    stuck.gate.clear()
    world.outbox.post([(world.open(stuck), TokenEvent((1,), STOP))])
    assert stuck.waiting.wait(5)
    started_s = time.monotonic()
    world.outbox.close(0.2)
    assert time.monotonic() - started_s < 2
    assert [record.getMessage() for record in caplog.records] == [
        "answers were not delivered within 0.2 s; 0 requests were next"
    ]
    stuck.gate.set()

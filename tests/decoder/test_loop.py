"""The loop: a request's trouble is its own; a process that can do nothing more says so to all, and ends."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from service.contract import FinishReason, TokenEvent, ValidRequest
from service.decoder.engine import Delivery
from service.decoder.loop import EngineLoop
from service.errors import CrossgateError, Internal, Overloaded, Unavailable
from service.isolation import Broken

Answer = TokenEvent | CrossgateError | None
REQUEST = ValidRequest((1, 2, 3))
LAST = TokenEvent((7,), FinishReason.STOP)
WHOLE = TokenEvent((5, 7), FinishReason.STOP)  # in one event or in two: the outbox may put them together


class FakeEngine:
    """Each request takes two steps. What is set to an exception is raised instead."""

    def __init__(self) -> None:
        self.requests: dict[int, int] = {}
        self.cancelled: list[int] = []
        self.on_add: BaseException | None = None
        self.on_step: BaseException | None = None
        self.on_cancel: BaseException | None = None
        self.on_stats: BaseException | None = None

    def add(self, request_id: int, request: ValidRequest, latents: object, latent_index: list[int]) -> None:
        raise_if(self.on_add)
        self.requests[request_id] = 0

    def cancel(self, request_id: int) -> None:
        raise_if(self.on_cancel)
        self.cancelled.append(request_id)
        self.requests.pop(request_id, None)

    @property
    def num_running(self) -> int:
        return 3

    @property
    def has_work(self) -> bool:
        return bool(self.requests)

    def step(self) -> list[Delivery]:
        raise_if(self.on_step)
        deliveries: list[Delivery] = []
        for request_id, steps in list(self.requests.items()):
            self.requests[request_id] += 1
            deliveries.append((request_id, TokenEvent((5,)) if steps == 0 else LAST))
            if steps == 1:
                del self.requests[request_id]
        return deliveries

    def stats(self) -> str:
        raise_if(self.on_stats)
        return "counts"


def raise_if(error: BaseException | None) -> None:
    if error is not None:
        raise error


class Client:
    def __init__(self) -> None:
        self.answers: list[Answer] = []
        self.ended = threading.Event()
        self.leaves = False
        self.on_deliver: BaseException | None = None
        self.on_asked: BaseException | None = None

    def deliver(self, answer: Answer) -> None:
        self.answers.append(answer)
        if not isinstance(answer, TokenEvent) or answer.finish_reason is not None:
            self.ended.set()
        raise_if(self.on_deliver)

    def is_cancelled(self) -> bool:
        raise_if(self.on_asked)
        return self.leaves

    @property
    def last(self) -> Answer:
        """The last answer, with all tokens if it is an event."""
        assert self.ended.wait(5), "it hangs"
        last = self.answers[-1]
        if isinstance(last, TokenEvent):
            events = [answer for answer in self.answers if isinstance(answer, TokenEvent)]
            return replace(last, token_ids=tuple(token for event in events for token in event.token_ids))
        return last


class World:
    def __init__(self) -> None:
        self.engine = FakeEngine()
        self.ends = threading.Semaphore(0)
        self.on_step: Callable[[], None] = lambda: None
        self.loop = EngineLoop(lambda: self.engine, on_step=lambda stats: self.on_step(), end=self.ends.release)  # type: ignore[arg-type]

    def ask(self, client: Client | None = None) -> Client:
        client = client or Client()
        self.loop.submit(REQUEST, None, [], client.deliver, client.is_cancelled)
        return client

    @property
    def process_ended(self) -> bool:
        return self.ends.acquire(timeout=5)


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.loop.close()


def assert_serves(world: World) -> None:
    assert world.ask().last == WHOLE
    assert world.loop.is_alive
    assert not world.ends.acquire(blocking=False)


@pytest.mark.parametrize("error", [ValueError("bug"), MemoryError(), RuntimeError("no"), RecursionError()])
def test_a_request_that_cannot_be_added_is_told_so_and_the_loop_lives(world: World, error: Exception) -> None:
    world.engine.on_add = error
    assert isinstance(world.ask().last, Internal)
    world.engine.on_add = None
    assert_serves(world)


def test_a_refusal_is_delivered_as_it_is(world: World) -> None:
    world.engine.on_add = Overloaded("full")
    assert world.ask().last is world.engine.on_add
    world.engine.on_add = None
    assert_serves(world)


def test_a_request_that_cannot_say_whether_it_was_cancelled_ends_alone(world: World) -> None:
    broken = Client()
    broken.on_asked = RuntimeError("gone")
    assert isinstance(world.ask(broken).last, Internal | TokenEvent)
    assert_serves(world)


def test_an_answer_that_does_not_arrive_ends_its_request_alone(world: World) -> None:
    deaf = Client()
    deaf.on_deliver = RuntimeError("the stream is gone")
    other = world.ask()
    world.ask(deaf)
    assert other.last == WHOLE
    assert deaf.ended.wait(5)
    assert_serves(world)
    assert not world.engine.requests


@pytest.mark.parametrize("stage", ["stats", "on_step"])
def test_a_step_that_cannot_be_reported_is_computed_all_the_same(world: World, stage: str) -> None:
    def fail() -> None:
        raise RuntimeError("no metrics")

    if stage == "stats":
        world.engine.on_stats = RuntimeError("no numbers")
    else:
        world.on_step = fail
    assert_serves(world)


def test_a_client_that_leaves_is_dropped(world: World) -> None:
    world.engine.step = lambda: []  # type: ignore[method-assign]  # never ends
    client = world.ask()
    client.leaves = True
    assert client.last is None
    assert not world.engine.requests


def test_one_step_that_fails_as_a_whole_costs_its_requests(world: World) -> None:
    world.engine.on_step = RuntimeError("accounting")
    assert isinstance(world.ask().last, Internal)
    world.engine.on_step = None
    assert_serves(world)


@pytest.mark.parametrize(
    "error",
    [
        Broken("nothing works"),
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: device-side assert triggered"),
        SystemExit(),
        KeyboardInterrupt(),
    ],
    ids=repr,
)
def test_what_no_later_step_survives_ends_the_process_and_everybody_is_told(world: World, error: BaseException) -> None:
    world.engine.on_step = error
    clients = [world.ask() for _ in range(3)]
    assert all(isinstance(client.last, Unavailable | TokenEvent) for client in clients)
    assert isinstance(clients[0].last, Unavailable)
    assert world.process_ended
    assert not world.loop.is_alive
    assert isinstance(world.ask().last, Unavailable), "who comes later is told at once"


def test_steps_that_fail_one_after_the_other_end_the_process(world: World) -> None:
    world.engine.on_step = RuntimeError("accounting")
    answers = [world.ask().last for _ in range(3)]
    assert all(isinstance(answer, Internal | Unavailable) for answer in answers)
    assert world.process_ended


def test_a_request_that_cannot_be_freed_ends_the_process_and_everybody_is_told(world: World) -> None:
    """Blocks whose owner nobody knows are lost for good."""
    world.engine.step = lambda: []  # type: ignore[method-assign]
    other, leaver = world.ask(), Client()
    world.engine.on_cancel = KeyError("refcount")
    leaver.leaves = True
    world.ask(leaver)
    assert isinstance(other.last, Unavailable)
    assert isinstance(leaver.last, Unavailable)
    assert world.process_ended


def test_closing_tells_everybody_and_is_no_failure(world: World) -> None:
    world.engine.step = lambda: []  # type: ignore[method-assign]
    client = world.ask()
    world.loop.close()
    assert isinstance(client.last, Unavailable)
    assert isinstance(world.ask().last, Unavailable)
    assert not world.ends.acquire(blocking=False)


def test_a_thread_that_does_not_end_when_it_is_closed_is_an_error_in_the_log(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    entered, computed = threading.Event(), threading.Event()

    def step() -> list[Delivery]:
        entered.set()
        assert computed.wait(5)
        return []

    world.engine.step = step  # type: ignore[method-assign]
    client = world.ask()
    assert entered.wait(5)
    world.loop.close(timeout_s=0.01)
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == [
        "the decoder's thread did not end within 0.01 s; its requests may not have been told"
    ]
    computed.set()
    caplog.clear()
    world.loop.close()
    assert isinstance(client.last, Unavailable) and not caplog.records


def test_a_process_of_no_more_use_ends_with_status_1_and_one_line_of_why() -> None:
    code = (
        "import time\n"
        "from service.isolation import Broken\n"
        "from service.decoder.loop import EngineLoop\n"
        "from tests.decoder.test_loop import Client, FakeEngine, REQUEST\n"
        "engine, client = FakeEngine(), Client()\n"
        "engine.on_step = Broken('the accelerator is sick')\n"
        "EngineLoop(lambda: engine).submit(REQUEST, None, [], client.deliver, client.is_cancelled)\n"
        "time.sleep(30)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "the accelerator is sick" in done.stderr


def test_every_step_is_made_in_a_turn_of_its_own_even_one_that_fails() -> None:
    turns: list[str] = []

    @contextmanager
    def computing(num_running: int) -> Iterator[None]:
        turns.append(f"begins for {num_running}")
        try:
            yield
        finally:
            turns.append("ends")

    engine = FakeEngine()
    loop = EngineLoop(lambda: engine, computing=computing)  # type: ignore[arg-type,return-value]
    for engine.on_step in (None, RuntimeError("no")):
        client = Client()
        loop.submit(REQUEST, None, [], client.deliver, client.is_cancelled)
        assert client.last
    loop.close()
    assert turns == ["begins for 3", "ends"] * 3


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_the_process_ends_even_if_nobody_can_be_told(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.engine.on_step = Broken("nothing works")
    monkeypatch.setattr(world.loop, "_leave", lambda *_, **__: raise_if(KeyError(7)))
    world.ask()
    assert world.process_ended

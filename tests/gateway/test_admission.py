from __future__ import annotations

import asyncio
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.errors import Internal, InvalidRequest, Overloaded, Unavailable
from service.gateway.admission import RETRY_AFTER_S, Admission, Outcome

KEYS = ("alice", "bob", "carol", "dave")


Ended = list[tuple[str | None, Outcome]]


def make(ended: Ended, *, running: int = 1, waiting: int = 1, wait_s: float = 10.0, shared: bool = False) -> Admission:
    admission = Admission(
        max_running=running,
        max_shared=running,
        max_waiting=waiting,
        max_wait_s=wait_s,
        on_end=lambda key, outcome: ended.append((key, outcome)),
    )
    admission.share(shared)
    return admission


async def hold(admission: Admission, gate: asyncio.Event, key: str | None = None) -> None:
    async with admission.slot(key):
        await gate.wait()


async def test_one_runs_one_waits_the_third_is_turned_away() -> None:
    ended: Ended = []
    admission, gate = make(ended), asyncio.Event()
    tasks = [asyncio.create_task(hold(admission, gate)) for _ in range(2)]
    await asyncio.sleep(0)
    assert (admission.num_running, admission.num_waiting) == (1, 1)
    with pytest.raises(Overloaded) as caught:
        await hold(admission, gate)
    assert caught.value.retry_after_s == RETRY_AFTER_S
    gate.set()
    await asyncio.gather(*tasks)
    assert ended == [(None, Outcome.FINISHED)] * 2
    assert (admission.num_running, admission.num_waiting) == (0, 0)


async def test_who_waits_too_long_is_turned_away() -> None:
    ended: Ended = []
    admission, gate = make(ended, wait_s=0.01), asyncio.Event()
    task = asyncio.create_task(hold(admission, gate))
    await asyncio.sleep(0)
    with pytest.raises(Overloaded) as caught:
        await hold(admission, gate)
    assert caught.value.retry_after_s == RETRY_AFTER_S
    gate.set()
    await task
    assert admission.num_running == 0 and ended == [(None, Outcome.FINISHED)]


async def test_draining_admits_nobody_but_lets_the_waiting_run() -> None:
    ended: Ended = []
    admission, gate = make(ended), asyncio.Event()
    tasks = [asyncio.create_task(hold(admission, gate)) for _ in range(2)]
    await asyncio.sleep(0)
    assert not admission.draining
    admission.drain()
    assert admission.draining
    with pytest.raises(Unavailable) as caught:
        await hold(admission, gate)
    assert caught.value.retry_after_s == RETRY_AFTER_S
    gate.set()
    await asyncio.gather(*tasks)
    assert len(ended) == 2


@pytest.mark.parametrize("seed", range(5))
async def test_every_admitted_request_ends_once_and_no_place_is_lost(seed: int) -> None:
    chance = random.Random(seed)
    ended: Ended = []
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


async def test_one_key_leaves_places_for_the_others_in_both_the_batch_and_the_queue() -> None:
    ended: Ended = []
    admission, gate = make(ended, running=32, waiting=32, shared=True), asyncio.Event()
    hogs = [asyncio.create_task(hold(admission, gate, "alice")) for _ in range(500)]
    await asyncio.sleep(0)
    assert (admission.running_of("alice"), admission.waiting_of("alice")) == (24, 24)
    guests = [asyncio.create_task(hold(admission, gate, key)) for key in ("bob", "carol", "bob")]
    await asyncio.sleep(0)
    assert (admission.running_of("bob"), admission.running_of("carol")) == (2, 1)  # at once
    gate.set()
    refused = [result for result in await asyncio.gather(*hogs, *guests, return_exceptions=True) if result is not None]
    assert len(refused) == 500 - 48 and all(isinstance(error, Overloaded) for error in refused)
    assert len(ended) == 51


async def test_a_key_alone_has_every_place() -> None:
    admission, gate = make([], running=8, waiting=4), asyncio.Event()
    tasks = [asyncio.create_task(hold(admission, gate, "alice")) for _ in range(12)]
    await asyncio.sleep(0)
    assert (admission.num_running, admission.num_waiting) == (8, 4)
    gate.set()
    await asyncio.gather(*tasks)


async def test_a_single_request_of_another_key_may_wait_however_many_wait() -> None:
    admission, gate = make([], running=1, waiting=2, shared=True), asyncio.Event()
    tasks = [asyncio.create_task(hold(admission, gate, key)) for key in ("alice", "alice", "alice", "bob", "carol")]
    await asyncio.sleep(0)
    assert [admission.waiting_of(key) for key in KEYS] == [1, 1, 1, 0]
    gate.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result) for result in results].count(Overloaded) == 1


@pytest.mark.parametrize(("places", "most"), [(1, 1), (2, 1), (4, 3), (5, 3), (8, 6), (9, 6), (13, 9), (32, 24)])
async def test_a_key_starts_another_while_it_has_less_than_three_times_what_would_stay_free(
    places: int, most: int
) -> None:
    admission, gate = make([], running=places, waiting=0, shared=True), asyncio.Event()
    tasks = [asyncio.create_task(hold(admission, gate, "alice")) for _ in range(places + 1)]
    await asyncio.sleep(0)
    assert admission.running_of("alice") == most
    gate.set()
    await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.parametrize("shared", [False, True])
async def test_where_nobody_may_wait_nobody_waits_and_where_one_may_one_does(shared: bool) -> None:
    for waiting in (0, 1):
        admission, gate = make([], running=1, waiting=waiting, shared=shared), asyncio.Event()
        tasks = [asyncio.create_task(hold(admission, gate, key)) for key in ("alice", "alice", "alice")]
        await asyncio.sleep(0)
        assert (admission.num_running, admission.num_waiting) == (1, waiting)
        gate.set()
        await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.parametrize(("max_shared", "expected"), [(4, 3), (99, 6)])
async def test_fewer_places_may_be_shared_than_there_are_and_never_more(max_shared: int, expected: int) -> None:
    admission = Admission(
        max_running=8, max_shared=max_shared, max_waiting=9, max_wait_s=9.0, on_end=lambda key, outcome: None
    )
    gate = asyncio.Event()
    tasks = [asyncio.create_task(hold(admission, gate, "alice")) for _ in range(12)]
    await asyncio.sleep(0)
    assert admission.num_running == 8, "nobody shares until told to"
    gate.set()
    await asyncio.gather(*tasks)
    admission.share(True)
    gate.clear()
    tasks = [asyncio.create_task(hold(admission, gate, "alice")) for _ in range(8)]
    await asyncio.sleep(0)
    assert admission.running_of("alice") == expected
    gate.set()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_who_waits_is_let_in_when_places_are_no_longer_shared() -> None:
    admission, gate = make([], running=4, waiting=8, shared=True), asyncio.Event()
    tasks = [asyncio.create_task(hold(admission, gate, "alice")) for _ in range(4)]
    await asyncio.sleep(0)
    assert (admission.num_running, admission.num_waiting) == (3, 1)
    admission.share(False)
    assert (admission.num_running, admission.num_waiting) == (4, 0)
    gate.set()
    await asyncio.gather(*tasks)


async def test_who_leaves_in_the_moment_in_which_another_gets_the_place_just_leaves() -> None:
    admission, gate = make([], running=1, waiting=9), asyncio.Event()
    first, leaver, last = (asyncio.create_task(hold(admission, gate)) for _ in range(3))
    await asyncio.sleep(0)
    leaver.cancel()
    admission.share(False)
    gate.set()
    admission.leave(None, Outcome.FINISHED)  # before the leaver has run
    assert (admission.num_running, admission.num_waiting) == (1, 0)
    first.cancel()
    results = await asyncio.gather(first, leaver, last, return_exceptions=True)
    assert isinstance(results[1], asyncio.CancelledError) and results[2] is None


async def test_a_key_that_has_gone_leaves_nothing_behind() -> None:
    admission, gate = make([], running=1, waiting=9), asyncio.Event()
    tasks = [asyncio.create_task(hold(admission, gate, key)) for key in (*KEYS, *KEYS)]
    await asyncio.sleep(0)
    for task in tasks[2:]:
        task.cancel()
    gate.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert not admission._running and not admission._waiting


@pytest.mark.parametrize("shared", [False, True])
async def test_of_one_key_who_came_first_goes_first(shared: bool) -> None:
    admission = make([], running=2, waiting=9, shared=shared)
    order: list[int] = []

    async def one(number: int) -> None:
        async with admission.slot("alice"):
            order.append(number)
            await asyncio.sleep(0)

    await asyncio.gather(*map(one, range(5)))
    assert order == list(range(5))


async def test_keys_that_wait_take_turns() -> None:
    admission = make([], running=1, waiting=100, shared=True)
    order: list[str] = []

    async def one(key: str) -> None:
        async with admission.slot(key):
            order.append(key)
            await asyncio.sleep(0)

    asked = ["alice"] * 4 + ["bob"] * 2 + ["carol"]
    await asyncio.gather(*(one(key) for key in asked))
    assert order == ["alice", "alice", "bob", "carol", "alice", "bob", "alice"]


async def test_places_are_shared_evenly_though_one_key_s_requests_last_longer() -> None:
    """By places held and not by places given: who holds long must not hold most."""
    admission = make([], running=9, waiting=500, shared=True)
    num_steps = most = 0

    async def one(key: str, steps: int) -> None:
        nonlocal num_steps, most
        async with admission.slot(key):
            for _ in range(steps):
                await asyncio.sleep(0)
                num_steps += 1
                if num_steps > 600 and admission.waiting_of("bob"):  # what alice took while alone is back by then
                    most = max(most, admission.running_of("alice"))

    await asyncio.gather(*(one("alice", 50) for _ in range(60)), *(one("bob", 5) for _ in range(200)))
    assert most == 4


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (None, Outcome.FINISHED),
        (asyncio.CancelledError(), Outcome.CANCELLED),
        (GeneratorExit(), Outcome.CANCELLED),
        (InvalidRequest("no picture"), Outcome.REFUSED),
        (Overloaded("full"), Outcome.REFUSED),
        (Unavailable("gone"), Outcome.FAILED),
        (Internal("broken"), Outcome.FAILED),
        (ZeroDivisionError(), Outcome.FAILED),
    ],
)
async def test_how_the_block_is_left_says_how_the_request_ended(error: BaseException | None, outcome: Outcome) -> None:
    ended: Ended = []
    admission = make(ended)
    try:
        async with admission.slot("alice"):
            if error is not None:
                raise error
    except BaseException as raised:
        assert raised is error
    assert ended == [("alice", outcome)]


STEPS = st.lists(
    st.tuples(st.sampled_from(["arrive", "end", "fail", "cancel", "pass", "share"]), st.integers(0, 10**6)), max_size=80
)


@given(steps=STEPS, running=st.integers(1, 9), waiting=st.integers(0, 12), num_keys=st.integers(1, 4))
@settings(max_examples=300, deadline=None)
def test_whatever_happens_bounds_hold_and_nobody_is_lost(
    steps: list[tuple[str, int]], running: int, waiting: int, num_keys: int
) -> None:
    asyncio.run(_whatever_happens(steps, running, waiting, num_keys))


async def _whatever_happens(steps: list[tuple[str, int]], running: int, waiting: int, num_keys: int) -> None:
    ended: Ended = []
    admission = make(ended, running=running, waiting=waiting, shared=num_keys > 1)
    gates: list[asyncio.Event] = []
    tasks: list[asyncio.Task[None]] = []
    arrived: dict[str, list[int]] = {key: [] for key in KEYS}  # numbers, as they came
    entered: dict[str, list[int]] = {key: [] for key in KEYS}  # and as they were let in
    fails: set[int] = set()

    async def one(number: int, key: str) -> None:
        async with admission.slot(key):
            entered[key].append(number)
            await gates[number].wait()
            if number in fails:
                raise ValueError

    for action, chance in steps:
        if action == "arrive":
            key = KEYS[chance % num_keys]
            arrived[key].append(len(tasks))
            gates.append(asyncio.Event())
            tasks.append(asyncio.create_task(one(len(tasks), key)))
        elif action == "share":
            admission.share(bool(chance % 2) and num_keys > 1)
        elif action == "pass":
            await asyncio.sleep(0)
        elif tasks:
            number = chance % len(tasks)
            if action == "cancel":
                tasks[number].cancel()
            else:
                if action == "fail":
                    fails.add(number)
                gates[number].set()
        assert admission.num_running <= running
        assert admission.num_waiting <= waiting + num_keys
        for key in KEYS:  # a key without a place waits for one only while all are taken
            if admission.waiting_of(key) and not admission.running_of(key):
                assert admission.num_running == running
    for gate in gates:
        gate.set()
    async with asyncio.timeout(10):  # nobody starves once the places fall free
        await asyncio.gather(*tasks, return_exceptions=True)
    assert (admission.num_running, admission.num_waiting) == (0, 0)
    assert len(ended) == sum(map(len, entered.values()))
    for key in KEYS:
        assert entered[key] == sorted(entered[key]) and set(entered[key]) <= set(
            arrived[key]
        )  # first come, first served


@given(asked=st.lists(st.sampled_from(KEYS), min_size=2, max_size=60), running=st.integers(2, 9))
@settings(max_examples=200, deadline=None)
def test_no_key_starves_behind_others(asked: list[str], running: int) -> None:
    """Whoever waits is let in before any other key has had more than one round."""

    async def run() -> None:
        admission = make([], running=running, waiting=1000, shared=True)
        order: list[str] = []

        async def one(key: str) -> None:
            async with admission.slot(key):
                order.append(key)
                for _ in range(3):
                    await asyncio.sleep(0)

        await asyncio.gather(*(one(key) for key in asked))
        for key in set(asked):
            assert order.index(key) < running + len(KEYS)

    asyncio.run(run())

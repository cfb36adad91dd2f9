"""Two processes on the same cores: one computes at a time, and neither waits for one that is stopped or dead."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import pytest

from service.turns import MAX_SHARE, TIMEOUT_S, Turns

SPAWN = multiprocessing.get_context("spawn")
NUM_TURNS, TURN_S = 20, 0.02
Interval = tuple[float, float]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "turns"
    file.touch()
    return file


@pytest.fixture
def start() -> Iterator[Callable[..., Any]]:
    """Starts a process that calls a function; ended at the test's end."""
    processes = []

    def start(function: Callable[..., None], *arguments: object) -> Any:
        processes.append(SPAWN.Process(target=function, args=arguments, daemon=True))
        processes[-1].start()
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.join()


def compute(file: Path, intervals: Queue[list[Interval]], ready: Any, num_served: int = 1) -> None:
    """Turn after turn without a pause."""
    turns = Turns(file)
    ready.wait()
    mine = []
    for _ in range(NUM_TURNS):
        with turns.turn(num_served):
            start_s = time.monotonic()
            time.sleep(TURN_S)
            mine.append((start_s, time.monotonic()))
    intervals.put(mine)


def compute_in_layers(file: Path, intervals: Queue[list[Interval]], ready: Any, num_served: int) -> None:
    """One turn of many layers, a tenth of the other's turn each."""
    turns = Turns(file)
    ready.wait()
    mine = []
    with turns.turn(num_served):
        for _ in range(10 * NUM_TURNS * int(MAX_SHARE)):
            turns.pass_on()
            start_s = time.monotonic()
            time.sleep(TURN_S / 10)
            mine.append((start_s, time.monotonic()))
    intervals.put(mine)


def hold(file: Path, held: Queue[bool], num_served: int = 1) -> None:
    with Turns(file).turn(num_served):
        held.put(True)
        time.sleep(3600)


def overlap(ones: list[Interval], others: list[Interval]) -> float:
    return sum(max(0.0, min(a[1], b[1]) - max(a[0], b[0])) for a in ones for b in others)


def test_two_that_always_compute_take_turns(file: Path, start: Callable[..., Any]) -> None:
    intervals: Queue[list[Interval]] = SPAWN.Queue()
    ready = SPAWN.Barrier(2)
    for _ in range(2):
        start(compute, file, intervals, ready)
    ones, others = intervals.get(timeout=60), intervals.get(timeout=60)
    assert overlap(ones, others) == 0
    who = "".join(name for _, name in sorted([*((a, "a") for a in ones), *((b, "b") for b in others)]))
    assert max(len(who.replace("ab", "").replace("ba", "")), who.count("aa") + who.count("bb")) <= 4  # at either end


@pytest.mark.parametrize(
    ("num_pictures", "num_sequences", "share"), [(1, 1, 1), (16, 8, 1), (2, 30, 1), (8, 2, 2), (16, 1, 4)]
)
def test_a_long_turn_lets_the_other_in_after_its_share(
    file: Path, start: Callable[..., Any], num_pictures: int, num_sequences: int, share: int
) -> None:
    """By how many wait for either: its own length as of the other's turn, and more where it serves many for few."""
    intervals: Queue[list[Interval]] = SPAWN.Queue()
    ready = SPAWN.Barrier(2)
    start(compute, file, intervals, ready, num_sequences)
    start(compute_in_layers, file, intervals, ready, num_pictures)
    steps, layers = sorted((intervals.get(timeout=60), intervals.get(timeout=60)), key=len)
    assert overlap(steps, layers) == 0
    within = [sum(before[1] <= layer[0] < after[0] for layer in layers) for before, after in pairwise(steps)]
    in_layers = sorted(count for count in within if count)  # the layers may begin late and end early
    assert len(in_layers) >= 8
    assert 10 * share - 2 <= in_layers[len(in_layers) // 2] <= 10 * share + 2


def test_whoever_is_alone_waits_for_nobody(file: Path) -> None:
    turns = Turns(file)
    start_s = time.monotonic()
    for _ in range(1000):
        with turns.turn():
            turns.pass_on()
    assert time.monotonic() - start_s < 1.0


def test_the_turn_of_one_that_was_killed_is_free(file: Path, start: Callable[..., Any]) -> None:
    held: Queue[bool] = SPAWN.Queue()
    process = start(hold, file, held)
    held.get(timeout=60)
    process.kill()
    process.join()
    start_s = time.monotonic()
    with Turns(file).turn():
        assert time.monotonic() - start_s < TIMEOUT_S / 2


def test_one_that_was_killed_computes_for_nobody_any_more(file: Path, start: Callable[..., Any]) -> None:
    held: Queue[bool] = SPAWN.Queue()
    process = start(hold, file, held, 8)
    held.get(timeout=60)
    turns = Turns(file)
    assert turns.share() == 1
    process.kill()
    process.join()
    with turns.turn(6):
        assert turns.share() == 3  # as beside one


def test_one_that_is_stopped_is_waited_for_once(file: Path, start: Callable[..., Any]) -> None:
    held: Queue[bool] = SPAWN.Queue()
    process = start(hold, file, held)
    held.get(timeout=60)
    os.kill(process.pid, signal.SIGSTOP)
    turns = Turns(file)
    start_s = time.monotonic()
    with turns.turn():
        waited_s = time.monotonic() - start_s
    assert TIMEOUT_S <= waited_s < TIMEOUT_S + 1
    start_s = time.monotonic()
    for _ in range(20):
        with turns.turn():
            pass
    assert time.monotonic() - start_s < 0.5
    process.kill()
    process.join()
    with turns.turn():  # and from now on it waits again
        ready, intervals = SPAWN.Barrier(2), SPAWN.Queue()
        start(compute, file, intervals, ready)
        ready.wait(timeout=60)
        time.sleep(0.3)
    start_s = time.monotonic()
    with turns.turn():
        assert TURN_S / 2 <= time.monotonic() - start_s < TIMEOUT_S / 2


def test_a_turn_ends_with_an_error_in_it(file: Path) -> None:
    with pytest.raises(RuntimeError), Turns(file).turn():
        raise RuntimeError
    start_s = time.monotonic()
    with Turns(file).turn():
        assert time.monotonic() - start_s < TIMEOUT_S / 2

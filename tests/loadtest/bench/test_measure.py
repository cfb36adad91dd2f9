"""Rounds alternate, the warm-up does not count, and what is long is not repeated."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from loadtest.bench.measure import LONG_S, WARM_TOKENS, measure
from loadtest.bench.scenario import Request, Scenario
from loadtest.bench.systems import Round

SCENARIO = Scenario("two", 2, num_tokens=(10, 10), without=("left out",))


class Timed:
    """Takes a set time for each round and notes in `log` that it was asked."""

    def __init__(self, name: str, seconds: Sequence[float], log: list[str]) -> None:
        self.name, self._log = name, log
        self._seconds = iter(seconds)

    def run(self, requests: Sequence[Request]) -> Round:
        warm = requests[0].max_tokens == WARM_TOKENS
        self._log.append(f"{self.name}{' warm' * warm}")
        return Round(1e9 if warm else next(self._seconds), [[1] * request.max_tokens for request in requests], 0.1)

    def stop(self) -> None:
        pass


def agree(system: str, requests: Sequence[Request], tokens: Sequence[Sequence[int]]) -> float:
    return 1.0


def test_systems_take_turns_after_each_was_warmed() -> None:
    log: list[str] = []
    systems = [Timed("a", (1, 4, 2), log), Timed("left out", (), log), Timed("b", (LONG_S + 5,), log)]
    first, second = measure(SCENARIO, systems, "float32", 3, 9000, agree)
    assert log == ["a warm", "b warm", "a", "b", "a", "a"]
    assert first.tokens_per_s == [20, 5, 10] and first.rate == 10
    assert second.tokens_per_s == [1.0]
    assert first.client_cpu == pytest.approx([0.1, 0.025, 0.05])


def test_each_systems_first_round_is_checked_and_what_the_check_raises_ends_the_run() -> None:
    log: list[str] = []
    checked: list[str] = []

    def check(system: str, requests: Sequence[Request], tokens: Sequence[Sequence[int]]) -> float:
        checked.append(system)
        assert [len(answer) for answer in tokens] == [request.max_tokens for request in requests]
        if system == "b":
            raise ValueError("wrong")
        return 0.5

    with pytest.raises(ValueError, match="wrong"):
        measure(SCENARIO, [Timed("a", (1, 1), log), Timed("b", (1, 1), log)], "float32", 2, 9000, check)
    assert checked == ["a", "b"] and log[-1] == "b"
    (result,) = measure(SCENARIO, [Timed("a", (1, 1), log)], "float32", 2, 9000, check)
    assert result.agreed == 0.5

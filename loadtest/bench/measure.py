"""Rounds of a scenario: systems take turns, so that whatever else the machine does meets them all alike."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from loadtest.bench.scenario import Request, Scenario
from loadtest.bench.systems import Round, System

WARM_TOKENS = 4
LONG_S = 15.0  # a round that takes longer is measured once: it is its own average
WARM_UP = -1  # its number of a round: its pictures are nobody else's
Check = Callable[[str, Sequence[Request], Sequence[Sequence[int]]], float]  # of a system's answers; the share agreed


@dataclass
class Result:
    """A system in a scenario, by round. `agreed`: share of the first round's tokens that are the reference's."""

    scenario: str
    system: str
    dtype: str
    tokens_per_s: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    client_cpu: list[float] = field(default_factory=list)  # share of a core
    agreed: float = 1.0
    about: str = ""  # machine, commit, date

    @property
    def rate(self) -> float:
        return statistics.median(self.tokens_per_s)

    def add(self, measured: Round) -> None:
        self.tokens_per_s.append(measured.tokens_per_s)
        self.seconds.append(measured.seconds)
        if measured.client_cpu_s is not None:
            self.client_cpu.append(measured.client_cpu_s / measured.seconds)


def measure(
    scenario: Scenario, systems: Sequence[System], dtype: str, rounds: int, image_token_id: int, check: Check
) -> list[Result]:
    """The first round's tokens go to `check`, which raises if they must not be."""
    systems = [system for system in systems if system.name not in scenario.without]
    results = [Result(scenario.name, system.name, dtype) for system in systems]
    for system in systems:
        system.run(scenario.requests(image_token_id, WARM_UP, max_tokens=WARM_TOKENS))
    for turn in range(rounds):
        requests = scenario.requests(image_token_id, turn)
        for system, result in zip(systems, results, strict=True):
            if turn and result.seconds[0] > LONG_S:
                continue
            measured = system.run(requests)
            result.add(measured)
            if turn == 0:
                result.agreed = check(system.name, requests, measured.tokens)
    return results


def save(results: Sequence[Result], file: Path) -> None:
    """Add to what is in the file already; a scenario measured again replaces what it was."""
    measured = {(result.scenario, result.dtype) for result in results}
    kept = [result for result in load(file) if (result.scenario, result.dtype) not in measured]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps([asdict(result) for result in [*kept, *results]], indent=1))


def load(file: Path) -> list[Result]:
    return [Result(**fields) for fields in json.loads(file.read_text())] if file.exists() else []

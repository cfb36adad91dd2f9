"""A run on disk: `run.json` says what was done, `samples-<process>.jsonl` holds one line a request."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from loadtest.client import Reply


@dataclass(frozen=True)
class Sample:
    """One request. `at_s`: seconds since the epoch when it was sent. The rest as in `Reply`."""

    scenario: str
    route: str
    stream: bool
    at_s: float
    e2e_ms: float
    ttft_ms: float | None = None
    gaps_ms: list[float] = field(default_factory=list)
    usage: dict[str, Any] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)
    error: str | None = None
    left: bool = False

    @classmethod
    def of(cls, reply: Reply, *, scenario: str, route: str, stream: bool) -> Sample:
        return cls(
            scenario=scenario,
            route=route,
            stream=stream,
            at_s=time.time() - reply.e2e_ms / 1e3,
            e2e_ms=round(reply.e2e_ms, 2),
            ttft_ms=None if reply.ttft_ms is None else round(reply.ttft_ms, 2),
            gaps_ms=[round(gap, 2) for gap in reply.gaps_ms],
            usage={name: count for name, count in reply.usage.items() if isinstance(count, int)},
            timings=reply.timings,
            error=reply.error,
            left=reply.left,
        )


@dataclass(frozen=True)
class Run:
    """`about`: how it was made (users, rate, scenarios, host, start)."""

    name: str
    about: dict[str, Any]
    samples: tuple[Sample, ...]


class Recorder:
    """Appends to a run's folder; locust processes that share one write a file each."""

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "run.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        self._file: TextIO = (folder / f"samples-{os.getpid()}.jsonl").open("a", encoding="utf-8")

    def add(self, sample: Sample) -> None:
        self._file.write(json.dumps(asdict(sample), ensure_ascii=False) + "\n")

    def close(self) -> None:
        self._file.close()


def load_run(folder: Path) -> Run:
    """Raises FileNotFoundError if the folder holds no run, ValueError if it holds no request."""
    about = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    files = sorted(folder.glob("samples-*.jsonl"))
    lines = [line for file in files for line in file.read_text(encoding="utf-8").split("\n") if line]
    if not lines:
        raise ValueError(f"{folder} holds no request")
    samples = sorted((Sample(**json.loads(line)) for line in lines), key=lambda sample: sample.at_s)
    return Run(folder.name, about, tuple(samples))

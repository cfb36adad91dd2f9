"""What the service holds while nobody asks anything, before a fault and after: blocks, pages, permits, tasks, files.

Whatever it holds more of afterwards has leaked. `SLACK` is for what libraries open lazily, whichever request comes;
a leak per request is far above it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import psutil

from tests.reliability.subject import Subject

SLACK = {"files": 4, "threads": 10, "tasks": 2}  # gRPC keeps and drops threads as it likes
SETTLE_S = 60.0  # gRPC lets a thread go after some 20 s of rest
CACHES = ("cache", "resident", "kept", "info", "created", "config")  # gauges that may rise: what is kept on purpose

Holdings = dict[str, float]


def holdings(subject: Subject) -> Holdings:
    """Counts by name, `who what`."""
    held: Holdings = {}
    for role in ("gateway", "Triton", "encoder", "decoder"):
        process = subject.process(role)
        with suppress(psutil.Error):
            held[f"{role} files"] = process.num_fds()
            held[f"{role} threads"] = process.num_threads()
            held[f"{role} processes"] = len(process.children(recursive=True))
    if loop := subject.loop_state():
        held["gateway tasks"] = loop.tasks
    launcher = subject.running.process.pid
    held["shared memory"] = sum(1 for _ in Path("/dev/shm").glob(f"crossgate-{launcher}-*"))
    with suppress(httpx.TransportError):
        held.update((f"gateway {name}", value) for name, value in gauges(f"{subject.url}/metrics"))
    with suppress(httpx.TransportError):
        url = f"http://127.0.0.1:{subject.running.metrics_port}/metrics"
        held.update((f"Triton {name}", value) for name, value in gauges(url))
    return held


def gauges(url: str) -> Iterator[tuple[str, float]]:
    """Ours alone, as they are now, but for those of caches."""
    kinds: dict[str, str] = {}
    for line in httpx.get(url, timeout=10.0, headers={"connection": "close"}, verify=False).text.splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split()
            kinds[name] = kind
        elif line.startswith("crossgate_"):
            name, value = line.rsplit(" ", 1)
            bare = name.partition("{")[0]
            if kinds.get(bare) != "gauge":
                continue
            if bare == "crossgate_kv_cache_usage_ratio" or not any(word in bare for word in CACHES):
                yield name, float(value)


def leaked(before: Holdings, after: Holdings) -> list[str]:
    """In words, each with what it was and is."""
    return [
        f"{name} {before.get(name, 0):g} → {value:g}"
        for name, value in after.items()
        if value > before.get(name, 0) + SLACK.get(name.rpartition(" ")[2], 0)
    ]


async def settled(subject: Subject, before: Holdings) -> list[str]:
    """What is still leaked once everything had time to end: kept connections are closed, streams cancelled."""
    deadline_s = time.monotonic() + SETTLE_S
    while True:
        leaks = leaked(before, await asyncio.to_thread(holdings, subject))
        if not leaks or time.monotonic() > deadline_s:
            return leaks
        await asyncio.sleep(0.5)

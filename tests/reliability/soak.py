"""python -m tests.reliability.soak: mixed traffic at one and a half times what the service can do, open loop.

First a closed loop measures what it can do; then requests come at a fixed rate whether or not the last are done:
streamed and whole, pictures new and known, clients who leave, garbage. Nothing may be lost, memory stays flat.

Exit status 1 if a bound is broken. `--seconds N`; `--short`: what CI has time for. `--write`: into docs/reliability.md.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

from tests.e2e.running import Running
from tests.reliability import models, mutate, table
from tests.reliability.client import CLEAN, Answer, Client, Outcome, Reply
from tests.reliability.leaks import holdings, settled
from tests.reliability.load import warm_up
from tests.reliability.questions import GENERATE, Question, generate, make_questions, record
from tests.reliability.subject import Subject, environment
from tests.reliability.watch import Watch

SECONDS, SECONDS_SHORT = 600.0, 45.0
CAPACITY_S, CAPACITY_S_SHORT = 30.0, 10.0
NUM_CLIENTS = 24
OVERLOAD = 1.5
FILLING = 0.25  # of the time: until then queues fill, and what is admitted is not yet finished
SETTINGS = {"CROSSGATE_KV_BLOCKS": "2048", "CROSSGATE_IMAGE_PAGES": "256"}
MIN_GOODPUT = 0.8
MAX_GROWTH, ALLOWANCE = 1.10, 8 << 20  # the last third's mean over the first's, and what a page cache may add
PROBE_S = 1.0
HEADER = ("what", "measured", "bound")
KNOWN, NEW, LEAVER, GARBAGE = "a known picture", "a new picture", "who leaves", "garbage"
MIX = {KNOWN: 0.6, NEW: 0.2, LEAVER: 0.1, GARBAGE: 0.1}


class Traffic:
    """One request of the mix after another."""

    def __init__(self, client: Client, answers: dict[Question, Answer], seed: int) -> None:
        self._client = client
        self._answers = answers
        self._questions = list(answers)
        self._rng = random.Random(seed)
        self._next_picture = 1000 * (seed + 1)
        self.replies: list[tuple[str, Reply]] = []

    async def ask(self) -> None:
        kind = self._rng.choices(list(MIX), list(MIX.values()))[0]
        question = self._rng.choice(self._questions)
        if kind == KNOWN:
            reply = await self._client.ask(question.path, question.body, expected=self._answers[question])
        elif kind == NEW:
            self._next_picture += 1
            new = generate("What is new?", (self._next_picture,), stream=self._rng.random() < 0.5, max_tokens=24)
            reply = await self._client.ask(new.path, new.body)
        elif kind == LEAVER:
            long = generate("Tell me all.", (self._rng.randrange(6),), stream=True, max_tokens=400)
            reply = await self._client.ask(long.path, long.body, leave_after=self._rng.randrange(1, 20))
        else:
            body = mutate.mutate_bytes(self._rng, self._rng.choice(self._questions).body)
            reply = await self._client.ask(GENERATE, body)
        self.replies.append((kind, reply))

    def num_good(self) -> int:
        """Finished answers of those who wanted one."""
        return sum(reply.outcome is Outcome.FINISHED for kind, reply in self.replies if kind in (KNOWN, NEW))


@dataclass
class Report:
    rows: list[tuple[str, str, str]] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    def add(self, what: str, measured: str, bound: str, holds: bool) -> None:
        self.rows.append((what, measured, bound))
        if not holds:
            self.broken.append(f"{what}: {measured}; the bound is {bound}")


async def soak(subject: Subject, seconds: float, capacity_s: float) -> Report:
    async with Client(subject.url) as client:
        answers = await record(client, make_questions(num_pictures=6))
        await warm_up(client, list(answers))
        capacity, closed = await _capacity(Traffic(client, answers, seed=0), capacity_s)
        before = await asyncio.to_thread(holdings, subject)
        traffic = Traffic(client, answers, seed=1)
        with Watch(subject, PROBE_S) as watch:
            goodput = await _open_loop(traffic, OVERLOAD * closed, seconds)
        leaks = await settled(subject, before)
    return _report(traffic, watch, capacity, goodput, leaks, seconds)


async def _capacity(traffic: Traffic, seconds: float) -> tuple[float, float]:
    """(good answers, requests of the mix) a second when `NUM_CLIENTS` ask one after another."""
    begin_s = time.monotonic()

    async def keep_asking() -> None:
        while time.monotonic() < begin_s + seconds:
            await traffic.ask()

    await asyncio.gather(*(keep_asking() for _ in range(NUM_CLIENTS)))
    took_s = time.monotonic() - begin_s
    return traffic.num_good() / took_s, len(traffic.replies) / took_s


async def _open_loop(traffic: Traffic, rate: float, seconds: float) -> float:
    """Good answers a second while requests came, once queues are full; all requests have ended when it returns."""
    begin_s = time.monotonic()
    num_sent = num_before = 0
    filled_s = seconds * FILLING
    async with asyncio.TaskGroup() as group:
        while (now_s := time.monotonic()) < begin_s + seconds:
            while num_sent < rate * (now_s - begin_s):
                group.create_task(traffic.ask())
                num_sent += 1
            if now_s < begin_s + filled_s:
                num_before = traffic.num_good()
            await asyncio.sleep(0.01)
        num_good = traffic.num_good() - num_before
    return num_good / (seconds - filled_s)


def _report(
    traffic: Traffic, watch: Watch, capacity: float, goodput: float, leaks: list[str], seconds: float
) -> Report:
    report = Report()
    outcomes = Counter(reply.outcome for _, reply in traffic.replies)
    sent = len(traffic.replies)
    lost = [f"{kind}: {r.detail}" for kind, r in traffic.replies if r.outcome in (Outcome.LOST, Outcome.CUT)]
    wrong = [f"{kind}: {r.detail}" for kind, r in traffic.replies if r.outcome is Outcome.WRONG]
    report.add(
        "requests", f"{sent} in {seconds:.0f} s", f"{OVERLOAD} × what a closed loop of {NUM_CLIENTS} did", sent > 0
    )
    clean = Counter(r.detail for kind, r in traffic.replies if r.outcome in CLEAN and kind != GARBAGE)
    told = ", ".join(f"{count} × {detail}" for detail, count in clean.most_common()) or "none"
    report.add("finished, left, refused", f"{outcomes[Outcome.FINISHED]}, {outcomes[Outcome.LEFT]}, {told}", "", True)
    failures = {d: n for d, n in clean.items() if "overloaded" not in d}
    report.add("failed otherwise than for overload", str(sum(failures.values())), "0", not failures)
    report.add("lost", str(len(lost)) + _some(lost), "0", not lost)
    report.add("wrong", str(len(wrong)) + _some(wrong), "0", not wrong)
    share = goodput / capacity
    text = f"{goodput:.1f}/s of {capacity:.1f}/s: {share:.0%}"
    report.add("goodput", text, f"{MIN_GOODPUT:.0%} of capacity", share >= MIN_GOODPUT)
    unready = f"{len(watch.unready)} of {watch.num_probes} probes{_some(watch.unready)}"
    report.add("/readyz not 200", unready, "0", not watch.unready and watch.num_probes > 0)
    for role, measured in watch.bytes_of.items():
        measured = measured[int(len(measured) * FILLING) :]
        third = len(measured) // 3
        first, last = mean(measured[:third]), mean(measured[-third:])
        text = f"{first / 2**20:.0f} → {last / 2**20:.0f} MiB, at most {max(measured) / 2**20:.0f}"
        report.add(f"memory of {role}, first to last third", text, "+ 10 %", last <= first * MAX_GROWTH + ALLOWANCE)
    report.add("leaks", "; ".join(leaks) or "0", "0", not leaks)
    return report


def _some(details: list[str]) -> str:
    return f" ({'; '.join(f'{count} × {what}' for what, count in Counter(details).most_common(3))})" if details else ""


async def run(seconds: float, capacity_s: float) -> Report:
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        folder = Path(name)
        checkpoint = models.steady(folder)
        running = Running("--no-question", **environment(folder, checkpoint, **SETTINGS))
        try:
            await asyncio.to_thread(running.wait_until_ready)
            return await soak(Subject(running, folder), seconds, capacity_s)
        finally:
            running.stop()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.reliability.soak")
    parser.add_argument("--short", action="store_true", help="as long as CI has time for")
    parser.add_argument("--seconds", type=float, help="of the open loop")
    parser.add_argument("--write", action="store_true", help="put the table into docs/reliability.md")
    arguments = parser.parse_args()
    seconds = arguments.seconds or (SECONDS_SHORT if arguments.short else SECONDS)
    report = asyncio.run(run(seconds, CAPACITY_S_SHORT if arguments.short else CAPACITY_S))
    text = table.markdown(HEADER, report.rows)
    print(f"\n{text}\n\n{os.cpu_count()} cores")
    if arguments.write:
        table.write("soak", text)
    for problem in report.broken:
        print(f"broken: {problem}")
    return 1 if report.broken else 0


if __name__ == "__main__":
    sys.exit(main())

"""python -m tests.reliability.neighbours: what eight innocent streams feel of each hostile client beside them.

Their tokens are those that they get alone, their p99 between tokens stays within three times their p50, and the gateway
with all its processes below 512 MiB. Then one key's 500 requests, and what another key waits for its first tokens.

Exit status 1 if a bound is broken. `--short`: what CI has time for. `--only TEXT`: hostile clients whose name holds it.
`--write`: the tables go into docs/reliability.md, too.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

from service.families import load_family
from tests.e2e.running import Running
from tests.reliability import models, table
from tests.reliability.attack import Answers, Target
from tests.reliability.client import Answer, Client, Outcome, Reply
from tests.reliability.hostile import HOSTILE, SHORT
from tests.reliability.load import warm_up
from tests.reliability.questions import Question, generate, record
from tests.reliability.subject import Subject, environment
from tests.reliability.watch import Watch

NUM_INNOCENTS, NUM_TOKENS = 8, 64
MAX_P99 = 3.0  # times p50
MAX_RESIDENT = 512 << 20
MAX_TTFT = 3.0  # times the unloaded
NUM_REQUESTS, NUM_REQUESTS_SHORT = 500, 200  # of the greedy key
NUM_ASKED, PAUSE_S = 15, 0.3  # by the other, over more time than an answer to the greedy one takes: they come in waves
ATTACK_LIMIT_S = 40.0
NUM_TRIES = 3  # a busy machine's hiccup does not come again; what a client can do at will does
KEYS = {"alice": "key-of-alice", "bob": "key-of-bob"}
SETTINGS = {
    "CROSSGATE_API_KEYS": ",".join(f"{name}:{key}" for name, key in KEYS.items()),
    "CROSSGATE_KV_BLOCKS": "1024",
    "CROSSGATE_IMAGE_PAGES": "64",
    "CROSSGATE_MAX_RUNNING": "24",
    "CROSSGATE_CLIENT_TIMEOUT_S": "5",
}
HEADER = ("beside", "it was told", "p50, ms", "p99, ms", "p99 / p50", "streams", "not as alone", "gateway, MiB")
Hostile = Callable[[Target], Answers]


@dataclass
class Row:
    name: str
    cells: tuple[object, ...] = ()
    broken: list[str] = field(default_factory=list)


class Neighbours:
    """Eight innocents, and one hostile client at a time in a process of its own, which yields to all others."""

    def __init__(self, subject: Subject, target: Target, hostile: Executor) -> None:
        self._subject = subject
        self._target = target
        self._hostile = hostile
        self.innocents = [
            generate(f"What is number {number}?", (number,) * (number % 3), stream=True, max_tokens=NUM_TOKENS)
            for number in range(NUM_INNOCENTS)
        ]

    async def beside(self, attack: Hostile, client: Client, answers: Mapping[Question, Answer]) -> Row:
        for _ in range(NUM_TRIES):
            row = await self._beside(attack, client, answers)
            if not row.broken:
                break
        return row

    async def _beside(self, attack: Hostile, client: Client, answers: Mapping[Question, Answer]) -> Row:
        row = Row(attack.__name__.replace("_", " "))
        replies: list[Reply] = []
        attacking: asyncio.Future[Answers] | None = None
        with Watch(self._subject, 0.1, probe=False) as watch:
            deadline_s = time.monotonic() + ATTACK_LIMIT_S
            while attacking is None or (not attacking.done() and time.monotonic() < deadline_s):
                streams = [
                    asyncio.create_task(client.ask(each.path, each.body, expected=answers[each]))
                    for each in self.innocents
                ]
                if attacking is None:
                    await asyncio.sleep(0.3)  # all of them are under way
                    loop = asyncio.get_running_loop()
                    attacking = loop.run_in_executor(self._hostile, attack, self._target)
                replies += await asyncio.gather(*streams)
        told = Counter({"no end": 1}) if not attacking.done() else attacking.result()
        if not attacking.done():
            await attacking
        self._judge(row, replies, told, max(watch.bytes_of["gateway"]))
        return row

    def _judge(self, row: Row, replies: list[Reply], told: Answers, resident: int) -> None:
        gaps = sorted(
            after - before
            for reply in replies
            for before, after in zip(reply.token_times_s, reply.token_times_s[1:], strict=False)
        )
        p50, p99 = (gaps[int(len(gaps) * share)] * 1e3 for share in (0.5, 0.99)) if gaps else (0.0, 0.0)
        different = Counter(
            f"{reply.outcome} {reply.detail}" for reply in replies if reply.outcome is not Outcome.FINISHED
        )
        ratio = p99 / p50 if p50 else float("inf")
        row.cells = (
            ", ".join(f"{count} × {what}" for what, count in told.most_common()) or "—",
            f"{p50:.0f}",
            f"{p99:.0f}",
            f"{ratio:.1f}",
            len(replies),
            different.total(),
            resident >> 20,
        )
        row.broken += [f"{count} × {what}" for what, count in different.items()]
        if ratio > MAX_P99:
            row.broken.append(f"p99 {p99:.0f} ms is {ratio:.1f} times p50 {p50:.0f} ms")
        if resident > MAX_RESIDENT:
            row.broken.append(f"the gateway took {resident >> 20} MiB")
        if told["500"]:
            row.broken.append(f"it was told 500 {told['500']} times")


def nobody(target: Target) -> Answers:
    """The innocents by themselves."""
    time.sleep(3.0)
    return Counter()


async def two_keys(subject: Subject, num_requests: int) -> Row:
    """Bob's median time to the first token, alone and while hundreds of Alice's requests run and wait."""
    row = Row(f"{num_requests} requests of another key")
    question = generate("What is in the picture?", (1,), stream=True, max_tokens=4)
    greedy = generate("Tell me all.", (2,), stream=True, max_tokens=150)
    async with (
        Client(subject.url, key=KEYS["alice"]) as alice,
        Client(subject.url, key=KEYS["bob"]) as bob,
        asyncio.TaskGroup() as group,
    ):
        alone = await _ask_now_and_then(bob, question)
        crowd = [group.create_task(alice.ask(greedy.path, greedy.body)) for _ in range(num_requests)]
        await asyncio.sleep(5.0)
        beside = await _ask_now_and_then(bob, question)
        num_left = sum(not task.done() for task in crowd)
        for task in crowd:
            task.cancel()
    failed = [f"{reply.outcome} {reply.detail}" for reply in alone + beside if reply.outcome is not Outcome.FINISHED]
    if failed:
        row.broken += failed
        return row
    before, after = (median(reply.ttft_s for reply in replies) * 1e3 for replies in (alone, beside))
    slowest = max(reply.ttft_s for reply in beside) * 1e3
    row.cells = (f"{before:.0f}", f"{after:.0f}", f"{after / before:.1f}", f"{slowest:.0f}", num_left)
    if after > MAX_TTFT * before:
        row.broken.append(f"first token after {after:.0f} ms instead of {before:.0f} ms: {after / before:.1f} times")
    if not num_left:
        row.broken.append("nobody was left to wait for: this says nothing")
    return row


async def _ask_now_and_then(client: Client, question: Question) -> list[Reply]:
    """One after the other, `NUM_ASKED` times."""
    replies = []
    for _ in range(NUM_ASKED):
        replies.append(await client.ask(question.path, question.body))
        await asyncio.sleep(PAUSE_S)
    return replies


async def run(short: bool, only: str) -> tuple[list[Row], list[Row]]:
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="neighbours-") as name:
        folder = Path(name)
        checkpoint = models.steady(folder)
        family = load_family(checkpoint)
        running = Running("--no-question", **environment(folder, checkpoint, **SETTINGS))
        spawn = multiprocessing.get_context("spawn")
        try:
            await asyncio.to_thread(running.wait_until_ready)
            subject = Subject(running, folder)
            shape = family.vision.latents_shape
            target = Target(running.port, running.triton_grpc_port, family.image_token_id, shape, KEYS["bob"])
            with ProcessPoolExecutor(1, spawn, initializer=partial(os.nice, 10)) as hostile:
                neighbours = Neighbours(subject, target, hostile)
                async with Client(subject.url, key=KEYS["bob"]) as client:
                    answers = await record(client, neighbours.innocents)
                    await warm_up(client, neighbours.innocents)
                    for attack in (nobody, *(SHORT if short else HOSTILE)):
                        if only in attack.__name__.replace("_", " "):
                            rows.append(await neighbours.beside(attack, client, answers))
                            print(f"{rows[-1].name}: {rows[-1].cells} {rows[-1].broken or ''}", flush=True)
            keys = (
                [await two_keys(subject, NUM_REQUESTS_SHORT if short else NUM_REQUESTS)] if only in "two keys" else []
            )
        finally:
            running.stop()
    return rows, keys


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.reliability.neighbours")
    parser.add_argument("--short", action="store_true", help="the hostile clients that CI has time for")
    parser.add_argument("--only", default="", metavar="TEXT", help='names that hold this text; "two keys": those alone')
    parser.add_argument("--write", action="store_true", help="put the tables into docs/reliability.md")
    arguments = parser.parse_args()
    rows, keys = asyncio.run(run(arguments.short, arguments.only))
    text = table.markdown(HEADER, [(row.name, *row.cells) for row in rows])
    header = ("beside", "first token alone, ms", "beside it, ms", "ratio", "the slowest, ms", "left of them then")
    text_of_keys = table.markdown(header, [(row.name, *row.cells) for row in keys])
    print(f"\n{text}\n\n{text_of_keys}\n")
    if arguments.write:
        table.write("hostile", text)
        table.write("keys", text_of_keys)
    broken = [f"{row.name}: {problem}" for row in rows + keys for problem in row.broken]
    for problem in broken:
        print(f"broken: {problem}")
    return 1 if broken or not rows + keys else 0


if __name__ == "__main__":
    sys.exit(main())

"""python -m tests.reliability.chaos: one fault at a time under load, and a table of what became of every request.

Exit status 1 if a bound is broken. `--short`: what CI has time for. `--only TEXT`: faults whose name holds it.
`--write`: the table goes into docs/reliability.md, too.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from service.launch.settings import ROOT
from tests.e2e.running import Running
from tests.reliability import faults, models, table
from tests.reliability.checkout import copy_checkout, full_disk
from tests.reliability.client import Answer, Client, Outcome
from tests.reliability.faults import Fault
from tests.reliability.gateway import gateway
from tests.reliability.leaks import holdings, settled
from tests.reliability.load import Load, warm_up
from tests.reliability.proxy import Proxy
from tests.reliability.questions import Question, generate, make_questions, record
from tests.reliability.subject import Subject, environment

NUM_CLIENTS = 8
MAX_RECOVERY_S = 30.0
QUIET_S, STEADY_S = 2.0, 4.0  # of load before a fault, and without any failure after it
STALL_LIMIT_S = 30.0  # for the gateway to drop who stalls: CROSSGATE_CLIENT_TIMEOUT_S, once its buffers are full
NUM_BLOCKS, NUM_PAGES = 256, 16
NUM_PICTURES = 20  # more than there are pages
SETTINGS = {
    "CROSSGATE_KV_BLOCKS": str(NUM_BLOCKS),
    "CROSSGATE_IMAGE_PAGES": str(NUM_PAGES),
    "CROSSGATE_LATENTS_CACHE_BYTES": "0",  # what the pool has lost is encoded again: the encoder has work, too
    "CROSSGATE_MAX_PREFILL_TOKENS": "512",  # no prompt is cut: what marks one that breaks its step stands in one step
    "CROSSGATE_CLIENT_TIMEOUT_S": "5",
    "CROSSGATE_BODY_TIMEOUT_S": "15",
}
HEADER = ("fault", "sent", "finished", "failed cleanly", "lost", "wrong", "recovery, s", "leaks")
Answers = dict[Question, Answer]


@dataclass
class Row:
    """What one fault did. `broken`: bounds, in words."""

    name: str
    cells: tuple[object, ...] = ()
    broken: list[str] = field(default_factory=list)


class Chaos:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.checkpoint = models.tiny(folder)
        self.checkout = copy_checkout(folder / "failing", failing=True)
        self.questions = make_questions(NUM_PICTURES)
        self.hogs = [generate(f"Tell me number {number}.", (), stream=True, max_tokens=600) for number in range(8)]
        self.hogs += [
            generate(f"And {number}?", tuple(range(NUM_PAGES)), stream=False, max_tokens=150) for number in range(4)
        ]
        # answered only if no page, and no block, has leaked
        prompt = [1, *(50 + number % 200 for number in range(NUM_BLOCKS * 16 - 16))]
        self.whole_pools = {
            "every page": generate("", tuple(range(NUM_PAGES)), max_tokens=1),
            "every block": generate(prompt, (), max_tokens=15),
        }

    @asynccontextmanager
    async def running(self, root: Path) -> AsyncIterator[Running]:
        settings = environment(self._folder, self.checkpoint, **SETTINGS)
        running = Running("--no-question", root=root, **settings)
        try:
            await asyncio.to_thread(running.wait_until_ready)
            yield running
        finally:
            running.stop()

    async def strike(self, subject: Subject, fault: Fault, answers: Mapping[Question, Answer]) -> Row:
        """One fault under load, and the row of it."""
        row = Row(fault.name)
        before = await asyncio.to_thread(holdings, subject)
        async with Client(subject.url) as client:
            load = Load(client, answers, NUM_CLIENTS, questions=self.questions, retries=fault.cuts)
            async with load:
                await asyncio.sleep(QUIET_S)
                if load.count(Outcome.FINISHED) < len(load.replies):
                    row.broken.append(f"before the fault: {load.details(*set(Outcome) - {Outcome.FINISHED})}")
                try:
                    await fault.inflict(subject, load)
                except AssertionError as error:
                    row.broken.append(str(error))
                over_s = time.monotonic()
                recovery_s = await load.recovery_s(over_s, steady_s=STEADY_S, limit_s=MAX_RECOVERY_S + 15.0)
            leaks = await settled(subject, before)
            for what, question in self.whole_pools.items():
                reply = await client.ask(question.path, question.body)
                if reply.outcome is not Outcome.FINISHED:
                    leaks.append(f"a request that needs {what}: {reply.detail}")
        self._judge(row, fault, load, recovery_s, leaks)
        return row

    def _judge(self, row: Row, fault: Fault, load: Load, recovery_s: float | None, leaks: list[str]) -> None:
        lost, wrong = load.count(Outcome.LOST), load.count(Outcome.WRONG)
        again = f" ({load.num_retried} asked again)" if load.num_retried else ""
        recovered = "never" if recovery_s is None else math.ceil(recovery_s)
        row.cells = (
            len(load.replies),
            f"{load.count(Outcome.FINISHED)}{again}",
            load.num_clean,
            lost,
            wrong,
            recovered,
            "; ".join(leaks) or 0,
        )
        for outcome in (Outcome.LOST, Outcome.WRONG):
            row.broken += [f"{count} × {outcome}: {what}" for what, count in load.details(outcome).items()]
        clean = load.details(Outcome.REFUSED, Outcome.FAILED)
        row.broken += [f"{count} × {what}" for what, count in clean.items() if what.split()[-1] not in fault.may_tell]
        if recovery_s is None or recovery_s > MAX_RECOVERY_S:
            row.broken.append(f"recovery: {recovered}")
        row.broken += [f"leak: {leak}" for leak in leaks]

    async def silent_triton(self, running: Running, answers: Mapping[Question, Answer]) -> Row:
        """A gateway of its own behind a proxy whose connections fall silent under load."""
        settings = {**environment(self._folder, self.checkpoint), "CROSSGATE_CLIENT_TIMEOUT_S": "5"}
        async with (
            Proxy(running.triton_grpc_port) as proxy,
            gateway(proxy.port, settings, self._folder / "gateway.log", self.checkout) as (url, pid),
        ):
            subject = Subject(running, self._folder, url=url, gateway_pid=pid)

            async def inflict(subject: Subject, load: Load) -> None:
                assert proxy.fall_silent(), "there was no connection to Triton"

            fault = Fault("a connection to Triton that falls silent", inflict, faults.ALL)
            return await self.strike(subject, fault, answers)

    async def full_disk_at_start(self, answers: Mapping[Question, Answer]) -> list[Row]:
        """Where nothing has run before it starts, or says in one line why not; where something has, it starts."""
        return [
            await self._start_on_full_disk(answers, "a full disk at the first start", used_before=False),
            await self._start_on_full_disk(answers, "a full disk at a later start", used_before=True),
        ]

    async def _start_on_full_disk(self, answers: Mapping[Question, Answer], name: str, *, used_before: bool) -> Row:
        row = Row(name)
        root = copy_checkout(self._folder / f"full-{used_before}")
        links = root / ".cache" / "triton"
        if used_before:
            shutil.copytree(ROOT / ".cache" / "triton", links, symlinks=True)
        disk = root / ".cache" / "log"
        disk.mkdir()
        try:
            with full_disk(disk if used_before else root / ".cache"):
                running = Running("--no-question", root=root, **environment(self._folder, self.checkpoint, **SETTINGS))
                try:
                    await asyncio.to_thread(running.wait_until_ready)
                except AssertionError:
                    status, said = running.wait_for_end(), [line for line in running.lines if line]
                    row.cells = (0, "—", 0, 0, 0, "—", f"it does not start: {said[-1] if said else ''}")
                    if used_before or status != 2 or len(said) > 2:
                        row.broken.append(f"status {status}, it said: {said[-3:]}")
                    return row
                else:

                    async def inflict(subject: Subject, load: Load) -> None:
                        await asyncio.sleep(2.0)

                    return await self.strike(Subject(running, self._folder), Fault(name, inflict), answers)
                finally:
                    running.stop()
        except PermissionError as error:
            row.cells = ("—",) * 6 + (f"left out: {error}",)
            return row

    def faults(self, short: bool) -> list[Fault]:
        stop_s = 10.0 if short else 20.0
        several = [
            faults.full_pools(self.hogs),
            faults.failing_steps(3 if short else 20),
            faults.slow_readers(6, STALL_LIMIT_S),
            faults.kill("encoder"),
            faults.kill("decoder"),
            faults.kill("Triton"),
            faults.stop("decoder", stop_s),
        ]
        if short:
            return several
        return [
            *several,
            faults.kill("gateway"),
            faults.stop("encoder", stop_s),
            faults.stop("Triton", stop_s),
            faults.stop("gateway", stop_s),
            faults.full_queue(self.questions, 400),
            faults.half_open(90, STALL_LIMIT_S),
        ]


async def run(short: bool, only: str) -> list[Row]:
    rows: list[Row] = []

    def tell(row: Row) -> None:
        rows.append(row)
        print(f"{row.name}: {dict(zip(HEADER[1:], row.cells, strict=False))}", flush=True)
        for broken in row.broken:
            print(f"    broken: {broken}", flush=True)

    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        chaos = Chaos(Path(folder))
        async with chaos.running(chaos.checkout) as running:
            subject = Subject(running, Path(folder))
            async with Client(subject.url) as client:
                answers = await record(client, chaos.questions)
                for hog in chaos.hogs:
                    answers[hog] = (await client.ask(hog.path, hog.body)).answer
                await warm_up(client, chaos.questions)
            for fault in chaos.faults(short):
                if only in fault.name:
                    tell(await chaos.strike(subject, fault, answers))
            if not short and only in "a silent connection to Triton":
                tell(await chaos.silent_triton(running, answers))
        if not short and only in "a full disk at start":
            for row in await chaos.full_disk_at_start(answers):
                tell(row)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.reliability.chaos")
    parser.add_argument("--short", action="store_true", help="the faults and times that CI runs")
    parser.add_argument("--only", default="", metavar="TEXT", help="faults whose name holds this text")
    parser.add_argument("--write", action="store_true", help="put the table into docs/reliability.md")
    arguments = parser.parse_args()
    rows = asyncio.run(run(arguments.short, arguments.only))
    text = table.markdown(HEADER, [(row.name, *row.cells) for row in rows])
    print(f"\n{text}\n")
    if arguments.write:
        table.write("chaos", text)
    for row in rows:
        for broken in row.broken:
            print(f"broken: {row.name}: {broken}")
    return 1 if not rows or any(row.broken for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())

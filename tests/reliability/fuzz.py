"""python -m tests.reliability.fuzz: mutated requests and pictures against the gateway's own process.

Behind it are the fakes of tests/gateway, so a second tries a few hundred. Every reply is a 2xx or a 4xx, the event loop
never stands for a second, memory comes back; then schemathesis goes through the OpenAPI document.

Exit status 1 if a bound is broken. `--short`: what CI has time for. `--seed S --only requests:17` sends one case again.
`--write`: the table goes into docs/reliability.md, too.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from tritonclient.grpc import service_pb2_grpc

from service.families import load_family
from tests.checkpoints import make_idefics
from tests.gateway.fakes import FakeBackend
from tests.gateway.triton_server import FakeTriton
from tests.reliability import table
from tests.reliability.cases import KINDS, Case, Cases
from tests.reliability.gateway import gateway
from tests.reliability.watched import loop_state, resident_bytes, watching
from tests.reliability.wire import Response, exchange

NUM_CASES, NUM_CASES_SHORT = 20_000, 1_500  # of each kind
NUM_EXAMPLES, NUM_EXAMPLES_SHORT = 100, 10  # of schemathesis, an operation
NUM_AT_ONCE, BATCH = 16, 200
MAX_LOOP_S = 1.0
MAX_GROWTH = 1.10
MAX_RESIDENT = 512 << 20
REST_S = 3.0
SETTINGS = {"CROSSGATE_CLIENT_TIMEOUT_S": "4", "CROSSGATE_LATENTS_CACHE_BYTES": "100000"}
HEADER = ("what", "sent", "2xx", "4xx", "closed unanswered", "5xx or worse", "loop stood at most, s", "memory, MiB")


@dataclass
class Tally:
    """What one kind came to. `worst_s`: the longest stop of the event loop."""

    name: str
    statuses: Counter[int | None] = field(default_factory=Counter)
    worst_s: float = 0.0
    memory: str = ""
    num_generated: int = 0  # by schemathesis, which tells only what is wrong
    broken: list[str] = field(default_factory=list)

    def row(self) -> tuple[object, ...]:
        if self.num_generated:
            return self.name, self.num_generated, "—", "—", "—", len(self.broken), "—", "—"
        by_class = Counter("closed" if status is None else f"{status // 100}xx" for status in self.statuses.elements())
        other = sum(by_class.values()) - by_class["2xx"] - by_class["4xx"] - by_class["closed"]
        counts = (by_class["2xx"], by_class["4xx"], by_class["closed"], other)
        return self.name, sum(self.statuses.values()), *counts, f"{self.worst_s:.2f}", self.memory


class Fuzz:
    def __init__(self, cases: Cases, folder: Path, url: str, pid: int) -> None:
        self._cases = cases
        self._folder = folder
        self._url = url
        self._pid = pid
        self._port = int(url.rpartition(":")[2])
        self._peak = 0

    async def check_right_ones(self) -> list[str]:
        """What the mutants are made from is answered, or refused, as it should be: or the run would say nothing."""
        broken = []
        for case in self._cases.right():
            response = await exchange(self._port, case.raw)
            if response.status != (400 if case.must_refuse else 200):
                broken.append(f"{case.name}: {response.status} {response.body[:200]!r}")
        return broken

    async def run(self, kind: str, num_cases: int) -> Tally:
        tally = Tally(f"mutated {kind}")
        before = self._peak = 0
        sampling = asyncio.create_task(self._sample())
        for start in range(0, num_cases, BATCH):
            batch = [self._cases.make(kind, number) for number in range(start, min(start + BATCH, num_cases))]
            stood_s = await self._send(batch, tally)
            if stood_s > MAX_LOOP_S:
                await self._who_stopped_the_loop(batch, tally)
            if start <= num_cases // 10 < start + BATCH:  # everything that is loaded on first use is there
                before = await self._rested()
            if len(tally.broken) > 20:
                tally.broken.append("and more: given up")
                break
        sampling.cancel()
        self._judge_memory(tally, before, self._peak, await self._rested())
        return tally

    async def only(self, kind: str, number: int) -> None:
        case = self._cases.make(kind, number)
        print(case.raw[:3000])
        response = await exchange(self._port, case.raw)
        print(f"{case.name}: {response.status} after {response.seconds:.2f} s: {response.body[:1000]!r}")

    async def _send(self, batch: list[Case], tally: Tally) -> float:
        """All cases, some at once; the longest time for which the loop stood."""
        places = asyncio.Semaphore(NUM_AT_ONCE)

        async def send(case: Case) -> None:
            async with places:
                try:
                    response = await exchange(self._port, case.raw)
                except OSError as error:
                    tally.broken.append(f"{case.name}: no connection: {error}")
                    return
            tally.statuses[response.status] += 1
            if problem := _problem(case, response):
                tally.broken.append(f"{case.name}: {problem}")

        await asyncio.gather(*(send(case) for case in batch))
        state = await asyncio.to_thread(loop_state, self._folder, self._pid, self._url)
        stood_s = MAX_LOOP_S * 30 if state is None else state.worst_s
        tally.worst_s = max(tally.worst_s, stood_s)
        return stood_s

    async def _who_stopped_the_loop(self, batch: list[Case], tally: Tally) -> None:
        found = False
        for case in batch:
            stood_s = await self._send([case], Tally(""))
            if stood_s > MAX_LOOP_S:
                tally.broken.append(f"{case.name}: the loop stood for {stood_s:.1f} s")
                found = True
        if not found:
            tally.broken.append(f"the loop stood for {tally.worst_s:.1f} s within {batch[0].name} … {batch[-1].name}")

    async def _sample(self) -> None:
        while True:
            self._peak = max(self._peak, await asyncio.to_thread(resident_bytes, self._pid))
            await asyncio.sleep(0.1)

    async def _rested(self) -> int:
        """A few ordinary requests after a pause: the allocator gives memory back when it is next asked for some."""
        await asyncio.sleep(REST_S)
        for case in self._cases.right():
            await exchange(self._port, case.raw)
        return resident_bytes(self._pid)

    def _judge_memory(self, tally: Tally, before: int, peak: int, after: int) -> None:
        tally.memory = f"{before >> 20} → {after >> 20}, at most {peak >> 20}"
        if after > before * MAX_GROWTH:
            tally.broken.append(f"memory grew by more than a tenth: {tally.memory}")
        if peak > MAX_RESIDENT:
            tally.broken.append(f"memory went above {MAX_RESIDENT >> 20} MiB: {tally.memory}")


def _problem(case: Case, response: Response) -> str | None:
    if response.status is None:
        return f"no reply, {response.seconds:.1f} s" if case.complete else None
    if not (200 <= response.status < 300 or 400 <= response.status < 500):
        return f"{response.status} {response.body[:200]!r}"
    if case.must_refuse and response.status < 400:
        return "a format was answered that is not accepted"
    return None


def schemathesis(url: str, num_examples: int, seed: int) -> Tally:
    """Its own report is printed if it finds a 5xx."""
    tally = Tally("schemathesis")
    command = [str(Path(sys.executable).with_name("schemathesis")), "run", f"{url}/openapi.json", "--no-color"]
    command += ["--checks", "not_a_server_error", "--max-examples", str(num_examples), "--seed", str(seed)]
    command += ["--request-timeout", "10", "--warnings", "off"]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    found = re.search(r"(\d+) generated", done.stdout)
    tally.num_generated = int(found[1]) if found else 0
    if done.returncode != 0 or not found:
        tally.broken.append(f"status {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-1000:]}")
    return tally


@asynccontextmanager
async def fake_triton(folder: Path) -> AsyncIterator[int]:
    """The port of one that answers at once and forgets."""
    family = load_family(folder)
    backend = Forgetful(script=(40, 50, 60, 70, *family.eos_token_ids))
    server = grpc.aio.server()
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(FakeTriton(backend, family.config_identity), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield port
    finally:
        await server.stop(None)


class Forgetful(FakeBackend):
    """Keeps nothing of what it was asked."""

    async def generate(self, request, latents):  # type: ignore[no-untyped-def]
        async for event in super().generate(request, latents):
            yield event
        for kept in (self.requests, self.sent, self.latents):
            kept.clear()


async def run(arguments: argparse.Namespace) -> list[Tally]:
    num_cases = NUM_CASES_SHORT if arguments.short else NUM_CASES
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        folder = Path(name)
        checkpoint = make_idefics(folder / "tiny")
        settings = {"MODEL_PATH": str(checkpoint), **watching(folder), **SETTINGS}
        async with (
            fake_triton(checkpoint) as triton_port,
            gateway(triton_port, settings, folder / "gateway.log") as (url, pid),
        ):
            fuzz = Fuzz(Cases(arguments.seed), folder, url, pid)
            if arguments.only:
                kind, _, number = arguments.only.partition(":")
                await fuzz.only(kind, int(number))
                return []
            tallies = [Tally("what they are made of", broken=await fuzz.check_right_ones())]
            for kind in KINDS:
                tallies.append(await fuzz.run(kind, arguments.cases or num_cases))
            num_examples = NUM_EXAMPLES_SHORT if arguments.short else NUM_EXAMPLES
            tallies.append(await asyncio.to_thread(schemathesis, url, num_examples, arguments.seed))
            return tallies


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.reliability.fuzz")
    parser.add_argument("--short", action="store_true", help="as many cases as CI has time for")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cases", type=int, help="of each kind")
    parser.add_argument("--only", metavar="KIND:NUMBER", help="send this case again and show the reply")
    parser.add_argument("--write", action="store_true", help="put the table into docs/reliability.md")
    arguments = parser.parse_args()
    begin_s = time.monotonic()
    tallies = asyncio.run(run(arguments))
    if arguments.only:
        return 0
    text = table.markdown(HEADER, [tally.row() for tally in tallies[1:]])
    print(f"\n{text}\n\nseed {arguments.seed}, {time.monotonic() - begin_s:.0f} s, {os.cpu_count()} cores")
    if arguments.write:
        table.write("fuzz", text)
    broken = [f"{tally.name}: {problem}" for tally in tallies for problem in tally.broken]
    for problem in broken:
        print(f"broken: {problem}")
    if broken:
        print(f"again: python -m tests.reliability.fuzz --seed {arguments.seed} --only KIND:NUMBER")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())

"""Figures of single parts, each with its bound: what is measured in process, and what HTTP and Triton add to it."""

from __future__ import annotations

import itertools
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtest.bench.bounds import verdict
from loadtest.bench.checkpoint import IMAGE_TOKEN_ID, benchmark_checkpoint, tiny_checkpoint
from loadtest.bench.peers.engine import InProcess
from loadtest.bench.scenario import BOS, VOCABULARY, Request, Scenario
from loadtest.bench.systems import Service
from loadtest.bench.worker import Worker
from loadtest.client import GENERATE, Client, Reply
from loadtest.figures import percentile
from loadtest.scenarios import Ask, Message
from tests.reliability.table import markdown

LONG = 2000  # tokens of the long prompt
STEPS = 24
POOLS = {"kv_blocks": 1024, "image_pages": 128}  # what these need; else each engine takes a quarter of the memory
TINY_WORDS = range(270, 350)  # of the tiny checkpoint's vocabulary
WORDS = "the thing is in a string " * 4
pictures = itertools.count(7_000_000)  # numbers that nobody asked about before


@dataclass(frozen=True)
class Figure:
    """`value` is held against `bound`; `parts` say what it is made of."""

    what: str
    parts: str
    value: float
    bound: float
    at_most: bool = True

    def row(self) -> list[str]:
        return [self.what, self.parts, verdict(self.value, self.bound, at_most=self.at_most)]


Measure = Callable[[Path, str, int], list[Figure]]  # checkpoint, dtype, rounds


def report(folder: Path, dtype: str, *, only: str, short: bool) -> str:
    checkpoint = benchmark_checkpoint(folder / "checkpoint")
    rows = []
    for measure in MEASURES:
        if re.search(only, measure.__name__):
            found = measure(checkpoint, dtype, 1 if short else 3)
            rows += [figure.row() for figure in found]
            print(*(" | ".join(figure.row()) for figure in found), sep="\n", file=sys.stderr, flush=True)
    return markdown([f"figure, {dtype}", "made of", "value"], rows)


def decode_beside_transformers(folder: Path, dtype: str, rounds: int) -> list[Figure]:
    ours = InProcess(folder, dtype, **POOLS)
    theirs = Worker("loadtest.bench.peers.static_batches", str(folder), dtype)  # whose loader leaves threads behind
    scenario = Scenario("decode step", 8, 4)
    our_steps: list[float] = []
    their_steps: list[float] = []
    for turn in range(rounds):
        requests = scenario.requests(IMAGE_TOKEN_ID, turn, max_tokens=STEPS + 2)
        ids = [ours.add(request) for request in requests]
        ours.first_tokens(ids)
        our_steps += ours.step_times(STEPS)
        cancel(ours, ids)
        their_steps += theirs.ask(requests=[request.to_json() for request in requests])["gaps_s"]
    theirs.stop()
    mine, other = 1e3 * statistics.median(our_steps), 1e3 * statistics.median(their_steps)
    parts = f"{mine:.1f} / {other:.1f} ms"
    return [Figure("decode step ÷ that of `transformers`, batch 8, 4 pictures each", parts, mine / other, 0.25)]


def short_beside_long(folder: Path, dtype: str, rounds: int) -> list[Figure]:
    system = InProcess(folder, dtype, **POOLS)
    without: list[float] = []
    beside: list[float] = []
    for turn in range(rounds):
        short = [text(60, user, turn) for user in range(31)]
        for others, steps in (([], without), ([text(LONG, 99, turn)], beside)):
            ids = [system.add(request) for request in [*others, *short]]
            system.first_tokens(ids)
            steps += system.step_times(STEPS)
            cancel(system, ids)
    alone, along = 1e3 * statistics.median(without), 1e3 * statistics.median(beside)
    what = f"step of 31 short sequences beside one of {LONG:,} tokens ÷ without it"
    return [Figure(what, f"{along:.1f} / {alone:.1f} ms", along / alone, 1.5)]


def sampling_share(folder: Path, dtype: str, rounds: int) -> list[Figure]:
    """What a step takes longer when all rows are drawn, with top_p, than when all take the greatest."""
    system = InProcess(folder, dtype, **POOLS)
    steps: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(rounds):
        for is_drawn in (False, True):
            sampling: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9, "seed": turn} if is_drawn else {}
            ids = [system.add(text(30, user, turn), **sampling) for user in range(32)]
            system.first_tokens(ids)
            steps[is_drawn] += system.step_times(STEPS)
            cancel(system, ids)
    drawn, greedy = (1e3 * statistics.median(steps[key]) for key in (True, False))
    parts = f"{drawn:.1f} ms, {greedy:.1f} ms greedy"
    return [Figure("sampling's share of a step, 32 rows with top_p", parts, 1 - greedy / drawn, 0.05)]


def streams_beside_a_prompt(folder: Path, dtype: str, rounds: int) -> list[Figure]:
    system = InProcess(folder, dtype, **POOLS)
    gaps: list[float] = []
    for turn in range(rounds):
        ids = [system.add(text(30, user, turn)) for user in range(8)]
        system.first_tokens(ids)
        system.step_times(STEPS)
        last = dict.fromkeys(ids, time.perf_counter())
        prompt = system.add(text(LONG, 99, turn))
        for _ in range(4 * STEPS):
            for request_id, _ in system.step():
                if request_id in last:
                    now_s = time.perf_counter()
                    gaps.append(now_s - last[request_id])
                    last[request_id] = now_s
        cancel(system, [*ids, prompt])
    p50, p99 = (1e3 * (percentile(sorted(gaps), percent) or 0.0) for percent in (50, 99))
    what = f"p99 ÷ p50 between tokens of 8 streams beside a prompt of {LONG:,} tokens"
    return [Figure(what, f"{p99:.0f} / {p50:.0f} ms", p99 / p50, 3.0)]


def over_http(folder: Path, dtype: str, rounds: int) -> list[Figure]:
    """One user: what a picture that is there already saves, and what the gateway and Triton add to the engine."""
    users = Worker("loadtest.bench.client")
    service = Service(folder, dtype, users)
    client = Client(service.running.url)
    try:
        first, again, replies = [], [], []
        for turn in range(1 + 2 * rounds):
            four = tuple(next(pictures) for _ in range(4))
            new, known = (ask(client, f"{turn} {words} {WORDS}", four, 2) for words in ("new", "known"))
            text_reply = ask(client, f"{turn} {WORDS}", (), 64)
            if turn:  # the first warms
                first.append(new.ttft_ms or 0.0)
                again.append(known.ttft_ms or 0.0)
                replies.append(text_reply)
                assert known.timings["encode_ms"] == 0 and known.usage["cached_images"] == 4, known
    finally:
        client.close()
        service.stop()
        users.stop()
    mean = statistics.median
    asked = mean(again) / mean(first)
    figures = [
        Figure(
            "first token, 4 pictures that are there ÷ that are new",
            f"{mean(again):.0f} / {mean(first):.0f} ms",
            asked,
            0.4,
        )
    ]
    prefill_ms, step_ms = in_process_times(folder, dtype, replies[0].usage["prompt_tokens"], rounds)
    ttft = mean([reply.ttft_ms or 0.0 for reply in replies])
    a_token = mean([(r.e2e_ms - (r.ttft_ms or 0.0)) / (r.usage["completion_tokens"] - 1) for r in replies])
    parts = f"{ttft:.1f} − {prefill_ms:.1f} ms"
    figures.append(Figure("gateway and Triton add to the first token, ms", parts, ttft - prefill_ms, 10.0))
    parts = f"{a_token:.2f} − {step_ms:.2f} ms"
    figures.append(Figure("gateway and Triton add to each token, ms", parts, a_token - step_ms, 1.0))
    return figures


def readers(folder: Path, dtype: str, rounds: int) -> list[Figure]:
    """32 streams of a tiny checkpoint: what surrounds the model is what is measured."""
    users = Worker("loadtest.bench.client")
    service = Service(tiny_checkpoint(folder.parent / "tiny"), dtype, users)
    try:
        rates, shares = [], []
        for turn in range(1 + rounds):
            requests = [text(20, user, turn, TINY_WORDS, 128) for user in range(32)]
            measured = service.run(requests, stream=True)
            if turn:
                rates.append(measured.tokens_per_s)
                shares.append((measured.client_cpu_s or 0.0) / measured.seconds)
    finally:
        service.stop()
        users.stop()
    parts = f"the client takes {100 * statistics.median(shares):.0f} % of a core"
    what = "tokens/s to 32 readers of a tiny checkpoint"
    return [Figure(what, parts, statistics.median(rates), 2500.0, at_most=False)]


MEASURES: tuple[Measure, ...] = (
    decode_beside_transformers,
    short_beside_long,
    sampling_share,
    streams_beside_a_prompt,
    over_http,
    readers,
)


def in_process_times(folder: Path, dtype: str, prompt_tokens: int, rounds: int) -> tuple[float, float]:
    """Milliseconds to the first token of a prompt of so many tokens, and of each further one, for one user."""
    system = InProcess(folder, dtype, **POOLS)
    prefills, steps = [], []
    for turn in range(1 + 2 * rounds):
        begin_s = time.perf_counter()
        request_id = system.add(text(prompt_tokens, 0, turn))
        system.step()
        prefills.append(time.perf_counter() - begin_s)
        steps += system.step_times(STEPS)
        system.engine.cancel(request_id)
    return 1e3 * statistics.median(prefills[1:]), 1e3 * statistics.median(steps)


def ask(client: Client, words: str, numbers: tuple[int, ...], max_tokens: int) -> Reply:
    """Raises AssertionError if it is not answered."""
    reply = client.ask(Ask((Message("user", words, numbers),), max_tokens, to_the_limit=True), GENERATE, stream=True)
    assert reply.error is None and reply.ttft_ms is not None, reply
    return reply


def text(length: int, user: int, turn: int, words: range = VOCABULARY, max_tokens: int = 256) -> Request:
    """A prompt of `length` tokens, another for every user and turn from its first word on."""
    begin = 7919 * user + 104_729 * turn
    return Request((BOS, *(words[(begin + 31 * i * i) % len(words)] for i in range(length - 1))), (), max_tokens)


def cancel(system: InProcess, ids: Sequence[int]) -> None:
    for request_id in ids:
        system.engine.cancel(request_id)

"""python -m loadtest.ratios: what sharing a picture and batching requests save, side by side on one service.

    make serve                                                      # in one terminal
    .venv/bin/python -m loadtest.ratios --host http://127.0.0.1:8000   # in another

Each comparison takes turns between its two sides, so that what else the machine does meets both. It prints a table of
medians and of their ratio. Pictures are new ones on every run.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from loadtest.client import CHAT, Client, Reply
from loadtest.scenarios import QUESTIONS, Ask, Message

TOGETHER = 16  # requests at once
ANSWER_TOKENS = 32


@dataclass(frozen=True)
class Comparison:
    """Both sides in milliseconds, `before` what the other is compared with."""

    what: str
    before: str
    after: str
    before_ms: tuple[float, ...]
    after_ms: tuple[float, ...]

    @property
    def ratio(self) -> float:
        return statistics.median(self.before_ms) / statistics.median(self.after_ms)

    def row(self) -> str:
        before, after = (statistics.median(side) for side in (self.before_ms, self.after_ms))
        return (
            f"| {self.what} | {self.before}: {before:,.0f} ms | {self.after}: {after:,.0f} ms | **{self.ratio:.1f}×** |"
        )


class Service:
    """The service under test; raises RuntimeError where a request fails. `rng` numbers the pictures."""

    def __init__(self, host: str, rng: random.Random) -> None:
        self.host, self.rng = host, rng

    def new_picture(self) -> int:
        return self.rng.getrandbits(60)

    def ask(self, picture: int, *, max_tokens: int = ANSWER_TOKENS) -> Reply:
        question = Message("user", self.rng.choice(QUESTIONS), (picture,))
        client = Client(self.host)
        try:
            reply = client.ask(Ask((question,), max_tokens=max_tokens, to_the_limit=True), CHAT, stream=True)
        finally:
            client.close()
        if reply.error or reply.ttft_ms is None:
            raise RuntimeError(f"the service failed: {reply.error or 'it gave no text'}")
        return reply

    def at_once(self, pictures: Sequence[int], *, max_tokens: int = ANSWER_TOKENS) -> float:
        """Milliseconds until the last of them is answered."""
        start = time.perf_counter()
        with ThreadPoolExecutor(len(pictures)) as threads:
            list(threads.map(lambda picture: self.ask(picture, max_tokens=max_tokens), pictures))
        return (time.perf_counter() - start) * 1e3

    def in_turn(self, pictures: Sequence[int], *, max_tokens: int = ANSWER_TOKENS) -> float:
        start = time.perf_counter()
        for picture in pictures:
            self.ask(picture, max_tokens=max_tokens)
        return (time.perf_counter() - start) * 1e3


def later_questions(service: Service, rounds: int) -> Comparison:
    first, later = [], []
    for _ in range(4 * rounds):
        picture = service.new_picture()
        for times in (first, later):
            reply = service.ask(picture, max_tokens=1)
            assert reply.ttft_ms is not None
            times.append(reply.ttft_ms)
    return Comparison(
        "time to first token", "first question about a picture", "the next about it", tuple(first), tuple(later)
    )


def one_picture(service: Service, rounds: int) -> Comparison:
    def distinct() -> float:
        return service.at_once([service.new_picture() for _ in range(TOGETHER)], max_tokens=1)

    def shared() -> float:
        return service.at_once([service.new_picture()] * TOGETHER, max_tokens=1)

    before, after = in_turns(distinct, shared, rounds)
    return Comparison(f"{TOGETHER} first tokens at once", "a picture each", "one picture for all", before, after)


def batching(service: Service, rounds: int) -> Comparison:
    pictures = [service.new_picture() for _ in range(TOGETHER)]
    service.at_once(pictures, max_tokens=1)  # so that only decoding is compared
    before, after = in_turns(lambda: service.in_turn(pictures), lambda: service.at_once(pictures), rounds)
    return Comparison(f"{TOGETHER} answers of {ANSWER_TOKENS} tokens", "one after another", "at once", before, after)


def in_turns(
    one: Callable[[], float], other: Callable[[], float], rounds: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    pairs = [(one(), other()) for _ in range(rounds)]
    return tuple(pair[0] for pair in pairs), tuple(pair[1] for pair in pairs)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.ratios", description="What sharing a picture and batching save."
    )
    parser.add_argument("--host", default="http://127.0.0.1:8000")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    service = Service(options.host, random.Random())
    try:
        service.ask(service.new_picture())  # what a first request warms
        comparisons = [measure(service, options.rounds) for measure in (later_questions, one_picture, batching)]
    except RuntimeError as error:
        print(f"crossgate: {error}", file=sys.stderr)
        return 1
    print("| | before | after | ratio |\n|---|---|---|---|")
    print("\n".join(comparison.row() for comparison in comparisons))
    return 0


if __name__ == "__main__":
    sys.exit(main())

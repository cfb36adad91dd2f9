"""Who asks what: one generator a scenario. It yields an Ask and is sent the answer's text, as a chat needs it.

Pictures are numbers (`pictures.data_url`). Each scenario draws its pictures from a range of its own, so that one does
not warm the cache for another. Knows nothing of HTTP or locust.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Generator
from dataclasses import dataclass

QUESTIONS = (
    "What is in the picture?",
    "What colour is the background?",
    "How many things are there?",
    "Is there a red circle?",
    "Describe the picture.",
)
FACTS = (
    "What is the capital of France?",
    "Name three colours.",
    "What is a triangle?",
    "Why is the sky blue?",
)
SHORT, MEDIUM, LONG = 8, 32, 128  # max_tokens
TURNS = 4
CATALOGUE = 200  # pictures of the Zipf mix
ZIPF_EXPONENT = 1.0
MANY = 6  # pictures in one request


@dataclass(frozen=True)
class Message:
    role: str
    text: str
    pictures: tuple[int, ...] = ()


@dataclass(frozen=True)
class Ask:
    """`leave_after`: the client hangs up after so many pieces of the answer, which therefore must stream.

    `to_the_limit`: the answer does not end before max_tokens, so that runs do equal work.
    """

    messages: tuple[Message, ...]
    max_tokens: int = MEDIUM
    to_the_limit: bool = False
    leave_after: int | None = None
    chat_only: bool = False


Asks = Generator[Ask, str, None]


def unique_pictures(rng: random.Random) -> Asks:
    """Never the same picture twice: every request pays for the encoder, none finds its K/V."""
    while True:
        yield _one(rng, rng.getrandbits(60))


def hot_picture(rng: random.Random) -> Asks:
    """One picture that everybody asks about: encoded once, its K/V shared."""
    while True:
        yield _one(rng, 1_000_000)


def zipf_mix(rng: random.Random) -> Asks:
    """A catalogue in which the n-th picture is asked for in proportion to 1/n."""
    weights = [1 / rank**ZIPF_EXPONENT for rank in range(1, CATALOGUE + 1)]
    cumulative = list(itertools.accumulate(weights))
    while True:
        yield _one(rng, 2_000_000 + rng.choices(range(CATALOGUE), cum_weights=cumulative)[0])


def multi_turn_chat(rng: random.Random) -> Asks:
    """A new picture, then several questions about it, each with the whole conversation before it."""
    while True:
        messages = (Message("user", rng.choice(QUESTIONS), (rng.getrandbits(60),)),)
        for _ in range(TURNS):
            answer = yield Ask(messages, chat_only=True)
            messages += (Message("assistant", answer or "…"), Message("user", rng.choice(QUESTIONS)))


def text_only(rng: random.Random) -> Asks:
    """No picture: the first stage is not touched."""
    while True:
        yield Ask((Message("user", rng.choice(FACTS)),))


def many_pictures(rng: random.Random) -> Asks:
    """Several pictures in one request, half of them seen before."""
    while True:
        pictures = tuple(rng.choice((rng.getrandbits(60), 3_000_000 + rng.randrange(20))) for _ in range(MANY))
        yield Ask((Message("user", "What is in the last picture?", pictures),))


def short_answers(rng: random.Random) -> Asks:
    """Prefill and admission dominate."""
    while True:
        yield Ask((Message("user", rng.choice(QUESTIONS), (4_000_000 + rng.randrange(50),)),), max_tokens=SHORT)


def long_answers(rng: random.Random) -> Asks:
    """Decoding dominates: always `LONG` tokens."""
    while True:
        message = Message("user", "Describe the picture.", (4_000_000 + rng.randrange(50),))
        yield Ask((message,), max_tokens=LONG, to_the_limit=True)


def leaving_clients(rng: random.Random) -> Asks:
    """Clients that hang up in mid-answer: what they held must come free."""
    while True:
        message = Message("user", "Describe the picture.", (5_000_000 + rng.randrange(50),))
        yield Ask((message,), max_tokens=LONG, to_the_limit=True, leave_after=rng.randint(1, 8))


def _one(rng: random.Random, picture: int) -> Ask:
    return Ask((Message("user", rng.choice(QUESTIONS), (picture,)),))


Scenario = Callable[[random.Random], Asks]
SCENARIOS: dict[str, Scenario] = {
    scenario.__name__: scenario
    for scenario in (
        unique_pictures,
        hot_picture,
        zipf_mix,
        multi_turn_chat,
        text_only,
        many_pictures,
        short_answers,
        long_answers,
        leaving_clients,
    )
}

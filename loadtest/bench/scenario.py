"""What is asked: so many users at once, each one question, with so many pictures, for so many tokens.

Pictures are numbers (`loadtest.pictures`). Everything follows from the scenario's name and the round, so every system
is asked the same, and no round the same pictures as another unless they are `repeated`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

VOCABULARY = range(300, 7900)  # ordinary words of the benchmark's checkpoint
BOS = 1
PROMPT_TOKENS = (20, 32)  # of text, so that static batches have something to pad, as with real prompts


@dataclass(frozen=True)
class Request:
    """Greedy, and to its exact number of tokens."""

    input_ids: tuple[int, ...]
    pictures: tuple[int, ...]
    max_tokens: int

    def to_json(self) -> dict[str, Any]:
        return {"input_ids": self.input_ids, "pictures": self.pictures, "max_tokens": self.max_tokens}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Request:
        return cls(tuple(fields["input_ids"]), tuple(fields["pictures"]), fields["max_tokens"])


@dataclass(frozen=True)
class Scenario:
    """`pictures` of each user. `repeated`: the same ones for all users and rounds. `num_tokens`: fewest and most.

    `without`: systems that are left out, because there is nothing to see.
    """

    name: str
    users: int
    pictures: int = 0
    repeated: bool = False
    num_tokens: tuple[int, int] = (64, 64)
    without: tuple[str, ...] = ()

    def short(self) -> Scenario:
        low, high = self.num_tokens
        return replace(self, num_tokens=(max(4, low // 4), high // 4))

    def requests(self, image_token_id: int, turn: int, max_tokens: int | None = None) -> list[Request]:
        """Of all users in a round. `max_tokens` in place of the scenario's: for warming up."""
        return [self._request(image_token_id, turn, user, max_tokens) for user in range(self.users)]

    def _request(self, image_token_id: int, turn: int, user: int, max_tokens: int | None) -> Request:
        rng = random.Random(f"{self.name}, round {turn}, user {user}")
        length = random.Random(f"{self.name}, user {user}").randint(*self.num_tokens)  # the same work in every round
        seen = random.Random(self.name) if self.repeated else rng
        pictures = tuple(seen.getrandbits(60) for _ in range(self.pictures))
        text = [rng.choice(VOCABULARY) for _ in range(rng.randint(*PROMPT_TOKENS))]
        input_ids = [BOS]
        for index in range(self.pictures):  # a few words after each picture
            input_ids += [image_token_id, *text[index * 3 : index * 3 + 3]]
        input_ids += text[self.pictures * 3 :]
        return Request(tuple(input_ids), pictures, max_tokens or length)


SCENARIOS = (
    Scenario("1 user, text", 1, without=("litserve",)),
    Scenario("1 user, 1 picture", 1, 1, without=("litserve",)),
    Scenario("8 users, text", 8),
    Scenario("8 users, 1 picture", 8, 1),
    Scenario("8 users, 1 picture, repeated", 8, 1, repeated=True),
    Scenario("8 users, 4 pictures", 8, 4),
    Scenario("8 users, 4 pictures, repeated", 8, 4, repeated=True),
    Scenario("16 users, 1 picture, ragged", 16, 1, num_tokens=(8, 128)),
    Scenario("32 users, 1 picture", 32, 1, without=("fastapi",)),  # behind a lock it is as with 8
)
SHORT = ("1 user, 1 picture", "8 users, 1 picture, repeated")

"""Clients that keep asking, what became of each request, and since when everything has been well again."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from types import TracebackType

from tests.reliability.client import CLEAN, Answer, Client, Outcome, Reply
from tests.reliability.questions import Question

PAUSE_S = 0.2  # of a client that was refused or cut off
WARM_AT_ONCE = 100  # more than run at once: libraries open threads for as many as come together
RETRY_S = 60.0  # a client whose connection broke tries again for so long


class Load:
    """A closed loop: each of `num_clients` asks the next of `questions` when its last has ended.

    `retries`: a client whose connection breaks asks again; only who is never served is lost, and `num_retried` counts.
    """

    def __init__(
        self,
        client: Client,
        answers: Mapping[Question, Answer],
        num_clients: int,
        *,
        questions: Sequence[Question],
        retries: bool = False,
    ) -> None:
        self._client = client
        self._answers = answers
        self._num_clients = num_clients
        self._questions = questions
        self._retries = retries
        self._stopping = False
        self._stack = AsyncExitStack()
        self.replies: list[Reply] = []
        self.num_retried = 0
        self._last_cut_s = 0.0

    async def __aenter__(self) -> Load:
        group = await self._stack.enter_async_context(asyncio.TaskGroup())
        for seed in range(self._num_clients):
            group.create_task(self._keep_asking(random.Random(seed)))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Lets every request end."""
        self._stopping = True
        await self._stack.__aexit__(kind, error, trace)

    async def ask(self, question: Question) -> Reply:
        """One more request, of the fault's own; it counts as the others do."""
        begin_s = time.monotonic()
        while True:
            reply = await self._client.ask(question.path, question.body, expected=self._answers.get(question))
            if reply.outcome is not Outcome.CUT or not self._retries:
                break
            if time.monotonic() - begin_s > RETRY_S:
                break
            self.num_retried += 1
            self._last_cut_s = reply.ended_s
            await asyncio.sleep(PAUSE_S)
        if reply.outcome is Outcome.CUT:
            reply.outcome = Outcome.LOST
        self.replies.append(reply)
        return reply

    async def _keep_asking(self, choice: random.Random) -> None:
        while not self._stopping:
            reply = await self.ask(choice.choice(self._questions))
            if reply.outcome is not Outcome.FINISHED:
                await asyncio.sleep(PAUSE_S)

    def count(self, *outcomes: Outcome) -> int:
        return sum(reply.outcome in outcomes for reply in self.replies)

    @property
    def num_clean(self) -> int:
        return self.count(*CLEAN)

    def details(self, *outcomes: Outcome) -> dict[str, int]:
        """What those requests were told, and how often."""
        counts: dict[str, int] = {}
        for reply in self.replies:
            if reply.outcome in outcomes:
                counts[reply.detail] = counts.get(reply.detail, 0) + 1
        return counts

    async def recovery_s(self, since_s: float, *, steady_s: float, limit_s: float) -> float | None:
        """From `since_s` to the end of the last request that did not finish; None if that is not over in time.

        It is over once requests have finished, and nothing else, for `steady_s`.
        """
        while time.monotonic() < since_s + limit_s + steady_s:
            await asyncio.sleep(0.2)
            bad = (reply.ended_s for reply in self.replies if reply.outcome is not Outcome.FINISHED)
            bad_s = max(self._last_cut_s, *bad, 0.0)
            well_s = max(bad_s, since_s)
            good = sum(r.outcome is Outcome.FINISHED and r.ended_s > well_s for r in self.replies)
            if time.monotonic() - well_s > steady_s and good >= self._num_clients:
                return max(0.0, bad_s - since_s)
        return None


async def warm_up(client: Client, questions: Sequence[Question]) -> None:
    """All that libraries open on first use, or on first crowding, is open afterwards."""
    crowd = (questions[number % len(questions)] for number in range(WARM_AT_ONCE))
    await asyncio.gather(*(client.ask(question.path, question.body) for question in crowd))

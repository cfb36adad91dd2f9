"""Who may start: at most `max_running` requests run, at most `max_waiting` wait for a place, the rest is turned away.

Every admitted request ends in exactly one of finished, cancelled and failed. Knows nothing of what a request is.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from enum import StrEnum
from types import TracebackType

from service.errors import Overloaded, Unavailable

RETRY_AFTER_S = 1


class Outcome(StrEnum):
    FINISHED = "finished"
    CANCELLED = "cancelled"
    FAILED = "failed"


class Admission:
    """`max_wait_s`: a request that waited that long is turned away. `on_end` is called once for each admitted one."""

    def __init__(
        self, *, max_running: int, max_waiting: int, max_wait_s: float, on_end: Callable[[Outcome], None]
    ) -> None:
        self._max_running = max_running
        self._max_waiting = max_waiting
        self._max_wait_s = max_wait_s
        self._on_end = on_end
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._running = 0
        self._draining = False

    @property
    def num_running(self) -> int:
        return self._running

    @property
    def num_waiting(self) -> int:
        return sum(not place.done() for place in self._waiting)

    @property
    def draining(self) -> bool:
        return self._draining

    def drain(self) -> None:
        """From now on nobody is admitted; who runs or waits goes on."""
        self._draining = True

    def slot(self) -> Slot:
        """`async with admission.slot():` holds a place. Entering raises Overloaded or Unavailable."""
        return Slot(self)

    async def enter(self) -> None:
        if self._draining:
            raise Unavailable("The server is shutting down.", retry_after_s=RETRY_AFTER_S)
        if self._running < self._max_running:  # then nobody waits: a place that falls free goes to a waiting one
            self._running += 1
            return
        if self.num_waiting >= self._max_waiting:
            raise Overloaded("Too many requests are waiting.", retry_after_s=RETRY_AFTER_S)
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        try:
            async with asyncio.timeout(self._max_wait_s):
                await place
        except BaseException as error:
            if place.done() and not place.cancelled():
                self._hand_over()  # the place came in the moment in which we left
            place.cancel()
            if isinstance(error, TimeoutError):
                raise Overloaded("The request waited too long.", retry_after_s=RETRY_AFTER_S) from error
            raise

    def leave(self, outcome: Outcome) -> None:
        self._hand_over()
        self._on_end(outcome)

    def _hand_over(self) -> None:
        while self._waiting:
            place = self._waiting.popleft()
            if not place.done():
                place.set_result(None)
                return
        self._running -= 1


class Slot:
    """One request's place. How the block is left says how the request ended."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission

    async def __aenter__(self) -> None:
        await self._admission.enter()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            outcome = Outcome.FINISHED
        elif issubclass(kind, asyncio.CancelledError | GeneratorExit):
            outcome = Outcome.CANCELLED
        else:
            outcome = Outcome.FAILED
        self._admission.leave(outcome)

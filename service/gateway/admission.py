"""Who may start: a bounded number of requests run, a bounded number wait for a place, the rest is turned away.

A place that falls free goes to the waiting key that runs fewest, round-robin among equals, and within a key to who came
first. Where places are shared between keys, none takes the last free ones: a key may start another request while it
holds less than `HEADROOM` times the places that would stay free. So one key alone fills three quarters, two fill three
sevenths each, and whoever comes next finds a place at once. The same rule bounds how many of a key wait.
(The rule is the dynamic threshold of shared-memory switches: Choudhury and Hahne, 1998.)

Every admitted request ends in exactly one outcome. Knows nothing of what a request is.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable
from enum import StrEnum
from types import TracebackType

from service.errors import CrossgateError, Overloaded, Unavailable

RETRY_AFTER_S = 1
HEADROOM = 3


class Outcome(StrEnum):
    FINISHED = "finished"
    CANCELLED = "cancelled"
    FAILED = "failed"
    REFUSED = "refused"  # the caller's mistake, or too much at once


class Admission:
    """Keys are names; None stands for everybody where there are no keys.

    `max_shared`: how many run while places are shared between keys. `max_wait_s`: a request that waited that long is
    turned away. `on_end` is called once for each admitted one.
    """

    def __init__(
        self,
        *,
        max_running: int,
        max_shared: int,
        max_waiting: int,
        max_wait_s: float,
        on_end: Callable[[str | None, Outcome], None],
    ) -> None:
        self._max_running = max_running
        self._max_shared = min(max_shared, max_running)
        self._max_waiting = max_waiting
        self._max_wait_s = max_wait_s
        self._on_end = on_end
        self._running: Counter[str | None] = Counter()
        self._waiting: dict[str | None, deque[asyncio.Future[None]]] = {}  # the key to be served next, first
        self._shared = False
        self._draining = False

    @property
    def num_running(self) -> int:
        return self._running.total()

    @property
    def num_waiting(self) -> int:
        return sum(map(self.waiting_of, self._waiting))

    def running_of(self, key: str | None) -> int:
        return self._running[key]

    def waiting_of(self, key: str | None) -> int:
        return sum(not place.done() for place in self._waiting.get(key, ()))

    @property
    def draining(self) -> bool:
        return self._draining

    def drain(self) -> None:
        """From now on nobody is admitted; who runs or waits goes on."""
        self._draining = True

    def share(self, shared: bool) -> None:
        """Whether places are shared between several keys. Nobody who runs or waits is turned away for it."""
        self._shared = shared
        self._fill()

    def slot(self, key: str | None = None) -> Slot:
        """`async with admission.slot(key):` holds a place. Entering raises Overloaded or Unavailable."""
        return Slot(self, key)

    async def enter(self, key: str | None) -> None:
        if self._draining:
            raise Unavailable("The server is shutting down.", retry_after_s=RETRY_AFTER_S)
        if self._may_run(key):  # then none of this key waits: a place that it may have is not left free
            self._running[key] += 1
            return
        if not self._may_wait(key):
            raise Overloaded("Too many requests are waiting.", retry_after_s=RETRY_AFTER_S)
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(key, deque()).append(place)
        try:
            async with asyncio.timeout(self._max_wait_s):
                await place
        except BaseException as error:
            if place.done() and not place.cancelled():
                self._free(key)  # the place came in the moment in which we left
            else:
                self._forget(key, place)
            if isinstance(error, TimeoutError):
                raise Overloaded("The request waited too long.", retry_after_s=RETRY_AFTER_S) from error
            raise

    def leave(self, key: str | None, outcome: Outcome) -> None:
        self._free(key)
        self._on_end(key, outcome)

    def _may_run(self, key: str | None) -> bool:
        if not self._shared:
            return self.num_running < self._max_running
        free = self._max_shared - self.num_running
        return free > 0 and _within_share(self._running[key], free)

    def _may_wait(self, key: str | None) -> bool:
        free = self._max_waiting - self.num_waiting
        if not self._shared:
            return free > 0
        return self._max_waiting > 0 and _within_share(self.waiting_of(key), free)

    def _free(self, key: str | None) -> None:
        self._running[key] -= 1
        if not self._running[key]:
            del self._running[key]
        self._fill()

    def _fill(self) -> None:
        """Give free places to who waits, as long as somebody may have one."""
        while keys := [key for key in self._waiting if self.waiting_of(key) and self._may_run(key)]:
            key = min(keys, key=self.running_of)
            queue = self._waiting.pop(key)
            while (place := queue.popleft()).done():
                pass
            if queue:
                self._waiting[key] = queue  # at the end: among equals the others are served first
            self._running[key] += 1
            place.set_result(None)

    def _forget(self, key: str | None, place: asyncio.Future[None]) -> None:
        queue = self._waiting.get(key)
        if queue is None:
            return
        if place in queue:
            queue.remove(place)
        if not queue:
            del self._waiting[key]


class Slot:
    """One request's place. How the block is left says how the request ended."""

    def __init__(self, admission: Admission, key: str | None) -> None:
        self._admission = admission
        self._key = key

    async def __aenter__(self) -> None:
        await self._admission.enter(self._key)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._admission.leave(self._key, outcome_of(error))


def outcome_of(error: BaseException | None) -> Outcome:
    """How a request ended that this error ended, or none."""
    if error is None:
        return Outcome.FINISHED
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        return Outcome.CANCELLED
    if isinstance(error, CrossgateError) and error.status < 500:
        return Outcome.REFUSED
    return Outcome.FAILED


def _within_share(mine: int, free: int) -> bool:
    """Whether a key that has `mine` may take one more of the `free`. One that has none may always."""
    return not mine or mine < HEADROOM * (free - 1)

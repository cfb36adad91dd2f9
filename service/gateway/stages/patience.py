"""How long a request bears a stage that is away: it pauses and tries again, but not for ever, and not with poison.

A request may have been in a stage when that died, and may be why. So it is given up when that has happened twice,
however much time is left: it cannot end a stage again and again.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from service.errors import StageLost, StageTimeout, Unavailable

FIRST_PAUSE_S, MAX_PAUSE_S = 0.25, 2.0
MAX_LOST = 2


class Patience:
    """Of one request. `wait_s`: for one outage. `end`: the request's deadline, as the event loop's time."""

    def __init__(self, wait_s: float, end: float) -> None:
        self._wait_s = wait_s
        self._end = end
        self._until: float | None = None
        self._pause_s = FIRST_PAUSE_S
        self._num_lost = 0

    async def wait_after(self, error: Unavailable) -> None:
        """Returns when it is time for the next attempt. Raises `error` if there shall be none."""
        now = asyncio.get_running_loop().time()
        if isinstance(error, StageLost):
            self._num_lost += 1
            if self._num_lost >= MAX_LOST:
                raise error
            self._until = None  # it was there: this outage has just begun
        if self._until is None:
            self._until, self._pause_s = min(self._end, now + self._wait_s), FIRST_PAUSE_S
        pause_s = self._pause_s * random.uniform(0.5, 1.0)  # so that not all come at once
        if now + pause_s > self._until:
            raise error
        self._pause_s = min(2 * self._pause_s, MAX_PAUSE_S)
        await asyncio.sleep(pause_s)


@asynccontextmanager
async def until(end: float) -> AsyncGenerator[None, None]:
    """Raises StageTimeout in the block once the event loop's time is `end`. Not around a `yield`."""
    try:
        async with asyncio.timeout_at(end):
            yield
    except TimeoutError as error:
        raise StageTimeout("The request took too long.") from error

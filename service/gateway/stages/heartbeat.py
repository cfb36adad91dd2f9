"""Whether the models answer: asked at a steady pace in the background, read by whoever wants to know.

So that a probe costs the models nothing, however often it is made.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

log = logging.getLogger(__name__)
REST = 50.0  # times as long as a beat took: on a slow processor it is a picture encoded and a token decoded


class Heartbeat:
    """`ask`: one beat; ends within `timeout_s`. A result is good for three periods and one more beat, so models that
    answer slowly may rest for up to three periods.

    `heard`: whether all models have answered somebody just now. Then they are alive, whatever the last beat met.
    """

    def __init__(
        self, ask: Callable[[], Awaitable[bool]], heard: Callable[[], bool], *, period_s: float, timeout_s: float
    ) -> None:
        self._ask, self._heard = ask, heard
        self._period_s = period_s
        self._timeout_s = timeout_s
        self._max_age_s = 3 * period_s + timeout_s
        self._alive = False
        self._asked_at_s: float | None = None
        self._first = asyncio.Event()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            begin_s = time.monotonic()
            try:
                alive = await self._ask()
            except Exception:  # a bug of ours; the beat goes on
                log.exception("a heartbeat failed")
                alive = False
            if alive != self._alive:
                log.log(logging.INFO if alive else logging.WARNING, "the models answer" if alive else "no answer")
            self._alive, self._asked_at_s = alive, time.monotonic()
            self._first.set()
            took_s = self._asked_at_s - begin_s
            rest_s = min(REST * took_s, 3 * self._period_s) if alive else 0.0
            await asyncio.sleep(max(self._period_s, rest_s))

    async def ready(self) -> bool:
        """The last result, if nothing newer is known; False if it is old. Waits for the first one."""
        if self._heard():
            return True
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._first.wait()
        except TimeoutError:
            return False
        assert self._asked_at_s is not None
        return self._alive and time.monotonic() - self._asked_at_s <= self._max_age_s

"""Whose picture a worker decodes next: pure accounting, no processes.

Two lines. Light pictures take little memory and milliseconds; heavy ones leave one worker to the light, and all that
are decoded at a time find room in one budget of bytes. In each line requests are served round-robin, picture by
picture, so that one with sixteen waits no less than sixteen with one. The first in line that finds no room holds up its
line alone.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field


class FairQueue:
    """`memory_bytes`: of heavy pictures; none asks for more."""

    def __init__(self, num_workers: int, memory_bytes: int) -> None:
        self._num_free = num_workers
        self._max_heavy = max(1, num_workers - 1)
        self._free_bytes = memory_bytes
        self._light, self._heavy = _Line(), _Line()
        self._heavy_next = False

    async def take(self, asker: object, heavy_bytes: int = 0) -> None:
        """Waits for a worker. `heavy_bytes`: 0 for a light picture. `asker`: the request, by identity."""
        waiter = _Waiter(asker, heavy_bytes)
        line = self._heavy if heavy_bytes else self._light
        line.join(waiter)
        self._grant()
        try:
            await waiter.grant
        except asyncio.CancelledError:
            if waiter.grant.cancelled():
                line.leave(waiter)
                self._grant()
            else:
                self.give_back(heavy_bytes)
            raise

    def give_back(self, heavy_bytes: int = 0) -> None:
        self._num_free += 1
        if heavy_bytes:
            self._max_heavy += 1
            self._free_bytes += heavy_bytes
        self._grant()

    def _grant(self) -> None:
        while self._num_free:
            lines = (self._heavy, self._light) if self._heavy_next else (self._light, self._heavy)
            line = next((line for line in lines if line.first and self._fits(line.first.heavy_bytes)), None)
            if line is None:
                return
            waiter = line.take_first()
            if waiter.grant.done():  # it has left, and will hear of it
                continue
            self._num_free -= 1
            if waiter.heavy_bytes:
                self._max_heavy -= 1
                self._free_bytes -= waiter.heavy_bytes
            self._heavy_next = not waiter.heavy_bytes
            waiter.grant.set_result(None)

    def _fits(self, heavy_bytes: int) -> bool:
        return not heavy_bytes or (self._max_heavy > 0 and heavy_bytes <= self._free_bytes)


@dataclass(eq=False)
class _Waiter:
    asker: object
    heavy_bytes: int
    grant: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class _Line:
    """Askers in a round; of each the pictures in order."""

    def __init__(self) -> None:
        self._round: deque[deque[_Waiter]] = deque()

    @property
    def first(self) -> _Waiter | None:
        return self._round[0][0] if self._round else None

    def join(self, waiter: _Waiter) -> None:
        own = next((pictures for pictures in self._round if pictures[0].asker is waiter.asker), None)
        if own is None:
            self._round.append(deque([waiter]))
        else:
            own.append(waiter)

    def take_first(self) -> _Waiter:
        pictures = self._round.popleft()
        waiter = pictures.popleft()
        if pictures:
            self._round.append(pictures)
        return waiter

    def leave(self, waiter: _Waiter) -> None:
        """If it is still there."""
        for own in self._round:
            if waiter in own:
                own.remove(waiter)
                if not own:
                    self._round.remove(own)
                return

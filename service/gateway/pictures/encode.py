"""Latents by picture key: a picture that many ask for at once is encoded once, and lately encoded ones are kept.

Each picture is its own call, so that Triton's dynamic batcher can merge those of different requests. Only so many calls
are under way, round-robin among requests, so that one with sixteen pictures does not shut out another's only one.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.errors import StageTimeout


@dataclass(frozen=True)
class Latents:
    """`values` [S, R, E], a page for each tile, fp16 or fp32 as the encoder gives them. `checkpoint`: identity of that
    encoder's, 32 bytes. `region`: what holds the memory of `values`, if the backend shares it with Triton.
    """

    values: NDArray[Any]
    checkpoint: bytes
    region: Any = None


Encode = Callable[[NDArray[np.uint8]], Awaitable[Latents]]


@dataclass(eq=False)
class _Flight:
    """One picture on its way, for all that want it."""

    key: str
    pixels: NDArray[np.uint8]
    landed: asyncio.Future[Latents]
    num_waiting: int = 0
    task: asyncio.Task[None] | None = None  # None: not begun


class PictureEncoder:
    """`max_calls`: under way at a time. `timeout_s`: of one call. `cache_bytes`: how much is kept, oldest out first.

    `on_encoded`: told the seconds of each encoding.
    """

    def __init__(
        self,
        encode: Encode,
        *,
        max_calls: int,
        timeout_s: float,
        cache_bytes: int,
        on_encoded: Callable[[float], None],
    ):
        self._encode = encode
        self._max_calls = max_calls
        self._timeout_s = timeout_s
        self._cache_bytes = cache_bytes
        self._on_encoded = on_encoded
        self._flights: dict[str, _Flight] = {}
        self._requests: deque[deque[_Flight]] = deque()  # what each still wants, round-robin
        self._num_calls = 0
        self._kept: OrderedDict[str, Latents] = OrderedDict()
        self._kept_bytes = 0

    async def latents(self, pictures: Mapping[str, NDArray[np.uint8]]) -> dict[str, Latents]:
        """Of one request's pictures, by key. Raises StageTimeout, and what the encoder's call raises."""
        found: dict[str, Latents] = {}
        flights: list[_Flight] = []
        for key, pixels in pictures.items():
            if key in self._kept:
                self._kept.move_to_end(key)
                found[key] = self._kept[key]
            else:
                flights.append(self._flight(key, pixels))
        if not flights:
            return found
        wanted = deque(flights)
        self._requests.append(wanted)
        self._start_calls()
        try:  # shielded: one who leaves must not take the picture from the others
            landed = await asyncio.gather(*(asyncio.shield(flight.landed) for flight in flights))
        finally:
            with suppress(ValueError):  # all of it was begun
                self._requests.remove(wanted)
            for flight in flights:
                self._leave(flight)
        return found | {flight.key: latents for flight, latents in zip(flights, landed, strict=True)}

    def forget(self) -> None:
        """Keep nothing of what came so far: it is of an encoder that is gone."""
        self._kept.clear()
        self._kept_bytes = 0

    def _flight(self, key: str, pixels: NDArray[np.uint8]) -> _Flight:
        if key not in self._flights:
            self._flights[key] = _Flight(key, pixels, asyncio.get_running_loop().create_future())
        flight = self._flights[key]
        flight.num_waiting += 1
        return flight

    def _start_calls(self) -> None:
        while self._num_calls < self._max_calls and (flight := self._next()) is not None:
            self._num_calls += 1
            flight.task = asyncio.create_task(self._fly(flight))
            flight.task.add_done_callback(self._call_ended)  # also of one cancelled before it began

    def _call_ended(self, task: asyncio.Task[None]) -> None:
        self._num_calls -= 1
        self._start_calls()

    def _next(self) -> _Flight | None:
        while self._requests:
            wanted = self._requests.popleft()
            while wanted:
                flight = wanted.popleft()
                if flight.task is None and flight.num_waiting:  # else another request brought it, or all have left
                    if wanted:
                        self._requests.append(wanted)
                    return flight
        return None

    async def _fly(self, flight: _Flight) -> None:
        start = time.perf_counter()
        try:
            async with asyncio.timeout(self._timeout_s):
                latents = await self._encode(flight.pixels)
        except TimeoutError as error:
            timeout = StageTimeout("The vision encoder did not answer in time.")
            timeout.__cause__ = error
            self._land(flight, timeout)
        except Exception as error:
            self._land(flight, error)
        else:
            self._on_encoded(time.perf_counter() - start)
            self._keep(flight.key, latents)
            self._land(flight, latents)

    def _land(self, flight: _Flight, outcome: Latents | Exception) -> None:
        self._remove(flight)
        if flight.landed.done():  # everybody has left
            return
        if isinstance(outcome, Latents):
            flight.landed.set_result(outcome)
        else:
            flight.landed.set_exception(outcome)

    def _leave(self, flight: _Flight) -> None:
        flight.num_waiting -= 1
        if flight.num_waiting:
            return
        self._remove(flight)
        if flight.task is not None:
            flight.task.cancel()
        if not flight.landed.cancel() and not flight.landed.cancelled():
            flight.landed.exception()  # looked at, so that asyncio does not say that nobody did

    def _remove(self, flight: _Flight) -> None:
        if self._flights.get(flight.key) is flight:
            del self._flights[flight.key]

    def _keep(self, key: str, latents: Latents) -> None:
        num_bytes = latents.values.nbytes
        if num_bytes > self._cache_bytes or key in self._kept:
            return
        self._kept[key] = latents
        self._kept_bytes += num_bytes
        while self._kept_bytes > self._cache_bytes:
            _, oldest = self._kept.popitem(last=False)
            self._kept_bytes -= oldest.values.nbytes

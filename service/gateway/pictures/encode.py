"""Latents by picture key: a picture that many ask for at once is encoded once, and lately encoded ones are kept.

Each picture is its own call, so that Triton's dynamic batcher can merge those of different requests.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.errors import StageTimeout

Latents = NDArray[Any]  # [R, E], fp16 or fp32 as the encoder gives them
Encode = Callable[[NDArray[np.uint8]], Awaitable[Latents]]


@dataclass
class _Flight:
    task: asyncio.Task[Latents]
    num_waiting: int = 0


class PictureEncoder:
    """`cache_bytes`: how much is kept, oldest out first. `on_encoded`: told the seconds of each encoding."""

    def __init__(self, encode: Encode, *, timeout_s: float, cache_bytes: int, on_encoded: Callable[[float], None]):
        self._encode = encode
        self._timeout_s = timeout_s
        self._cache_bytes = cache_bytes
        self._on_encoded = on_encoded
        self._flights: dict[str, _Flight] = {}
        self._kept: OrderedDict[str, Latents] = OrderedDict()
        self._kept_bytes = 0

    async def latents(self, key: str, pixels: NDArray[np.uint8]) -> Latents:
        """Raises StageTimeout, and what the encoder's call raises."""
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        flight = self._flights.get(key)
        if flight is None:
            flight = self._flights[key] = _Flight(asyncio.create_task(self._fly(key, pixels)))
        flight.num_waiting += 1
        try:
            return await asyncio.shield(flight.task)  # one who leaves must not take the picture from the others
        finally:
            flight.num_waiting -= 1
            if not flight.num_waiting:
                if self._flights.get(key) is flight:
                    del self._flights[key]
                flight.task.cancel()

    async def _fly(self, key: str, pixels: NDArray[np.uint8]) -> Latents:
        start = time.perf_counter()
        try:
            async with asyncio.timeout(self._timeout_s):
                latents = await self._encode(pixels)
        except TimeoutError as error:
            raise StageTimeout("The vision encoder did not answer in time.") from error
        self._on_encoded(time.perf_counter() - start)
        self._keep(key, latents)
        return latents

    def _keep(self, key: str, latents: Latents) -> None:
        if latents.nbytes > self._cache_bytes or key in self._kept:
            return
        self._kept[key] = latents
        self._kept_bytes += latents.nbytes
        while self._kept_bytes > self._cache_bytes:
            _, oldest = self._kept.popitem(last=False)
            self._kept_bytes -= oldest.nbytes

"""From a client's bytes to what the vision encoder sees, and the key by which the decoder knows the picture.

What can be told from a length or a prefix is told here; everything else is done by picture workers, other processes.
Knows nothing of prompts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.errors import InvalidRequest, TooLarge
from service.families import Family
from service.gateway.pictures.decode import PictureLimits
from service.gateway.pictures.key import salted_key
from service.gateway.pictures.worker import Setup
from service.gateway.pictures.workers import Workers
from service.gateway.question import PictureSource

PIECE_BYTES = 1 << 18  # of a file on its way to a worker
MAX_HEADER = 1000  # characters of a data URL before its comma


@dataclass(frozen=True)
class Picture:
    """`key`: 64 hex digits over the pixels, the model and the asker's salt. `pixels`: uint8 [3, H, W] RGB."""

    key: str
    pixels: NDArray[np.uint8]


class PictureReader:
    """`timeout_s`: for decoding one picture. `max_wait_s`: for a worker that has time for it."""

    def __init__(
        self, family: Family, limits: PictureLimits, *, num_workers: int, timeout_s: float, max_wait_s: float
    ) -> None:
        vision = family.vision
        setup = Setup(limits, family.config_identity, vision.encoder.image_size, vision.resized_side, family.preprocess)
        self._limits = limits
        self._max_wait_s = max_wait_s
        self.workers = Workers(setup, num_workers=num_workers, timeout_s=timeout_s)

    async def read(self, sources: tuple[PictureSource, ...], salt: bytes = b"") -> list[Picture]:
        """In the order of `sources`. When one is refused the others are given up. `salt`: of their keys; none: shared.

        Raises InvalidRequest or TooLarge naming the picture's field, Overloaded, or Unavailable.
        """
        if len(sources) > self._limits.max_images:
            source = sources[self._limits.max_images]
            raise TooLarge(f"A request takes at most {self._limits.max_images} pictures.", param=source.field)
        asker = object()
        tasks = [asyncio.create_task(self._read_one(asker, source, salt)) for source in sources]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def _read_one(self, asker: object, source: PictureSource, salt: bytes) -> Picture:
        content = source.content
        is_url = isinstance(content, str)
        start = payload_start(content, source.field) if isinstance(content, str) else 0
        num_bytes = (len(content) - start) // 4 * 3 - 3 if is_url else len(content)
        if num_bytes > self._limits.max_image_bytes:
            raise TooLarge(f"A picture takes at most {self._limits.max_image_bytes} bytes.", param=source.field)
        head: dict[str, Any] = {"field": source.field, "base64": is_url, "length": len(content) - start}
        heavy_bytes = 0
        while True:
            answer, body = await self.workers.ask(
                asker, head, _pieces(content, start), heavy_bytes=heavy_bytes, max_wait_s=self._max_wait_s
            )
            if "code" in answer:
                kind = TooLarge if answer["code"] == TooLarge.code else InvalidRequest
                raise kind(answer["message"], param=source.field)
            if "key" in answer:
                pixels = np.frombuffer(body, np.uint8).reshape(answer["shape"])
                return Picture(salted_key(answer["key"], salt), pixels)
            heavy_bytes = answer["heavy_bytes"]


def payload_start(url: str, field: str) -> int:
    """Where the base64 of a data URL begins. Raises InvalidRequest."""
    scheme = url[: url.find(":", 0, MAX_HEADER) + 1].lower()
    if scheme in ("http:", "https:"):
        raise InvalidRequest("http(s) URLs are not fetched: send the picture as a data URL.", param=field)
    if scheme != "data:":
        raise InvalidRequest("A picture must be a data URL: data:image/png;base64,...", param=field)
    comma = url.find(",", 0, MAX_HEADER)
    if not url[:comma].lower().endswith(";base64"):
        raise InvalidRequest("A data URL must be base64: data:image/png;base64,...", param=field)
    if not url.isascii():
        raise InvalidRequest("The data URL is not valid base64.", param=field)
    return comma + 1


def _pieces(content: bytes | str, start: int) -> Iterator[bytes]:
    for position in range(start, len(content), PIECE_BYTES):
        piece = content[position : position + PIECE_BYTES]
        yield piece.encode("ascii") if isinstance(piece, str) else piece

"""From a picture's bytes to pixels: what a picture worker does with hostile bytes.

Costs are known and checked before anything is decoded. Formats are told by the bytes, never by what the client calls
them. Knows neither asyncio nor prompts.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

from PIL import Image

from service.errors import InvalidRequest, TooLarge
from service.gateway.pictures.containers import Broken, Container, TooComplex, read_container

MAX_SIDE = 65_535  # JPEG's own; the resizing of millions of pixels to hundreds would take gigabytes
DRAFT_PIXELS = 16_000_000  # a JPEG above it is decoded at a half, a quarter or an eighth
DRAFT_SIDES = 3  # times a tile's: what it has at least after that

UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class PictureLimits:
    """`memory_bytes`: what the pictures that are decoded at a time may take, and so one picture."""

    max_images: int
    max_image_bytes: int
    max_image_pixels: int
    memory_bytes: int


@dataclass(frozen=True)
class Cost:
    """`memory_bytes`: at the peak, file and resizing included. `work`: pixels gone through, those of each scan."""

    memory_bytes: int
    work: int


def decode_picture(content: bytes, field: str, max_pixels: int) -> Image.Image:
    """A picture in its file's mode: upright, its first frame. Raises InvalidRequest or TooLarge."""
    return draw(examine(content, field, max_pixels), field)


def examine(content: bytes, field: str, max_pixels: int) -> Container:
    """Raises InvalidRequest or TooLarge."""
    try:
        container = read_container(content)
    except Broken as error:
        raise InvalidRequest("The picture is broken.", param=field) from error
    except TooComplex as error:
        raise TooLarge("The picture has too many parts.", param=field) from error
    if container is None:
        raise InvalidRequest("Not a JPEG, PNG or WebP picture.", param=field)
    if not container.width or not container.height:
        raise InvalidRequest("The picture is broken.", param=field)
    if container.width * container.height > max_pixels:
        raise TooLarge(f"A picture takes at most {max_pixels} pixels.", param=field)
    if max(container.width, container.height) > MAX_SIDE:
        raise TooLarge(f"A picture takes at most {MAX_SIDE} pixels in a row or column.", param=field)
    return container


def draw(container: Container, field: str, scale: int = 1) -> Image.Image:
    """`scale`: from `draft_scale`. Raises InvalidRequest, or MemoryError."""
    try:
        picture = Image.open(io.BytesIO(container.content), formats=(container.form,))
        if picture.size != (container.width, container.height):
            raise Broken
        if scale > 1:
            picture.draft(None, (container.width // scale, container.height // scale))
        picture.load()
        method = UPRIGHT.get(container.orientation)
        return picture if method is None else picture.transpose(method)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise nearly anything on hostile bytes
        raise InvalidRequest("The picture is broken.", param=field) from error


def draft_scale(container: Container, tile_size: int) -> int:
    """1, 2, 4 or 8: how much smaller a huge JPEG is decoded. What is not huge is decoded as it is, pixel for pixel."""
    if container.form != "JPEG" or container.width * container.height <= DRAFT_PIXELS:
        return 1
    smaller_side = min(container.width, container.height)
    return next((scale for scale in (8, 4, 2) if smaller_side // scale >= DRAFT_SIDES * tile_size), 1)


def cost(container: Container, resized_side: int, scale: int = 1) -> Cost:
    """`scale`: from `draft_scale`. `resized_side`: of the square that it is resized to, or what costs as much."""
    num_pixels = container.width * container.height
    pixel_bytes = container.pixel_bytes if container.orientation == 1 else max(container.pixel_bytes, 8)
    resizing_bytes = 2 * 4 * resized_side * max(container.width, container.height) // scale
    memory_bytes = num_pixels // scale**2 * pixel_bytes + container.fixed_bytes + resizing_bytes
    return Cost(memory_bytes + 2 * len(container.content), num_pixels * container.num_scans)

"""From a client's bytes to what the vision encoder sees, and the key by which the decoder knows the picture.

Limits are checked before anything is decoded; decoding runs in threads. Formats are told by the bytes, never by what
the client calls them. Knows nothing of prompts.
"""

from __future__ import annotations

import asyncio
import binascii
import hashlib
import io
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from service.errors import InvalidRequest, TooLarge
from service.families import Family
from service.gateway.question import PictureSource

FORMATS = ("JPEG", "PNG", "WEBP")


@dataclass(frozen=True)
class Picture:
    """`key`: 64 hex digits over the pixels and the model's config. `pixels`: uint8 [3, H, W] RGB."""

    key: str
    pixels: NDArray[np.uint8]


@dataclass(frozen=True)
class PictureLimits:
    max_images: int
    max_image_bytes: int
    max_image_pixels: int


class PictureReader:
    def __init__(self, family: Family, limits: PictureLimits, threads: Executor) -> None:
        self._family = family
        self._limits = limits
        self._threads = threads

    async def read(self, sources: tuple[PictureSource, ...]) -> list[Picture]:
        """In the order of `sources`. Raises InvalidRequest or TooLarge naming the picture's field."""
        if len(sources) > self._limits.max_images:
            source = sources[self._limits.max_images]
            raise TooLarge(f"A request takes at most {self._limits.max_images} pictures.", param=source.field)
        loop = asyncio.get_running_loop()
        return await asyncio.gather(*(loop.run_in_executor(self._threads, self._read_one, each) for each in sources))

    def _read_one(self, source: PictureSource) -> Picture:
        content = source.content
        if isinstance(content, str):
            content = decode_data_url(content, source.field, self._limits.max_image_bytes)
        elif len(content) > self._limits.max_image_bytes:
            raise _too_many_bytes(source.field, self._limits.max_image_bytes)
        rgb = decode_picture(content, source.field, self._limits.max_image_pixels)
        pixels = np.ascontiguousarray(self._family.preprocess(rgb))
        return Picture(picture_key(pixels, self._family.config_identity), pixels)


def picture_key(pixels: NDArray[np.uint8], identity: str) -> str:
    """SHA-256 over the pixels and the config by which they were made, in hex.

    Not over the weights: latents say whose they are, and a decoder holds what its own encoder made.
    """
    digest = hashlib.sha256(f"{identity}\0{pixels.dtype.str}\0{pixels.shape}\0".encode())
    digest.update(pixels.tobytes())
    return digest.hexdigest()


def decode_data_url(url: str, field: str, max_bytes: int) -> bytes:
    """Raises InvalidRequest or TooLarge."""
    scheme, _, rest = url.partition(":")
    if scheme.lower() in ("http", "https"):
        raise InvalidRequest("http(s) URLs are not fetched: send the picture as a data URL.", param=field)
    if scheme.lower() != "data":
        raise InvalidRequest("A picture must be a data URL: data:image/png;base64,...", param=field)
    header, comma, payload = rest.partition(",")
    if not comma or not header.lower().endswith(";base64"):
        raise InvalidRequest("A data URL must be base64: data:image/png;base64,...", param=field)
    if len(payload) // 4 * 3 > max_bytes + 3:
        raise _too_many_bytes(field, max_bytes)
    try:
        content = binascii.a2b_base64(payload.encode("ascii"), strict_mode=True)
    except (binascii.Error, UnicodeEncodeError) as error:
        raise InvalidRequest("The data URL is not valid base64.", param=field) from error
    if len(content) > max_bytes:
        raise _too_many_bytes(field, max_bytes)
    return content


def decode_picture(content: bytes, field: str, max_pixels: int) -> Image.Image:
    """An RGB picture: upright, its first frame, on white where it is transparent. Raises InvalidRequest or TooLarge."""
    try:
        picture = Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise InvalidRequest("Not a JPEG, PNG or WebP picture.", param=field) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_many_pixels(field, max_pixels) from error
    except Exception as error:  # decoders raise nearly anything on hostile bytes
        raise InvalidRequest("The picture is broken.", param=field) from error
    if picture.width * picture.height > max_pixels:
        raise _too_many_pixels(field, max_pixels)
    try:
        picture.load()
        return _flatten(_upright(picture))
    except Exception as error:  # as above
        raise InvalidRequest("The picture is broken.", param=field) from error


def _upright(picture: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # a broken EXIF block says nothing; viewers show such a picture as it lies
        return picture


def _flatten(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion would clip instead of scale
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8)).convert("RGB")
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    layer = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


def _too_many_bytes(field: str, limit: int) -> TooLarge:
    return TooLarge(f"A picture takes at most {limit} bytes.", param=field)


def _too_many_pixels(field: str, limit: int) -> TooLarge:
    return TooLarge(f"A picture takes at most {limit} pixels.", param=field)

"""From a decoded picture of any kind to the encoder's pixels, in little more memory than the picture itself."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

BAND_PIXELS = 1 << 20


def resize_square(picture: Image.Image, size: int) -> NDArray[np.uint8]:
    """Any picture -> uint8 [3, size, size] RGB, on white where it is transparent, squeezed to a square, bicubic.

    What is opaque RGB goes through one call of Pillow's. What is large and not RGB becomes so in bands along its longer
    side, each shortened at once: bit for bit the same where it is wider than high, since Pillow shortens rows first,
    and otherwise but for rounding (0.2 grey levels on average).
    """
    if picture.mode != "RGB" or picture.has_transparency_data:
        whole = picture.width * picture.height <= BAND_PIXELS
        picture = flatten(picture) if whole else _shorten(picture, size)
    picture = picture.resize((size, size), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(picture, dtype=np.uint8).transpose(2, 0, 1))


def flatten(picture: Image.Image) -> Image.Image:
    """Any picture in RGB, on white where it is transparent."""
    if picture.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion would clip instead of scale
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8)).convert("RGB")
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    layer = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


def _shorten(picture: Image.Image, size: int) -> Image.Image:
    width, height = picture.size
    wide = width >= height
    short = Image.new("RGB", (size, height) if wide else (width, size))
    step = max(1, BAND_PIXELS // max(width, height))
    for start in range(0, min(width, height), step):
        end = min(start + step, min(width, height))
        band = flatten(picture.crop((0, start, width, end) if wide else (start, 0, end, height)))
        band = band.resize((size, band.height) if wide else (band.width, size), Image.Resampling.BICUBIC)
        short.paste(band, (0, start) if wide else (start, 0))
    return short

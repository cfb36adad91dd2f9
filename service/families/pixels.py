"""From a decoded picture of any kind to the encoder's pixels, in little more memory than the picture itself."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from service.families.vision import Grid

BAND_PIXELS = 1 << 20


def resize_square(picture: Image.Image, size: int) -> NDArray[np.uint8]:
    """Any picture -> uint8 [3, size, size] RGB, on white where it is transparent, squeezed to a square, bicubic."""
    resized = _resize(picture, (size, size), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(resized, dtype=np.uint8).transpose(2, 0, 1))


def fit_tiles(picture: Image.Image, tile_size: int, grids: tuple[Grid, ...]) -> NDArray[np.uint8]:
    """Any picture -> uint8 [3, rows * tile_size, columns * tile_size] RGB, on white where it is transparent, bilinear.

    It keeps its shape and stands in the upper left of the grid of tiles that suits it best; what it does not cover is
    black. Source: `transformers` models/mllama, image_processing_pil_mllama.py.
    """
    rows, columns = choose_grid(picture.height, picture.width, tile_size, grids)
    canvas = np.zeros((3, rows * tile_size, columns * tile_size), np.uint8)
    height, width = fitting_size(picture.height, picture.width, tile_size, (rows, columns))
    resized = _resize(picture, (width, height), Image.Resampling.BILINEAR)
    canvas[:, :height, :width] = np.asarray(resized, dtype=np.uint8).transpose(2, 0, 1)
    return canvas


def grids_of(max_tiles: int) -> tuple[Grid, ...]:
    """All grids of at most so many tiles, those of one row first."""
    sides = range(1, max_tiles + 1)
    return tuple((rows, columns) for rows in sides for columns in sides if rows * columns <= max_tiles)


def choose_grid(height: int, width: int, tile_size: int, grids: tuple[Grid, ...]) -> Grid:
    """The one that enlarges a picture least, or if all are too small shrinks it least; of several the smallest."""
    scales = {grid: min(grid[0] * tile_size / height, grid[1] * tile_size / width) for grid in grids}
    enlarging = [scale for scale in scales.values() if scale >= 1]
    best = min(enlarging) if enlarging else max(scales.values())
    return min((grid for grid in grids if scales[grid] == best), key=math.prod)


def fitting_size(height: int, width: int, tile_size: int, grid: Grid) -> tuple[int, int]:
    """Height and width of a picture on its grid: enlarged to no more than a tile, else shrunk to fit."""
    most_height = min(max(height, tile_size), grid[0] * tile_size)
    most_width = min(max(width, tile_size), grid[1] * tile_size)
    by_height, by_width = most_height / height, most_width / width
    if by_width < by_height:
        return min(math.floor(height * by_width) or 1, most_height), most_width
    return most_height, min(math.floor(width * by_height) or 1, most_width)


def flatten(picture: Image.Image) -> Image.Image:
    """Any picture in RGB, on white where it is transparent."""
    if picture.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion would clip instead of scale
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8)).convert("RGB")
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    layer = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


def _resize(picture: Image.Image, size: tuple[int, int], resampling: Image.Resampling) -> Image.Image:
    """To `size` = (width, height), in RGB.

    What is opaque RGB goes through one call of Pillow's. What is large and not RGB becomes so in bands along its longer
    side, each shortened at once: bit for bit the same where it is wider than high, since Pillow shortens rows first,
    and otherwise but for rounding (0.2 grey levels on average).
    """
    if picture.mode != "RGB" or picture.has_transparency_data:
        whole = picture.width * picture.height <= BAND_PIXELS
        picture = flatten(picture) if whole else _shorten(picture, size, resampling)
    return picture.resize(size, resampling)


def _shorten(picture: Image.Image, size: tuple[int, int], resampling: Image.Resampling) -> Image.Image:
    width, height = picture.size
    wide = width >= height
    short = Image.new("RGB", (size[0], height) if wide else (width, size[1]))
    step = max(1, BAND_PIXELS // max(width, height))
    for start in range(0, min(width, height), step):
        end = min(start + step, min(width, height))
        band = flatten(picture.crop((0, start, width, end) if wide else (start, 0, end, height)))
        band = band.resize((size[0], band.height) if wide else (band.width, size[1]), resampling)
        short.paste(band, (0, start) if wide else (start, 0))
    return short

"""Hostile pictures: few bytes that take much memory or much time."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections import Counter
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from tests.e2e.running import picture
from tests.reliability.attack import Answers, Target, at_once, show
from tests.reliability.pictures import PNG_MAGIC, encode, png_chunk, png_header

SLOW_S = 8.0


def huge_pictures(target: Target) -> Answers:
    """Few bytes, many pixels, by colour, alpha, depth and interlace."""
    data = [
        _flat_png(5650, 5650, 8, 6, 4),
        _flat_png(5650, 5650, 16, 2, 6),
        _flat_png(5600, 5600, 8, 2, 3, interlace=1),
        _flat_png(30_000, 1000, 1, 0, 1 / 8),
        _flat_png(5650, 5650, 8, 3, 1, before=png_chunk(b"PLTE", bytes(768)) + png_chunk(b"tRNS", bytes(256))),
        encode(Image.new("RGB", (5600, 5600)), "WEBP", lossless=True, quality=0, method=0),
        encode(Image.new("RGB", (5600, 5600)), "JPEG"),
    ]
    return at_once(16, lambda number: show(target, data[number % len(data)], max_tokens=1))


def pictures_beyond_every_limit(target: Target) -> Answers:
    data = [_flat_png(100_000, 100_000, 8, 6, 0), _flat_png(2**31 - 1, 1, 8, 2, 0), _flat_png(1, 2**31 - 1, 8, 2, 0)]
    return sum((show(target, each) for each in data), Counter())


def jpegs_of_endless_scans(target: Target) -> Answers:
    jpeg = encode(Image.new("RGB", (4000, 4000), "red"), "JPEG", progressive=True, quality=20)
    first = jpeg.index(b"\xff\xda")
    second = jpeg.index(b"\xff\xda", first + 2)
    last = jpeg.rindex(b"\xff\xda")
    scans = [jpeg[:second] + jpeg[first:second] * 40, jpeg[:last] + jpeg[last:-2] * 400 + b"\xff\xd9"]
    return at_once(4, lambda number: show(target, scans[number % 2], max_tokens=1))


def animations_without_end(target: Target) -> Answers:
    files = _animations()
    return at_once(6, lambda number: show(target, files[number % 2], max_tokens=1))


@cache
def _animations() -> list[bytes]:
    """Seconds of work on the same cores, which the service cannot help: kept, so that another try is without it."""
    frames = [Image.new("RGB", (700, 700), (number, 0, 0)) for number in range(60)]
    options: dict[str, Any] = {"save_all": True, "append_images": frames, "duration": 1}
    return [encode(frames[0], "WEBP", method=0, **options), encode(frames[0], "PNG", **options)]


def chunks_that_unzip_to_gigabytes(target: Target) -> Answers:
    """zTXt, iTXt, iCCP and more image data than the header says."""
    zeros = zlib.compress(bytes(60_000_000), 9)
    chunks = {
        "zTXt": png_chunk(b"zTXt", b"a\0\0" + zeros) * 3,
        "iTXt": png_chunk(b"iTXt", b"a\0\1\0\0\0" + zeros) * 3,
        "iCCP": png_chunk(b"iCCP", b"a\0\0" + zeros),
        "tEXt": png_chunk(b"tEXt", b"a\0" + b"b" * 900_000) * 5,
    }
    files = [_flat_png(64, 64, 8, 2, 3, before=each) for each in chunks.values()]
    files.append(PNG_MAGIC + png_header(64, 64) + png_chunk(b"IDAT", zeros) + png_chunk(b"IEND", b""))
    return at_once(len(files), lambda number: show(target, files[number], max_tokens=1))


def many_small_chunks(target: Target) -> Answers:
    texts = png_chunk(b"tEXt", b"a\0b") * 300_000
    return show(target, _flat_png(64, 64, 8, 2, 3, before=texts)) + show(
        target, _flat_png(64, 64, 8, 2, 3, before=png_chunk(b"abCd", b"") * 500_000)
    )


def exif_of_many_kinds(target: Target) -> Answers:
    exif = Image.Exif()
    exif[0x0112] = 5
    exif[0x9286] = "x" * 60_000
    big = encode(Image.new("RGB", (5000, 5000)), "JPEG", exif=exif)
    loop = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 4000) + struct.pack("<HHII", 0x8769, 4, 1, 8) * 4000
    looped = encode(Image.new("RGB", (64, 64)), "JPEG", exif=loop)
    return at_once(4, lambda number: show(target, (big, looped)[number % 2], max_tokens=1))


def thin_pictures(target: Target) -> Answers:
    files = [encode(Image.new("RGB", size), "PNG") for size in ((1, 60_000), (60_000, 1), (16_383, 2))]
    return sum((show(target, each) for each in files), Counter())


def a_good_picture_beside_many_bad_ones(target: Target) -> Answers:
    bad = encode(Image.new("RGB", (3000, 3000)), "PNG")[:-4000]
    return at_once(4, lambda _: show(target, *[bad] * 15, picture(1)))


def sixteen_large_pictures(target: Target) -> Answers:
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (1500, 1500, 3), dtype=np.uint8))
    jpeg = encode(noise.resize((3000, 3000)), "JPEG", quality=50)
    return at_once(2, lambda _: show(target, *[jpeg] * 16, max_tokens=1))


def noise_called_a_picture(target: Target) -> Answers:
    rng = random.Random(1)
    starts = (PNG_MAGIC, b"\xff\xd8\xff\xe0", b"RIFF\xff\xff\xff\xffWEBPVP8X", b"GIF89a", b"II*\0", b"BM", b"%!PS", b"")
    return sum((show(target, start + rng.randbytes(200_000)) for start in starts), Counter())


def titled_pictures(target: Target) -> Answers:
    info = PngImagePlugin.PngInfo()
    for number in range(2000):
        info.add_itxt(f"k{number}", "v" * 200, zip=True)
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "PNG", pnginfo=info)
    return show(target, file.getvalue())


def _flat_png(
    width: int, height: int, depth: int, colour: int, pixel_bytes: float, *, interlace: int = 0, before: bytes = b""
) -> bytes:
    """All zero; `before`: chunks in front of the data. `pixel_bytes` 0: as good as no data."""
    row_bytes = int(width * pixel_bytes) + 1
    size = min(row_bytes * height + (row_bytes * 8 if interlace else 0), 300 << 20) if pixel_bytes else 100
    zip_ = zlib.compressobj(9)
    data = (
        b"".join(zip_.compress(bytes(min(1 << 20, size - start))) for start in range(0, size, 1 << 20)) + zip_.flush()
    )
    header = png_header(width, height, depth, colour, interlace)
    return PNG_MAGIC + header + before + png_chunk(b"IDAT", data) + png_chunk(b"IEND", b"")

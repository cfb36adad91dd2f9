"""Small files that ask for much: time, memory, or a decoder's patience. All of them below the limits of bytes."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image

from tests.gateway.picture_files import file_of

SIDE = 5650  # squared: 31.9 million, just below the limit of pixels
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def png_chunk(kind: bytes, body: bytes = b"") -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(
    width: int = 16, height: int = 16, *, extra: bytes = b"", data: bytes | None = None, after: bytes = b"", **kind: int
) -> bytes:
    """Black, unless `data` says otherwise; `extra` and `after`: chunks around the pixels."""
    header = struct.pack(">IIBBBBB", width, height, kind.get("depth", 8), kind.get("color", 2), 0, 0, 0)
    if data is None:
        data = png_chunk(b"IDAT", zlib.compress(bytes(height * (1 + 3 * width)), 9))
    return PNG_SIGNATURE + png_chunk(b"IHDR", header) + extra + data + after + png_chunk(b"IEND")


def zeros_compressed(num_bytes: int) -> bytes:
    compressor = zlib.compressobj(9)
    step = bytes(1 << 20)
    return b"".join([compressor.compress(step) for _ in range(num_bytes >> 20)] + [compressor.flush()])


def huge_png(mode: str = "RGBA") -> bytes:
    return file_of(Image.new(mode, (SIDE, SIDE)), compress_level=9)


def huge_interlaced_png() -> bytes:
    """Sixteen bits a channel, Adam7: all passes over all rows."""
    header = struct.pack(">IIBBBBB", SIDE, SIDE, 16, 6, 0, 0, 1)
    data = png_chunk(b"IDAT", zeros_compressed(SIDE * SIDE * 8 + (2 << 20)))
    return PNG_SIGNATURE + png_chunk(b"IHDR", header) + data + png_chunk(b"IEND")


def thin_png(height: int = 30_000_000) -> bytes:
    """One pixel wide."""
    return png(1, height, color=0, data=png_chunk(b"IDAT", zeros_compressed(2 * height + (1 << 20))))


def profiles_png(count: int = 1500) -> bytes:
    return png(extra=png_chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(1_000_000), 9)) * count)


def texts_png(count: int = 1500) -> bytes:
    return png(after=png_chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(1_000_000), 9)) * count)


def crumbs_png(count: int = 600_000) -> bytes:
    """Pixels in chunks of nothing."""
    return png(data=png_chunk(b"IDAT") * count + png_chunk(b"IDAT", zlib.compress(bytes(16 * 49), 9)))


def overlong_png() -> bytes:
    """Two gigabytes behind the last row."""
    return png(data=png_chunk(b"IDAT", zeros_compressed(2 << 30)))


def tiff_of_overlaps(num_bytes: int, num_entries: int) -> bytes:
    """An EXIF block whose every entry claims the whole block as its value."""
    entries = b"".join(struct.pack("<HHII", 0x8000 + i % 0x7000, 7, num_bytes - 8, 8) for i in range(num_entries))
    return (b"II*\0\x08\0\0\0" + struct.pack("<H", num_entries) + entries).ljust(num_bytes, b"\0")


def exif_png() -> bytes:
    return png(extra=png_chunk(b"eXIf", tiff_of_overlaps(800_000, 4000)))


def exif_jpeg() -> bytes:
    plain = file_of(Image.new("RGB", (16, 16)), "JPEG")
    block = b"Exif\0\0" + tiff_of_overlaps(65_000, 5000)
    return plain[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + plain[2:]


def scans_jpeg(count: int = 5000, size: tuple[int, int] = (SIDE, SIDE)) -> bytes:
    """The last scan of a progressive picture again and again."""
    plain = file_of(Image.new("RGB", size, "gray"), "JPEG", progressive=True)
    return plain[:-2] + plain[plain.rindex(b"\xff\xda") : -2] * count + b"\xff\xd9"


def most_scans_jpeg() -> bytes:
    return scans_jpeg(90)


def segments_jpeg(count: int = 1_000_000) -> bytes:
    plain = file_of(Image.new("RGB", (16, 16)), "JPEG")
    return plain[:2] + b"\xff\xfe\0\x02" * count + plain[2:]


def huge_jpeg(**options: object) -> bytes:
    return file_of(Image.new("CMYK", (SIDE, SIDE)), "JPEG", progressive=True, subsampling=0, **options)


def huge_webp() -> bytes:
    return file_of(Image.new("RGBA", (SIDE, SIDE)), "WEBP", lossless=True)


def wide_webp() -> bytes:
    return file_of(Image.new("RGB", (16_383, 1)), "WEBP", lossless=True)


def frames_webp(count: int = 1000, side: int = 400) -> bytes:
    frames = [Image.new("RGB", (side, side), (i % 256, 0, 0)) for i in range(count)]
    return file_of(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True, method=0)


def lying_webp() -> bytes:
    """A canvas far larger than its frame."""
    frame = file_of(Image.new("RGB", (16, 16)), "WEBP", lossless=True)[12:]
    canvas = b"VP8X" + struct.pack("<IB3x", 10, 0) + (SIDE - 1).to_bytes(3, "little") * 2
    return b"RIFF" + struct.pack("<I", len(frame) + len(canvas) + 4) + b"WEBP" + canvas + frame


def trailing_jpeg(num_bytes: int = 9 << 20) -> bytes:
    return file_of(Image.new("RGB", (16, 16)), "JPEG") + b"\xff\xda" * (num_bytes // 2)


def noisy_jpeg(seed: int = 0) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (1000, 1000, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


HOSTILE: dict[str, Callable[[], bytes]] = {
    make.__name__: make
    for make in (
        huge_png,
        huge_interlaced_png,
        thin_png,
        profiles_png,
        texts_png,
        crumbs_png,
        overlong_png,
        exif_png,
        exif_jpeg,
        scans_jpeg,
        most_scans_jpeg,
        segments_jpeg,
        huge_jpeg,
        huge_webp,
        wide_webp,
        frames_webp,
        lying_webp,
        trailing_jpeg,
        noisy_jpeg,
    )
}

"""A JPEG, PNG or WebP file reduced to what draws its first frame, with its costs known before anything is decoded.

Metadata, profiles, thumbnails, comments, further frames and pictures, and whatever lies behind the end never reach a
decoder: compressed text, looping EXIF and thousand-frame animations need no limits of their own. Of the metadata only
the camera's orientation is read. Parts are counted, so that the walk itself stays short.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

MAX_PARTS = 20_000  # segments or chunks; libpng's 8 KiB a chunk make 1,280 of 10 MiB
MAX_SCANS = 100  # of a progressive JPEG; encoders make about 10

JPEG_MARKER = re.compile(rb"\xff([\x01-\xfe])")
JPEG_SCAN_END = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
JPEG_PROGRESSIVE = frozenset({0xC2, 0xC6, 0xCA, 0xCE})
JPEG_KEPT_APPS = frozenset({0xE0, 0xEE})  # JFIF and Adobe say what the colours mean
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


class Broken(Exception):
    """Not the format that it begins as."""


class TooComplex(Exception):
    """More parts or scans than a picture needs."""


@dataclass(frozen=True)
class Container:
    """`content`: a file of the same format that draws the first frame. `orientation`: EXIF's, 1 to 8.

    `pixel_bytes`: memory for each pixel at the decoder's peak; `fixed_bytes`: further memory, whatever its resolution.
    """

    form: str
    content: bytes
    width: int
    height: int
    orientation: int
    pixel_bytes: int = 4
    fixed_bytes: int = 0
    num_scans: int = 1


def read_container(content: bytes) -> Container | None:
    """None: neither JPEG, PNG nor WebP. Raises Broken or TooComplex."""
    try:
        if content.startswith(b"\xff\xd8\xff"):
            return _jpeg(content)
        if content.startswith(PNG_SIGNATURE):
            return _png(content)
        if content.startswith(b"RIFF") and content[8:12] == b"WEBP":
            return _webp(content)
    except (struct.error, IndexError) as error:
        raise Broken from error
    return None


def _jpeg(content: bytes) -> Container:
    kept = [b"\xff\xd8"]
    frame = b""
    progressive = False
    orientation, num_scans, position = 1, 0, 2
    for _ in range(MAX_PARTS):
        marker = JPEG_MARKER.search(content, position)
        if marker is None:
            break
        kind, start, body = marker[1][0], marker.start(), marker.end()
        if kind == 0xD9:
            kept.append(b"\xff\xd9")
            break
        if kind == 0x01 or 0xD0 <= kind <= 0xD7:  # stands alone, between segments without meaning
            position = body
            continue
        (length,) = struct.unpack_from(">H", content, body)
        if kind == 0xD8 or length < 2:
            raise Broken
        position = body + length
        if kind == 0xDA:
            num_scans += 1
            scan_end = JPEG_SCAN_END.search(content, position)
            position = scan_end.start() if scan_end else len(content)
        elif kind in JPEG_FRAMES:
            if frame:
                raise Broken
            frame, progressive = content[body + 2 : body + length], kind in JPEG_PROGRESSIVE
        elif kind == 0xE1 and content.startswith(b"Exif\0\0", body + 2):
            orientation = read_orientation(content[body + 8 : position]) if orientation == 1 else orientation
        if kind != 0xFE and (kind < 0xE0 or kind in JPEG_KEPT_APPS or kind > 0xEF):
            kept.append(content[start:position])
    else:
        raise TooComplex
    if not num_scans:
        raise Broken
    if num_scans > MAX_SCANS:
        raise TooComplex
    height, width, num_components = struct.unpack_from(">xHHB", frame)
    sampling = [divmod(frame[7 + 3 * component], 16) for component in range(num_components)]
    columns, rows = (max((pair[axis] for pair in sampling), default=0) for axis in (0, 1))
    if not columns or not rows:
        raise Broken
    coefficient_bytes = 0
    if progressive or num_scans > 1:  # 16 bits for each of 64 coefficients of all blocks, kept from scan to scan
        blocks = -(-width // (8 * columns)) * -(-height // (8 * rows)) * sum(x * y for x, y in sampling)
        coefficient_bytes = 128 * blocks
    return Container(
        "JPEG",
        b"".join(kept),
        width,
        height,
        orientation,
        fixed_bytes=coefficient_bytes,
        num_scans=num_scans,
    )


def _png(content: bytes) -> Container:
    header = b""
    before: dict[bytes, bytes] = {}  # palette and transparency
    data: list[bytes] = []
    orientation, last = 1, b""
    for kind, body in _chunks(content, 8, ">I4s", trailer=4):
        if not header:
            if kind != b"IHDR" or len(body) < 13:
                raise Broken
            header = body[:13]
        elif kind == b"IDAT" and (not data or last == b"IDAT"):
            data.append(body)
        elif kind in (b"PLTE", b"tRNS") and not data:
            before[kind] = body
        elif kind == b"eXIf":
            orientation = read_orientation(body)
        elif kind == b"IEND":
            break
        last = kind
    if not data:
        raise Broken
    width, height = struct.unpack_from(">II", header)
    parts = [(b"IHDR", header), *sorted(before.items()), (b"IDAT", b"".join(data)), (b"IEND", b"")]
    del data
    whole = b"".join((PNG_SIGNATURE, *(piece for kind, body in parts for piece in _png_chunk(kind, body))))
    return Container("PNG", whole, width, height, orientation)


def _png_chunk(kind: bytes, body: bytes) -> tuple[bytes, bytes, bytes]:
    return struct.pack(">I4s", len(body), kind), body, struct.pack(">I", zlib.crc32(body, zlib.crc32(kind)))


def _webp(content: bytes) -> Container:
    (riff_size,) = struct.unpack_from("<I", content, 4)
    if riff_size + 8 > len(content):
        raise Broken
    header = b""  # of an extended file
    kept: list[tuple[bytes, bytes]] = []
    orientation = 1
    for kind, body in _chunks(content[: riff_size + 8], 12, "<4sI", trailer=0):
        drawn = bool(kept) and kept[-1][0] in (b"VP8 ", b"VP8L", b"ANMF")
        if kind == b"VP8X" and not header and not kept:
            header = body
        elif kind in (b"VP8 ", b"VP8L", b"ANMF", b"ALPH", b"ANIM") and not drawn:
            kept.append((kind, body))
        elif kind == b"EXIF" and header:
            orientation = read_orientation(body.removeprefix(b"Exif\0\0"))
        if kept and not header:
            break  # a simple file is this one chunk
    if not kept:
        raise Broken
    kind, body = kept[-1]
    if header:
        width, height = (int.from_bytes(header[at : at + 3], "little") + 1 for at in (4, 7))
        kept.insert(0, (b"VP8X", bytes([header[0] & 0x12]) + header[1:10]))  # alpha and animation, not metadata
    elif kind == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    else:
        width, height = (size & 0x3FFF for size in struct.unpack_from("<6xHH", body))
    chunks = b"".join(struct.pack("<4sI", kind, len(body)) + body + b"\0" * (len(body) % 2) for kind, body in kept)
    whole = struct.pack("<4sI4s", b"RIFF", len(chunks) + 4, b"WEBP") + chunks
    # measured: libwebp's animation decoder, which Pillow uses for all files, holds two canvases beside two copies
    return Container("WEBP", whole, width, height, orientation, pixel_bytes=16 if kind == b"VP8 " else 20)


def _chunks(content: bytes, position: int, header: str, trailer: int) -> Iterator[tuple[bytes, bytes]]:
    """(kind, body) of each chunk; the last may be cut off. Raises TooComplex."""
    for _ in range(MAX_PARTS):
        if position + 8 > len(content):
            return
        first, second = struct.unpack_from(header, content, position)
        kind, length = (second, first) if isinstance(first, int) else (first, second)
        yield kind, content[position + 8 : position + 8 + length]
        position += 8 + length + (trailer or length % 2)
    raise TooComplex


def read_orientation(tiff: bytes) -> int:
    """EXIF's orientation, 1 to 8; 1 where there is none. The one entry is looked for, nothing else is followed."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(f"{order}I", tiff, 4)
        (num_entries,) = struct.unpack_from(f"{order}H", tiff, start)
    except struct.error:
        return 1
    whole_entries = min(num_entries, (len(tiff) - start - 2) // 12)
    for tag, kind, count, value in struct.iter_unpack(f"{order}HHIH2x", tiff[start + 2 :][: 12 * whole_entries]):
        if tag == 0x0112 and kind == 3 and count == 1 and 1 <= value <= 8:
            return int(value)
    return 1

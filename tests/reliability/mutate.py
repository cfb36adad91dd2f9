"""Makes wrong things of right ones: bytes, pictures by their chunks, JSON by its values, HTTP requests by their parts.

Everything is drawn from the Random passed in, so a seed and a number give the same mutant again.
"""

from __future__ import annotations

import json
import struct
import zlib
from random import Random
from typing import Any

MAX_BYTES, MAX_JSON_BYTES = 200_000, 2_000_000
NUMBERS = (
    0,
    1,
    -1,
    2,
    127,
    255,
    256,
    32767,
    65535,
    65536,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**53 + 1,
    2**63,
    2**64,
    10**30,
)
FLOATS = (1e-320, 1e-38, 1e-45, 1e308, -0.0, 0.1, float("inf"), float("nan"), 3.4e39)
TEXTS = (
    "",
    "\0",
    "\ud800",
    "🙂" * 50,
    "a" * 5000,
    "<image>",
    "</s><s>",
    "<|im_end|>",
    "‮ ﷽",
    "1e999",
    "null",
    "\r\n",
    "%s%n",
)
PATHS = (
    "",
    "/",
    "//",
    "/v1/generate/",
    "/v1/%00",
    "/v1/models/" + "x" * 3000,
    "/../etc/passwd",
    "/v1/generate?a=" + "b" * 900,
)
METHODS = (b"GET", b"HEAD", b"PUT", b"DELETE", b"OPTIONS", b"PATCH", b"TRACE", b"CONNECT", b"BREW", b"post", b"P\0ST")
CHARSETS = (
    "punycode",
    "utf-7",
    "utf-16",
    "utf-32",
    "idna",
    "rot13",
    "hex",
    "unicode_escape",
    "mbcs",
    "x" * 300,
    "",
    "\x7f",
)
HEADERS = (
    (b"content-type", b"text/plain"),
    (b"content-type", b"application/json; charset=utf-16"),
    (b"content-type", b"multipart/form-data"),
    (b"content-type", b"multipart/form-data; boundary="),
    (b"content-type", b"multipart/form-data; boundary=" + b"b" * 4000),
    (b"content-encoding", b"gzip"),
    (b"expect", b"100-continue"),
    (b"upgrade", b"websocket"),
    (b"connection", b"upgrade"),
    (b"host", b"\xff\xfe"),
    (b"authorization", b"Bearer " + b"\xc3\xa9" * 50),
    (b"authorization", b"Basic Og=="),
    (b"x-request-id", b"a\tb"),
    (b"x-request-id", b"z" * 500),
    (b"traceparent", b"00-" + b"f" * 90),
    (b"accept", b"*/*;" * 800),
    (b"cookie", b"a=b;" * 2000),
    (b"range", b"bytes=0-,1-"),
    (b"forwarded", b"for=_"),
    (b"x-forwarded-for", b"%s" * 100),
    (b"te", b"trailers"),
)


def mutate_bytes(rng: Random, data: bytes, others: list[bytes] | None = None) -> bytes:
    """One to four changes: flipped bits, cuts, repetitions, splices, numbers written over lengths."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.choice((1, 2, 4, 16, 200)))
        match rng.randrange(8):
            case 0:
                changed = bytearray(data)
                for _ in range(rng.choice((1, 3, 30))):
                    if changed:
                        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
                data = bytes(changed)
            case 1:
                data = data[:at]
            case 2:
                data = data[:at] + data[end:]
            case 3:
                data = data[:at] + data[at:end] * rng.choice((2, 3, 500)) + data[end:]
            case 4:
                other = rng.choice(others) if others else data[::-1]
                data = data[:at] + other[rng.randrange(len(other) + 1) :]
            case 5:
                size = rng.choice("BHIQ")
                number = rng.choice(NUMBERS) % 2 ** (8 * struct.calcsize(size))
                data = data[:at] + struct.pack(rng.choice("<>") + size, number) + data[at + struct.calcsize(size) :]
            case 6:
                data = data[:at] + rng.randbytes(rng.choice((1, 8, 300))) + data[end:]
            case 7:
                data += rng.choice((b"\0" * 1000, data, b"\xff"))
        data = data[:MAX_BYTES]
    return data


def mutate_picture(rng: Random, data: bytes, others: list[bytes]) -> bytes:
    """By its chunks, with sums that are right again, or by its bytes."""
    if rng.random() < 0.5:
        return mutate_bytes(rng, data, others)
    if data.startswith(b"\x89PNG"):
        return _join_png(rng, _shuffle(rng, _split_png(data)))
    if data.startswith(b"\xff\xd8"):
        return b"".join(_shuffle(rng, _split_jpeg(data)))[:MAX_BYTES]
    if data.startswith(b"RIFF"):
        return _join_riff(rng, _shuffle(rng, _split_riff(data)))
    return mutate_bytes(rng, data, others)


def _shuffle(rng: Random, chunks: list[bytes]) -> list[bytes]:
    """Some left out, repeated, moved or changed inside."""
    chunks = list(chunks)
    for _ in range(rng.choice((1, 2, 3))):
        at = rng.randrange(len(chunks)) if chunks else 0
        match rng.randrange(5):
            case 0 if len(chunks) > 1:
                del chunks[at]
            case 1:
                chunks[at:at] = chunks[at : at + 1] * rng.choice((1, 5, 60, 2000))
            case 2:
                rng.shuffle(chunks)
            case _ if chunks:
                chunks[at] = chunks[at][:4] + mutate_bytes(rng, chunks[at][4:])
    return chunks


def _split_png(data: bytes) -> list[bytes]:
    """Each chunk's kind and content."""
    chunks, at = [], 8
    while at + 8 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        chunks.append(data[at + 4 : at + 8 + length])
        at += 12 + length
    return chunks


def _join_png(rng: Random, chunks: list[bytes]) -> bytes:
    """Now and then a chunk's content is what it was, zipped again: as data it may be read deeper."""
    data = b"\x89PNG\r\n\x1a\n"
    for chunk in chunks:
        if chunk[:4] == b"IDAT" and rng.random() < 0.1:
            chunk = b"IDAT" + zlib.compress(rng.randbytes(20) * 2000)
        if chunk[:4] == b"IHDR" and rng.random() < 0.3:
            chunk = b"IHDR" + struct.pack(">II", rng.choice((1, 5, 7000)), rng.choice((1, 5, 4000))) + chunk[12:]
        data += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return data[:MAX_BYTES]


def _split_jpeg(data: bytes) -> list[bytes]:
    """From marker to marker; a scan's data stay with its marker."""
    parts = data.split(b"\xff")
    segments: list[bytes] = []
    for part in parts[1:]:
        if part[:1] in (b"", b"\0") or b"\xd0" <= part[:1] <= b"\xd7":
            segments[-1] += b"\xff" + part
        else:
            segments.append(b"\xff" + part)
    return segments


def _split_riff(data: bytes) -> list[bytes]:
    chunks, at = [], 12
    while at + 8 <= len(data):
        (length,) = struct.unpack_from("<I", data, at + 4)
        chunks.append(data[at : at + 4] + data[at + 8 : at + 8 + length])
        at += 8 + length + length % 2
    return chunks


def _join_riff(rng: Random, chunks: list[bytes]) -> bytes:
    data = b"WEBP"
    for chunk in chunks:
        length = len(chunk) - 4 if rng.random() < 0.9 else rng.choice(NUMBERS) % 2**32
        data += chunk[:4] + struct.pack("<I", length) + chunk[4:] + b"\0" * (len(chunk) % 2)
    return (b"RIFF" + struct.pack("<I", len(data)) + data)[:MAX_BYTES]


def mutate_json(rng: Random, value: Any) -> bytes:
    """A value somewhere inside becomes another, as JSON; now and then the text itself is changed, too."""
    changed = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 2, 3))):
        changed = _mutate_value(rng, changed)
    text = json.dumps(changed, ensure_ascii=rng.random() < 0.9).encode("utf-8", "surrogatepass")
    if rng.random() < 0.2:
        text = mutate_bytes(rng, text)
    return text[:MAX_JSON_BYTES]


def _mutate_value(rng: Random, value: Any) -> Any:
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        match rng.randrange(10):
            case 0:
                return {name: each for name, each in value.items() if name != key}
            case 1:
                return {**value, rng.choice(TEXTS): _odd_value(rng), str(rng.randrange(10**6)): None}
            case _:
                return {**value, key: _mutate_value(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.7:
        at = rng.randrange(len(value))
        if rng.random() < 0.2:
            return value * rng.choice((2, 50, 1000))
        return [*value[:at], _mutate_value(rng, value[at]), *value[at + 1 :]]
    return _odd_value(rng)


def _odd_value(rng: Random) -> Any:
    match rng.randrange(9):
        case 0:
            return rng.choice(NUMBERS)
        case 1:
            return rng.choice(FLOATS)
        case 2 | 3:
            return rng.choice(TEXTS)
        case 4:
            return rng.choice((None, True, False, [], {}, [[]], {"": {}}))
        case 5:
            return [rng.choice((*NUMBERS, None, "", 0.5, {}))] * rng.choice((1, 20, 20, 5000, 300_000))
        case 6:
            nested: Any = rng.choice(TEXTS)
            for _ in range(rng.choice((3, 100, 900))):
                nested = [nested] if rng.random() < 0.5 else {"a": nested}
            return nested
        case 7:
            return {"type": rng.choice(("image_url", "text", "file", "")), "image_url": {"url": rng.choice(TEXTS)}}
        case _:
            return f"data:image/{rng.choice(('png', 'webp', '*'))};base64,{rng.choice(TEXTS)}"


def mutate_form(rng: Random, body: bytes) -> bytes:
    """A multipart body with charsets, names and lines that nobody writes."""
    match rng.randrange(5):
        case 0:
            return mutate_bytes(rng, body)
        case 1:
            charset = rng.choice(CHARSETS).encode()
            return body.replace(b"\r\n\r\n", b"\r\nContent-Type: text/plain; charset=" + charset + b"\r\n\r\n", 1)
        case 2:
            name = rng.choice((b"_charset_", b'"', b"image", b"images", b"", b"stop", b"\xff", b"prompt[]"))
            return body.replace(b'name="prompt"', b'name="' + name + b'"')
        case 3:
            first, _ = body.split(b"\r\n", 1)
            part = first + b'\r\nContent-Disposition: form-data; name="stop_token_ids"\r\n\r\n7\r\n'
            return part * rng.choice((3, 70, 1200)) + body
        case _:
            header = b"\r\nX-Odd: " + rng.choice((b"a" * 9000, b"\0", b"\r\n folded", b": :")) + b"\r\n\r\n"
            return body.replace(b"\r\n\r\n", header, 1)


def odd_header(rng: Random) -> tuple[bytes, bytes]:
    if rng.random() < 0.2:
        name = rng.choice((b"x-odd", b"x odd", b"", b"x\x7f", b"content-type", b"host"))
        return name, rng.randbytes(rng.choice((1, 40))).replace(b"\n", b"").replace(b"\r", b"")
    if rng.random() < 0.2:
        charset = rng.choice(CHARSETS).encode()
        return b"content-type", b"multipart/form-data; boundary=frontier; charset=" + charset
    return rng.choice(HEADERS)

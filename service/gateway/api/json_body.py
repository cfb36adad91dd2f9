"""JSON whose pictures are set aside while it is parsed: what is left is small, whatever the pictures weigh.

A picture is the base64 of a data URL in `images` or `url`. Everything else is bounded by bytes and, as lists and
objects cost the most, by their number; so no body holds the interpreter for long. Knows no field but these two.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pydantic_core import from_json

from service.errors import InvalidRequest, TooLarge

MAX_CONTAINERS = 32_768  # lists and objects
PICTURE_FIELDS = frozenset({"images", "url"})
_START, _BASE64, _MAX_HEAD = b'"data:', b";base64,", 128
_SLICE = 1 << 20
_KEY = re.compile(rb'"[ \t\r\n]*:')  # the end of a string that is a key


@dataclass(frozen=True)
class JsonLimits:
    max_bytes: int  # apart from pictures
    max_pictures: int  # that are set aside; more are refused later, by name
    max_picture_bytes: int  # of a larger one as much is kept as it takes to be refused later, by name

    @property
    def max_chars(self) -> int:
        """Of base64, more than the largest picture has."""
        return self.max_picture_bytes // 3 * 4 + 16


def load_json(body: bytes | bytearray, limits: JsonLimits) -> dict[str, Any]:
    """Raises InvalidRequest or TooLarge."""
    aside = _Pictures(limits)
    text = aside.take_from(body)
    if text.count(b"[") + text.count(b"{") > MAX_CONTAINERS and _containers(text) > MAX_CONTAINERS:
        raise InvalidRequest(f"A JSON body holds at most {MAX_CONTAINERS} lists and objects.")
    try:
        data = from_json(text, allow_inf_nan=False)
    except ValueError as error:
        raise InvalidRequest("The body is not valid JSON.") from error
    if not isinstance(data, dict):
        raise InvalidRequest("The body must be a JSON object.")
    aside.put_back(data)
    return data


class _Pictures:
    """Base64 that was cut out of a body, and the marks that stand in its place."""

    def __init__(self, limits: JsonLimits) -> None:
        self._limits = limits
        self._mark = f"{secrets.token_hex(8)}:"  # which no client can spell
        self._cut: list[str] = []
        self._num_bytes = 0  # of what is no picture

    def take_from(self, body: bytes | bytearray) -> bytes:
        """The body without its pictures. Linear: each byte is looked at by a few searches."""
        pieces: list[bytes | bytearray] = []
        done = at = 0  # everything before `done` is in `pieces`; before `at` no picture is left
        while len(self._cut) < self._limits.max_pictures:
            start = body.find(_START, at, done + self._limits.max_bytes)
            if start < 0:
                break
            head = body.find(_BASE64, start, start + _MAX_HEAD)
            if head < 0 or body.find(b'"', start + 1, head) >= 0:
                at = start + 1
                continue
            begin = head + len(_BASE64)
            end = body.find(b'"', begin)
            base64 = None if end < 0 or _KEY.match(body, end) else _text(body, begin, end, self._limits.max_chars)
            if base64 is None:
                at = begin
                continue
            pieces += [body[done:begin], f"{self._mark}{len(self._cut)}".encode()]
            self._cut.append(base64)
            self._count(begin - done)
            done = at = end
        self._count(len(body) - done)
        pieces.append(body[done:])
        return b"".join(pieces)

    def put_back(self, value: Any, field: str = "") -> None:
        """Into `value`, which is parsed: where no picture can stand, its bytes count as any other's."""
        if not self._cut:
            return
        items: Iterable[tuple[Any, Any]] = enumerate(value) if isinstance(value, list) else value.items()
        for key, item in items:
            name = field if isinstance(value, list) else key
            if isinstance(item, str):
                if self._mark in item:
                    head, _, number = item.partition(self._mark)
                    base64 = self._cut[int(number)]
                    if name not in PICTURE_FIELDS:
                        self._count(len(base64))
                    value[key] = head + base64
            elif isinstance(item, list | dict):
                self.put_back(item, name)

    def _count(self, num_bytes: int) -> None:
        self._num_bytes += num_bytes
        if self._num_bytes > self._limits.max_bytes:
            raise TooLarge(f"A JSON body takes at most {self._limits.max_bytes} bytes apart from its pictures.")


def _text(body: bytes | bytearray, begin: int, end: int, max_chars: int) -> str | None:
    """The string as it is meant, as far as it is kept, or None if it is more than base64 with slashes escaped."""
    if body.find(b"\\", begin, end) < 0:
        base64: bytes | bytearray = body[begin : min(end, begin + max_chars)]
    else:  # some clients escape slashes: two bytes for one
        base64 = _unescaped(body, begin, min(end, begin + 2 * max_chars + 2))[:max_chars]
    try:
        return None if b"\\" in base64 else base64.decode("ascii")
    except UnicodeDecodeError:
        return None


def _unescaped(body: bytes | bytearray, begin: int, end: int) -> bytes:
    """In slices: the interpreter stands still during each."""
    slices = []
    while begin < end:
        until = min(begin + _SLICE, end)
        until += until < end and body[until - 1 : until] == b"\\"
        slices.append(body[begin:until].replace(b"\\/", b"/"))
        begin = until
    return b"".join(slices)


def _containers(text: bytes) -> int:
    """How many lists and objects there are, less what strings hold; stops where there are too many."""
    text = text.replace(b"\\\\", b"").replace(b'\\"', b"")
    count = at = 0
    while at >= 0 and count <= MAX_CONTAINERS:
        start = text.find(b'"', at)
        outside = len(text) if start < 0 else start
        count += text.count(b"[", at, outside) + text.count(b"{", at, outside)
        end = text.find(b'"', start + 1) if start >= 0 else -1
        at = end + 1 if end >= 0 else -1
    return count
